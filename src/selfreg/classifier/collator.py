"""Rows of a dataset -> batches, and -> pooled states."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfreg.activations.conversation import render_pair
from selfreg.activations.prompt import collate_prompts
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.shares import pooled_in_shares
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import as_targets
from selfreg.utils.progress import progress
from selfreg.utils.sharding import without_gradient

_POOL_BATCH = 32
_NUMBERS = ("weight", "margin")
"""Columns of one number a text that training may use: weight in the loss, and margin of a pair."""


class ClassifierCollator:
    """Rows with pooled states, token ids, text or pairs of texts -> a batch.

    Of pairs the batch holds all chosen sides first and then all rejected ones, as TRL's does.

    Args:
        tokenizer: for texts.
        pad_id: token id to pad with; padding is masked, so that a tokenizer without a pad token will do.
        template: of the classifier: how a pair's messages become text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, pad_id: int = 0, template: str | None = None
    ) -> None:
        self.tokenizer, self.pad_id, self.template = tokenizer, pad_id, template

    @classmethod
    def of(cls, model: RegularizedSequenceClassifier) -> "ClassifierCollator":
        """The one that fits a classifier."""
        return cls(model.tokenizer, model.config.pad_id, model.config.template)

    def __call__(self, rows: Sequence[Mapping[str, Any]] | PooledStates) -> dict[str, Tensor]:
        if isinstance(rows, PooledStates):
            return rows.columns()
        first = rows[0]
        batch: dict[str, Any] = {}
        if "pooled" in first:
            batch["pooled"] = torch.stack([torch.as_tensor(row["pooled"]) for row in rows])
        elif "input_ids" in first:
            batch.update(self._pad([unpadded(row) for row in rows]))
        else:
            batch.update(self._pad(self.token_ids(rows)))
        if "chosen" in first:
            # Which side is the better one is the label; a Trainer takes rows without labels for rows without a loss.
            batch["labels"] = torch.zeros(len(rows), dtype=torch.long)
        elif "labels" in first or "label" in first:
            batch["labels"] = torch.stack([torch.as_tensor(label_of(row)) for row in rows])
        for name in _NUMBERS:
            if first.get(name) is not None:
                batch[name] = torch.tensor([float(row[name]) for row in rows])
        return batch

    def token_ids(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Of texts; or of all chosen sides and then of all rejected ones."""
        if self.tokenizer is None:
            raise ValueError("texts can't be batched without a tokenizer: set model.tokenizer, or use pooled states")
        if "chosen" in rows[0]:
            pairs = [render_pair(self.tokenizer, row, self.template) for row in rows]
            texts = [pair[side] for side in (0, 1) for pair in pairs]
        else:
            texts = [row["text"] for row in rows]
        ids: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        return ids

    def _pad(self, ids: Sequence[list[int]]) -> dict[str, Tensor]:
        batch = collate_prompts([(row, 0, len(row)) for row in ids], self.pad_id)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def unpadded(row: Mapping[str, Any]) -> list[int]:
    """Token ids of a row without its padding."""
    ids = torch.as_tensor(row["input_ids"])
    return ids[torch.as_tensor(row["attention_mask"]).bool()].tolist() if "attention_mask" in row else ids.tolist()


def label_of(row: Mapping[str, Any]) -> Any:
    return row["labels"] if "labels" in row else row["label"]


def labels_of(dataset: Any) -> Any:
    """Of all rows; None for pairs, where the chosen side is the label."""
    if isinstance(dataset, PooledStates):
        return dataset.labels
    return None if "chosen" in dataset[0] else [label_of(row) for row in dataset]


def numbers_of(dataset: Any, name: str) -> Any:
    """A column of numbers, if there is one: `weight` or `margin`.

    Raises:
        ValueError: some rows have none, or one is no finite number.
    """
    if isinstance(dataset, PooledStates):
        return dataset.columns().get(name)
    values = [row.get(name) for row in dataset]
    if all(value is None for value in values):
        return None
    for number, value in enumerate(values):
        if isinstance(value, str) or value is None or not math.isfinite(float(value)):
            raise ValueError(f"row {number} has {name}={value!r}: give every row a number, or none of them")
    return [float(value) for value in values]


def pooled_dataset(model: RegularizedSequenceClassifier, dataset: Any) -> PooledStates:
    """Runs the backbone over every row once, each process over its share."""
    return pooled_in_shares(partial(_pooled, model), dataset)


def _pooled(model: RegularizedSequenceClassifier, dataset: Any) -> PooledStates:
    options: dict[str, Any] = {"weights": numbers_of(dataset, "weight"), "margins": numbers_of(dataset, "margin")}
    if "chosen" in dataset[0]:
        assert model.tokenizer is not None
        pairs = [render_pair(model.tokenizer, row, model.config.template) for row in dataset]
        return model.pooled_states([text for pair in pairs for text in pair], None, **options)
    if "text" in dataset[0]:
        return model.pooled_states([row["text"] for row in dataset], labels_of(dataset), **options)
    collate = ClassifierCollator(None, model.config.pad_id)
    pooled, activations = [], []
    was_training = model.training
    model.eval()
    with without_gradient(model.backbone), progress("pooled states", len(dataset), "texts") as advance:
        for start in range(0, len(dataset), _POOL_BATCH):
            rows = [dataset[i] for i in range(start, min(start + _POOL_BATCH, len(dataset)))]
            batch = collate([{"input_ids": unpadded(row)} for row in rows])
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            # Its forward pass: another would find no weights where FSDP has dealt them out.
            outputs = model(**inputs, output_pooled=True)
            pooled.append(outputs.pooled.cpu())
            activations.append(outputs.unintended_activations.cpu())
            advance(len(rows))
    model.train(was_training)
    weights = options["weights"]
    # Copies: tensors of inference mode could not be trained on.
    return PooledStates(
        torch.cat(pooled).clone(),
        torch.cat(activations).clone(),
        as_targets(model.task, labels_of(dataset), model.score.out_features, "labels"),
        removed=model.config.remove_unintended,
        weights=None if weights is None else torch.tensor(weights),
    )
