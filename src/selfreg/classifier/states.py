"""PooledStates: all that a frozen backbone has to say about a set of texts, computed once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PooledStates:
    """A dataset for `RegularizedTrainer`. Shapes: N texts, D hidden size, U unintended features.

    Attributes:
        pooled (`[N, D]`): one raw state a text, as the head would get it (after removal, if the model removes).
        activations (`[N, U]`): largest activation of each unintended feature over the tokens of each text.
        labels (`[N]`, int64).
        removed (`bool`, *optional*): whether the unintended features were removed; None where it is not known.
    """

    pooled: Tensor
    activations: Tensor
    labels: Tensor
    removed: bool | None = None

    def __post_init__(self) -> None:
        if not len(self.pooled) == len(self.activations) == len(self.labels):
            raise ValueError(
                f"{len(self.pooled)} pooled states, {len(self.activations)} rows of activations and "
                f"{len(self.labels)} labels: they must be as many"
            )

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pooled": self.pooled[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        return [self[index] for index in indices]

    def select(self, indices: Any) -> "PooledStates":
        """The rows `indices`."""
        rows = torch.as_tensor(indices)
        return replace(self, pooled=self.pooled[rows], activations=self.activations[rows], labels=self.labels[rows])


def class_ids(labels: Iterable[Any], num_labels: int, name: str) -> list[int]:
    """Labels as class ids; `name` is what the error calls them.

    Raises:
        ValueError: one is no whole number, or the model has no such label.
    """
    ids = []
    for row, label in enumerate(labels):
        is_id = isinstance(label, int | float | Tensor | np.generic) and float(label).is_integer()
        if not is_id or not 0 <= int(label) < num_labels:
            raise ValueError(
                f"{name}: label {label!r} in row {row} is no class id; the model has labels 0 to {num_labels - 1}"
            )
        ids.append(int(label))
    return ids
