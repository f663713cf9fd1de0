"""RegularizedTrainer: trains a classifier that stays off the unintended features."""

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfreg.activations.prompt import collate_prompts
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.penalty import dependence_directions
from selfreg.classifier.regularizer import RegularizationMixin
from selfreg.classifier.states import PooledStates, class_ids
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.utils.progress import progress

_POOL_BATCH = 32


class RegularizedTrainer(RegularizationMixin):
    """Trains a [`RegularizedSequenceClassifier`]; its head alone, where the backbone is frozen.

    Args:
        model: the classifier; or a stock `AutoModelForSequenceClassification` model, with `unintended`.
        args: a [`RegularizedTrainingArguments`].
        train_dataset: a [`PooledStates`]; or rows with `text` (or `input_ids`, as the tokenizer gives them for the
            bare text) and `label` (or `labels`); or rows with `pooled` and `labels`, which is enough where
            `dependence_weight` is 0.
        eval_dataset: likewise.
        unintended: for stock models only.
        kwargs: as for [`~transformers.Trainer`].

    Raises:
        ValueError: a column is missing, a text is empty, a label is out of range or there is only one.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        args: RegularizedTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        unintended: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, RegularizedTrainingArguments):
            raise ValueError(
                f"args must be RegularizedTrainingArguments, not {type(args).__name__}: TrainingArguments with the "
                "weights of the two terms"
            )
        own = isinstance(model, RegularizedSequenceClassifier)
        if own:
            if not model.backbone_is_frozen:
                raise ValueError(
                    "the backbone has trainable parameters; selfreg trains the head over a frozen backbone so far: "
                    "model.backbone.requires_grad_(False)"
                )
            if args.remove_unintended is not None:
                model.config.remove_unintended = args.remove_unintended
            kwargs.setdefault("data_collator", ClassifierCollator(model.tokenizer, model.config.pad_id))
            labels = _check_dataset(train_dataset, model.config.num_labels, "train_dataset", training=True)
            parts = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            for name, part in parts.items():
                _check_dataset(part, model.config.num_labels, name, training=False)
            for name, part in {"train_dataset": train_dataset, **parts}.items():
                _check_removal(part, model, name)
            if args.cache_states:
                # The batches are then of pooled states, whatever the rows were.
                kwargs["data_collator"] = ClassifierCollator(model.tokenizer, model.config.pad_id)
                train_dataset = _cached(model, train_dataset)
                if isinstance(eval_dataset, dict):
                    eval_dataset = {name: _cached(model, part) for name, part in eval_dataset.items()}
                else:
                    eval_dataset = _cached(model, eval_dataset)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            unintended=unintended,
            **kwargs,
        )
        self._class_weights = _class_weights(args, labels, model.config.num_labels) if own else None
        self.label_names = ["labels"]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, RegularizedSequenceClassifier) and self.train_dataset is not None:
            self._fit(self.model, self.train_dataset)
        return super().train(*args, **kwargs)

    def task_loss(self, model: Any, inputs: dict[str, Tensor | Any]) -> tuple[Tensor, Any]:
        if self._class_weights is None or "labels" not in inputs:
            return super().task_loss(model, inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        weight = self._class_weights.to(outputs.logits)
        return F.cross_entropy(outputs.logits, inputs["labels"], weight=weight), outputs

    def _fit(self, model: RegularizedSequenceClassifier, dataset: Any) -> None:
        """Standardisation and dependence directions, in closed form over the training set."""
        states = dataset if isinstance(dataset, PooledStates) else None
        if states is None and "pooled" in dataset[0]:
            rows = [dataset[i] for i in range(len(dataset))]
            pooled = torch.stack([torch.as_tensor(row["pooled"], dtype=torch.float32) for row in rows])
            if self.args.dependence_weight and "unintended_activations" not in rows[0]:
                raise ValueError(
                    "rows of pooled states need 'unintended_activations' for the dependence term: make them with "
                    "model.pooled_states(texts, labels), or set dependence_weight=0"
                )
            activations = torch.stack(
                [torch.as_tensor(row.get("unintended_activations", []), dtype=torch.float32) for row in rows]
            )
            states = PooledStates(pooled, activations, torch.tensor([_label_of(row) for row in rows]))
        if states is None:
            # cache_states is off: the backbone runs at every step, and once before for what the head is fitted to.
            states = _pool(model, dataset)
        model.set_standardization(states.pooled)
        if self.args.dependence_weight and model.config.num_unintended:
            standardized = (states.pooled - model.pooled_mean.cpu()) / model.pooled_scale.cpu()
            self.regularizer.dependence_directions = dependence_directions(
                standardized, states.activations, states.labels
            )


class ClassifierCollator:
    """Rows with pooled states, token ids or text -> a batch.

    Args:
        tokenizer: for texts.
        pad_id: token id to pad with; padding is masked, so that a tokenizer without a pad token will do.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, pad_id: int = 0) -> None:
        self.tokenizer, self.pad_id = tokenizer, pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        first = rows[0]
        batch: dict[str, Any] = {}
        if "pooled" in first:
            batch["pooled"] = torch.stack([torch.as_tensor(row["pooled"]) for row in rows])
        elif "input_ids" in first:
            batch.update(self._pad([_unpadded(row) for row in rows]))
        elif self.tokenizer is None:
            raise ValueError("texts can't be batched without a tokenizer: set model.tokenizer, or use pooled states")
        else:
            batch.update(self._pad(self.tokenizer([row["text"] for row in rows], verbose=False)["input_ids"]))
        if "labels" in first or "label" in first:
            batch["labels"] = torch.tensor([_label_of(row) for row in rows])
        return batch

    def _pad(self, ids: Sequence[list[int]]) -> dict[str, Tensor]:
        batch = collate_prompts([(row, 0, len(row)) for row in ids], self.pad_id)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def _unpadded(row: Mapping[str, Any]) -> list[int]:
    ids = torch.as_tensor(row["input_ids"])
    return ids[torch.as_tensor(row["attention_mask"]).bool()].tolist() if "attention_mask" in row else ids.tolist()


def _cached(model: RegularizedSequenceClassifier, dataset: Any) -> Any:
    if dataset is None or isinstance(dataset, PooledStates) or "pooled" in dataset[0]:
        return dataset
    return _pool(model, dataset)


def _pool(model: RegularizedSequenceClassifier, dataset: Any) -> PooledStates:
    labels = _labels_of(dataset)
    if "text" in dataset[0]:
        return model.pooled_states([row["text"] for row in dataset], labels)
    collate = ClassifierCollator(None, model.config.pad_id)
    pooled, activations = [], []
    with torch.inference_mode(), progress("pooled states", len(dataset), "texts") as advance:
        for start in range(0, len(dataset), _POOL_BATCH):
            rows = [dataset[i] for i in range(start, min(start + _POOL_BATCH, len(dataset)))]
            batch = collate([{"input_ids": _unpadded(row)} for row in rows])
            states, maxima = model.pool(*(batch[name].to(model.device) for name in ("input_ids", "attention_mask")))
            pooled.append(states.cpu())
            activations.append(maxima.cpu())
            advance(len(rows))
    # Copies: tensors of inference mode could not be trained on.
    return PooledStates(
        torch.cat(pooled).clone(),
        torch.cat(activations).clone(),
        torch.tensor([int(label) for label in labels]),
        removed=model.config.remove_unintended,
    )


def _check_removal(dataset: Any, model: RegularizedSequenceClassifier, name: str) -> None:
    """Cached states must be those that the classifier will see later."""
    removes = model.config.remove_unintended
    known = dataset.removed if isinstance(dataset, PooledStates) else None
    if known is not None and known != removes and model.config.num_unintended:
        raise ValueError(
            f"{name} holds states {'with' if known else 'without'} the unintended features removed, but the model has "
            f"remove_unintended={removes}: make them anew with model.pooled_states"
        )


def _label_of(row: Mapping[str, Any]) -> int:
    return int(row["labels"] if "labels" in row else row["label"])


def _labels_of(dataset: Any) -> list[Any]:
    if isinstance(dataset, PooledStates):
        return dataset.labels.tolist()
    name = "labels" if "labels" in dataset[0] else "label"
    return [row[name] for row in dataset]


def _check_dataset(dataset: Any, num_labels: int, name: str, *, training: bool) -> list[int]:
    """Labels of a dataset, after checks that would otherwise fail deep inside the first step."""
    if dataset is None:
        return []
    is_stream = not isinstance(dataset, Sized)
    if is_stream:
        raise ValueError(f"{name} is a stream: the standardisation and the dependence term need all of it at once")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    columns = dataset[0].keys()
    if not {"text", "input_ids", "pooled"} & set(columns):
        raise ValueError(f"{name} needs a column 'text', 'input_ids' or 'pooled'; it has {', '.join(columns)}")
    if not {"label", "labels"} & set(columns):
        raise ValueError(f"{name} needs a column 'label' or 'labels'; it has {', '.join(columns)}")
    labels = class_ids(_labels_of(dataset), num_labels, name)
    if training and len(set(labels)) < 2:
        raise ValueError(f"{name} holds one label only ({labels[0]}): there is nothing to tell apart")
    return labels


def _class_weights(args: RegularizedTrainingArguments, labels: list[int], num_labels: int) -> Tensor | None:
    if args.class_weights is None:
        return None
    weights = args.label_weights()
    if weights is None:
        counts = torch.bincount(torch.tensor(labels), minlength=num_labels).clamp_min(1)
        return len(labels) / (num_labels * counts.float())
    if len(weights) != num_labels:
        raise ValueError(f"class_weights has {len(weights)} weights, the model has {num_labels} labels")
    return torch.tensor(weights, dtype=torch.float32)
