"""What a RegularizedTrainer works out of its training set before the first step."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import Dataset

from selfreg.classifier.arguments import AUTO
from selfreg.classifier.collator import labels_of, numbers_of, pooled_dataset
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.path import UNIT, WeightPath, resolve_weights
from selfreg.classifier.ridge import RidgeChoice, choose_ridge
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import as_targets
from selfreg.classifier.training_args import RegularizedTrainingArguments

logger = logging.getLogger(__name__)

OFFSET = "unintended_offset"
"""Column that training adds to rows: what the unintended features say of each."""
OWN_UNUSED = {
    "compute_loss_func": "the loss is that of the task; subclass RegularizedTrainer and override loss_of",
}
STOCK_UNUSED = {
    "class_weights": "a stock model works out its loss itself: pass compute_loss_func",
    "offset_weight": "it is for a RegularizedSequenceClassifier with a frozen backbone",
    "logit_decay": "a stock model works out its loss itself",
    "ridge": "it is for a RegularizedSequenceClassifier; a stock model has weight_decay",
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

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        many = getattr(self.rows, "__getitems__", None)
        rows = [self.rows[i] for i in indices] if many is None else many(indices)
        return [{**row, OFFSET: self.offsets[i]} for row, i in zip(rows, indices, strict=True)]


class OffsetCollator:
    """Another collator, which need not know of offsets, for rows that have them.

    Args:
        collator: makes a batch of the rows without them.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        offsets = torch.stack([row[OFFSET] for row in rows])
        batch = self.collator([{name: value for name, value in row.items() if name != OFFSET} for row in rows])
        return {**batch, "offset": offsets}


def beside_offsets(dataset: Any, collator: Any, offsets: Tensor) -> tuple[Any, Any]:
    """The data set and its collator with offsets, neither of which need know of them."""
    if isinstance(dataset, PooledStates):
        return replace(dataset, offsets=offsets), collator
    return RowsWithOffsets(dataset, offsets), OffsetCollator(collator)


def check_offset(args: RegularizedTrainingArguments, model: RegularizedSequenceClassifier, dataset: Any) -> None:
    """
    Raises:
        ValueError: there is an offset, and states move or the features' activations are not known; or a ridge is to
            be chosen, and states move.
    """
    if args.ridge == AUTO and not model.backbone_is_frozen:
        raise ValueError("ridge='auto' needs states that stay as they are: train no adapter, or give a number")
    if not args.offset_weight:
        return
    if not model.backbone_is_frozen:
        raise ValueError(
            f"offset_weight={args.offset_weight} needs states that stay as they are: train no adapter, or set "
            "offset_weight=0"
        )
    if not knows_features(dataset):
        raise ValueError(
            f"offset_weight={args.offset_weight} needs the features' activations: rows of pooled states with "
            "'unintended_activations', or a PooledStates, which model.pooled_states makes"
        )


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
    resolved, path = resolve_weights(model, args, states)
    numbers = ", ".join(f"{name}={getattr(resolved, name):g}" for name in auto)
    logger.info("chosen by validation loss: %s", numbers)
    return resolved, path


def chosen_ridge(
    model: RegularizedSequenceClassifier, args: RegularizedTrainingArguments, states: PooledStates
) -> RidgeChoice:
    """`choose_ridge`, the same for all processes."""
    choices = [choose_ridge(model, states, args)]
    if args.world_size > 1:
        # Rounding differs between machines, and a loss has one ridge.
        broadcast_object_list(choices)
    logger.info("ridge=%g chosen by cross-validation: %s", choices[0].ridge, choices[0].losses)
    return choices[0]


def stacked(model: RegularizedSequenceClassifier, dataset: Any, *, needs_activations: bool) -> PooledStates:
    """Rows of `pooled`, `labels`, `unintended_activations`, and of `weight` and `margin` where there are, as one.

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
    numbers = {name: numbers_of(rows, name) for name in ("weight", "margin")}
    weights, margins = (None if given is None else torch.tensor(given) for given in numbers.values())
    return PooledStates(pooled, activations, labels, weights=weights, margins=margins)
