"""What a RegularizedTrainer works out of its training set before the first step."""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from selfreg.classifier.arguments import AUTO
from selfreg.classifier.collator import OFFSET, labels_of, pooled_dataset
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.offset import offsets_of
from selfreg.classifier.path import UNIT, WeightPath, resolve_weights
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import as_targets
from selfreg.classifier.training_args import RegularizedTrainingArguments

logger = logging.getLogger(__name__)

OWN_UNUSED = {
    "compute_loss_func": "the loss is that of the task; subclass RegularizedTrainer and override loss_of",
}
STOCK_UNUSED = {
    "class_weights": "a stock model works out its loss itself: pass compute_loss_func",
    "offset_weight": "it needs the cached states of a RegularizedSequenceClassifier",
    "logit_decay": "a stock model works out its loss itself",
}
"""Arguments without an effect on a model of selfreg, and on a stock one, with why."""


def refuse_unused(args: Any, kwargs: dict[str, Any], unused: dict[str, str]) -> None:
    """Raises ValueError for what would have no effect, with why."""
    for name, why in unused.items():
        value = kwargs.get(name) or getattr(args, name, None)
        if value:
            raise ValueError(f"{name}={value!r} would have no effect here: {why}")


class RowsWithOffsets(Dataset[dict[str, Any]]):
    """Rows of a data set with what the unintended features say of each.

    Args:
        rows: the data set.
        offsets (`[N, L]`): of its rows.
    """

    def __init__(self, rows: Any, offsets: Tensor) -> None:
        self.rows, self.offsets = rows, offsets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], OFFSET: self.offsets[index]}


def with_offsets(
    model: RegularizedSequenceClassifier, args: RegularizedTrainingArguments, states: PooledStates
) -> PooledStates:
    """States with what the features alone say of them, unless they bring their own offsets."""
    if not (args.offset_weight and model.config.num_unintended) or states.offsets is not None:
        return states
    offsets = offsets_of(model.task, states, model.score.out_features, model.unintended_mask, seed=args.seed)
    return replace(states, offsets=args.offset_weight * offsets)


def knows_features(dataset: Any) -> bool:
    """Whether the features' activations in each text of a training set are there, or can be worked out."""
    if dataset is None or isinstance(dataset, PooledStates):
        return True
    return "pooled" not in dataset[0] or "unintended_activations" in dataset[0]


def chosen_weights(
    model: RegularizedSequenceClassifier, args: RegularizedTrainingArguments, dataset: Any
) -> tuple[RegularizedTrainingArguments, WeightPath | None]:
    """`args` with numbers in the place of "auto"; the user's own stay as they are."""
    auto = [name for name in UNIT if getattr(args, name) == AUTO]
    if not auto:
        return args, None
    if dataset is None:
        chosen: Any = {name: UNIT[name] for name in auto}
        return replace(args, **chosen), None  # nothing is trained
    states = dataset
    if not isinstance(states, PooledStates):
        pooled = "pooled" in dataset[0]
        states = stacked(model, dataset, needs_activations=True) if pooled else pooled_dataset(model, dataset)
        states = with_offsets(model, args, states)
    resolved, path = resolve_weights(model, args, states)
    numbers = ", ".join(f"{name}={getattr(resolved, name):g}" for name in auto)
    logger.info("chosen by validation loss: %s", numbers)
    return resolved, path


def stacked(model: RegularizedSequenceClassifier, dataset: Any, *, needs_activations: bool) -> PooledStates:
    """Rows of `pooled`, `labels` and `unintended_activations` as one.

    Raises:
        ValueError: the activations are needed, and not there.
    """
    rows = [dataset[i] for i in range(len(dataset))]
    if needs_activations and "unintended_activations" not in rows[0]:
        raise ValueError(
            "rows of pooled states need 'unintended_activations' for the dependence term: make them with "
            "model.pooled_states(texts, labels), or set dependence_weight=0"
        )
    pooled, activations = (
        torch.stack([torch.as_tensor(row.get(name, []), dtype=torch.float32) for row in rows])
        for name in ("pooled", "unintended_activations")
    )
    labels = as_targets(model.task, labels_of(rows), model.score.out_features, "train_dataset")
    return PooledStates(pooled, activations, labels)
