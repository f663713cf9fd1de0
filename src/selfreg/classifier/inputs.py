"""What is wrong with a dataset for classifier training, told before the first step."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor

from selfreg.activations.conversation import check_pair
from selfreg.classifier.collator import labels_of, numbers_of
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import as_targets, text_weights
from selfreg.classifier.training_args import RegularizedTrainingArguments


def check_dataset(dataset: Any, model: RegularizedSequenceClassifier, name: str, *, training: bool) -> Tensor | None:
    """The labels of a dataset; None where there is none.

    Raises:
        ValueError: a column is missing, a label is not of the task, a weight is negative, two sides of a pair are the
            same, or there is nothing to tell apart.
    """
    if dataset is None:
        return None
    is_stream = not isinstance(dataset, Sized)
    if is_stream:
        raise ValueError(f"{name} is a stream: the standardisation and the dependence term need all of it at once")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    columns = dataset[0].keys()
    if model.task == "preference":
        labels = _check_pairs(dataset, name)
    else:
        if "chosen" in columns:
            raise ValueError(
                f"{name} holds pairs (columns chosen and rejected), but the model's task is {model.task!r}: make it "
                "with task='preference'"
            )
        if not {"text", "input_ids", "pooled"} & set(columns):
            raise ValueError(f"{name} needs a column 'text', 'input_ids' or 'pooled'; it has {', '.join(columns)}")
        if not {"label", "labels"} & set(columns):
            raise ValueError(f"{name} needs a column 'label' or 'labels'; it has {', '.join(columns)}")
        labels = as_targets(model.task, labels_of(dataset), model.score.out_features, name)
        if training and len(labels.unique(dim=0)) < 2:
            raise ValueError(f"{name} holds one label only ({labels[0].tolist()}): there is nothing to tell apart")
    weights = numbers_of(dataset, "weight")
    if weights is not None and training:
        values = torch.as_tensor(weights)
        if not bool((torch.isfinite(values) & (values >= 0)).all()) or not bool(values.sum() > 0):
            raise ValueError(f"{name}: weights of texts must be finite, not negative and not all 0")
    return labels


def _check_pairs(dataset: Any, name: str) -> Tensor:
    if isinstance(dataset, PooledStates):
        if not dataset.are_pairs:
            raise ValueError(
                f"{name} holds states of texts, but preference needs pairs: model.pooled_states makes them"
            )
        return dataset.labels
    if "pooled" in dataset[0]:
        return torch.zeros(len(dataset), dtype=torch.long)
    for side in ("chosen", "rejected"):
        if side not in dataset[0]:
            raise ValueError(f"{name} needs a column {side!r}; it has {', '.join(dataset[0])}")
    for number, row in enumerate(dataset):
        try:
            check_pair(row)
        except ValueError as error:
            raise ValueError(f"{name}: row {number}: {error}") from error
    return torch.zeros(len(dataset), dtype=torch.long)


def check_removal(dataset: Any, model: RegularizedSequenceClassifier, name: str) -> None:
    """Cached states must be those that the classifier will see later."""
    removes = model.config.remove_unintended
    known = dataset.removed if isinstance(dataset, PooledStates) else None
    if known is not None and known != removes and model.config.num_unintended:
        raise ValueError(
            f"{name} holds states {'with' if known else 'without'} the unintended features removed, but the model has "
            f"remove_unintended={removes}: make them anew with model.pooled_states"
        )


def check_margins(dataset: Any, args: RegularizedTrainingArguments, name: str) -> None:
    """Raises ValueError where pairs have margins that the loss can't use."""
    if dataset is None or args.preference_loss != "pointwise":
        return
    if numbers_of(dataset, "margin") is not None:
        raise ValueError(
            f"{name}: a margin is between two sides, and preference_loss='pointwise' can't use it; drop the column"
        )


def mean_weight(dataset: Any, labels: Tensor, of_labels: Tensor | None, model: RegularizedSequenceClassifier) -> float:
    """Mean over the training set of what a text counts in the loss.

    Raises:
        ValueError: no text counts.
    """
    given = numbers_of(dataset, "weight")
    weights = text_weights(model.task, labels, None if given is None else torch.as_tensor(given), of_labels)
    if not float(weights.mean()) > 0:
        raise ValueError("the weights of texts and labels are all 0: no text would count")
    return float(weights.mean())


def label_weights(
    args: RegularizedTrainingArguments, labels: Tensor | None, model: RegularizedSequenceClassifier
) -> Tensor | None:
    """`args.class_weights` as a weight a label: of its texts (single label), or of its term (many labels).

    Raises:
        ValueError: the task has no labels to weigh, or the weights are not as many.
    """
    if args.class_weights is None or labels is None:
        return None
    if model.task in ("regression", "preference"):
        raise ValueError(f"class_weights={args.class_weights!r} needs labels; task {model.task!r} has none")
    num_labels = model.score.out_features
    weights = args.label_weights()
    if weights is None:
        if model.task == "multi_label":
            # As much say for a rare label as for a frequent one.
            share = labels.float().mean(dim=0).clamp(1 / len(labels), 1 - 1 / len(labels))
            balanced = 1 / (share * (1 - share))
            return balanced / balanced.mean()
        counts = torch.bincount(labels, minlength=num_labels).clamp_min(1)
        return len(labels) / (num_labels * counts.float())
    if len(weights) != num_labels:
        raise ValueError(f"class_weights has {len(weights)} weights, the model has {num_labels} labels")
    return torch.tensor(weights, dtype=torch.float32)


def check_logits(args: RegularizedTrainingArguments, model: RegularizedSequenceClassifier) -> None:
    """Raises ValueError where logits are to be kept small, or targets softened, and the task has neither."""
    for name, what in (("logit_decay", "logits"), ("label_smoothing_factor", "labels")):
        given = getattr(args, name)
        if given and model.task == "regression":
            raise ValueError(f"{name}={given} would have no effect here: task 'regression' has no {what}")
