"""PooledStates: all that a frozen backbone has to say about a set of texts, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PooledStates:
    """A dataset for `RegularizedTrainer`. Shapes: N texts, D hidden size, U unintended features, L labels.

    For pairs (`preference`) each of the N rows has two sides, the chosen one first.

    Attributes:
        pooled (`[N, D]`, pairs `[N, 2, D]`): one raw state a text, as the head would get it (after removal, if the
            model removes).
        activations (`[N, U]`, pairs `[N, 2, U]`): largest activation of each unintended feature over the tokens of
            each text.
        labels: `[N]`, int64 (single label); `[N, L]` of 0 and 1 (many labels); `[N]` (regression); `[N]` zeros
            (pairs).
        removed (`bool`, *optional*): whether the unintended features were removed; None where it is not known.
        weights (`[N]`, *optional*): weight of each text in the loss.
        margins (`[N]`, *optional*): of pairs: by how much the chosen side should win at least.
        offsets (`[N, L]`, *optional*): added to the logits in training; see `unintended_offsets`.
    """

    pooled: Tensor
    activations: Tensor
    labels: Tensor
    removed: bool | None = None
    weights: Tensor | None = None
    margins: Tensor | None = None
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.pooled) == len(self.activations) == len(self.labels):
            raise ValueError(
                f"{len(self.pooled)} pooled states, {len(self.activations)} rows of activations and "
                f"{len(self.labels)} labels: they must be as many"
            )
        for name in ("weights", "margins", "offsets"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.pooled):
                raise ValueError(f"{len(values)} {name} for {len(self.pooled)} texts: they must be as many")

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: rows[index] for name, rows in self.columns().items()}

    def __getitems__(self, indices: Sequence[int]) -> "PooledStates":
        # A batch at once: taken apart into rows and stacked again it would cost more than the step.
        return self.select(indices)

    def columns(self) -> dict[str, Tensor]:
        """What a step needs of the rows, by name."""
        columns = {
            "pooled": self.pooled,
            "labels": self.labels,
            "weight": self.weights,
            "margin": self.margins,
            "offset": self.offsets,
        }
        return {name: rows for name, rows in columns.items() if rows is not None}

    @property
    def are_pairs(self) -> bool:
        return self.pooled.ndim == 3

    @property
    def compared(self) -> tuple[Tensor, Tensor]:
        """States `[N, D]` and activations `[N, U]` that the decision is about: of pairs, chosen less rejected."""
        if not self.are_pairs:
            return self.pooled, self.activations
        return self.pooled[:, 0] - self.pooled[:, 1], self.activations[:, 0] - self.activations[:, 1]

    def select(self, indices: Any) -> "PooledStates":
        """The rows `indices`."""
        rows = torch.as_tensor(indices)
        changed: dict[str, Any] = {
            name: values[rows]
            for name in ("pooled", "activations", "labels", "weights", "margins", "offsets")
            if (values := getattr(self, name)) is not None
        }
        return replace(self, **changed)
