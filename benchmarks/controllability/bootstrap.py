"""Paired bootstrap of the difference between two methods, over eval texts and over seeds.

Texts stand in the eval sets of several seeds, and a text that is hard for one seed is hard for the others: so a
resample draws texts once for all seeds, and seeds beside them (the pigeonhole bootstrap, Owen 2007). Both methods are
measured on the same resample.

Shapes: B resamples, S units (seeds), n texts of a unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

MIN_CELL = 10
"""Texts that a (label, group) cell needs before it counts as a group; as in `worst_group_accuracy`."""
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """What one seed (of a cross-validation: all of its folds) says of two methods on the same texts.

    Attributes:
        rows (`[n]`): numbers of the texts in their pool.
        labels (`[n]`), groups (`list`): of each.
        right (`[n]`), reference (`[n]`): whether either method is right.
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    groups: Sequence[Any]
    right: Bools
    reference: Bools

    def cells(self) -> list[npt.NDArray[np.int64]]:
        """Places of the texts of every (label, group) cell that is large enough."""
        found: dict[tuple[int, Any], list[int]] = {}
        for place, (label, group) in enumerate(zip(self.labels.tolist(), self.groups, strict=True)):
            if group is not None:
                found.setdefault((label, group), []).append(place)
        return [np.array(places) for places in found.values() if len(places) >= MIN_CELL]


@dataclass(frozen=True)
class Difference:
    """A method less its reference.

    Attributes:
        difference (`float`): mean over units.
        low, high (`float`): 95 % interval.
        reference_error (`float`): standard error of the reference's own mean.
    """

    difference: float
    low: float
    high: float
    reference_error: float


Figure = Callable[[Unit, Bools, Floats], Floats]
"""unit, which are right `[n]`, how often each text counts `[B, n]` -> `[B]`."""


def accuracy(unit: Unit, right: Bools, weights_Bn: Floats) -> Floats:
    return weights_Bn @ right / weights_Bn.sum(axis=1)


def f1(unit: Unit, right: Bools, weights_Bn: Floats) -> Floats:
    """Of label 1, where there are two labels."""
    positive = unit.labels == 1
    hits = weights_Bn @ (right & positive)
    return 2 * hits / np.maximum(2 * hits + weights_Bn @ ~right, 1e-12)


def worst_group_accuracy(unit: Unit, right: Bools, weights_Bn: Floats) -> Floats:
    """Smallest accuracy over (label, group) cells; NaN where no cell is large enough."""
    smallest = np.full(len(weights_Bn), np.inf)
    for places in unit.cells():
        weights = weights_Bn[:, places]
        total = weights.sum(axis=1)
        # A resample may miss a small cell: it then says nothing of it.
        own = np.divide(weights @ right[places], total, out=np.full(len(total), np.inf), where=total > 0)
        smallest = np.minimum(smallest, own)
    return np.where(np.isfinite(smallest), smallest, np.nan)


FIGURES: dict[str, Figure] = {"accuracy": accuracy, "f1": f1, "worst_group_accuracy": worst_group_accuracy}


def value(unit: Unit, figure: str) -> float | None:
    """A figure of the method of a unit, over all of its texts; None where it does not apply."""
    found = float(FIGURES[figure](unit, unit.right, np.ones((1, len(unit.rows))))[0])
    return None if np.isnan(found) else found


def compare(units: Sequence[Unit], figure: str, *, resamples: int = 1_000, seed: int = 0) -> Difference | None:
    """The difference in a figure between the two methods of `units`; None where the figure does not apply."""
    measure = FIGURES[figure]
    texts = np.unique(np.concatenate([unit.rows for unit in units]))
    rng = np.random.default_rng([seed, 1])
    counts_BT = _counts(len(texts), resamples, seed)
    drawn_BS = rng.integers(0, len(units), size=(resamples, len(units)))
    whole: list[float] = []
    ours, theirs = np.empty(drawn_BS.shape), np.empty(drawn_BS.shape)
    for number, unit in enumerate(units):
        weights = counts_BT[:, np.searchsorted(texts, unit.rows)]
        ones = np.ones((1, len(unit.rows)))
        whole.append(float(measure(unit, unit.right, ones)[0] - measure(unit, unit.reference, ones)[0]))
        ours[:, number] = measure(unit, unit.right, weights)
        theirs[:, number] = measure(unit, unit.reference, weights)
    if np.isnan(whole).any():
        return None
    differences = np.take_along_axis(ours - theirs, drawn_BS, axis=1).mean(axis=1)
    references = np.take_along_axis(theirs, drawn_BS, axis=1).mean(axis=1)
    low, high = np.nanquantile(differences, [0.025, 0.975])
    return Difference(float(np.mean(whole)), float(low), float(high), float(np.nanstd(references)))


@lru_cache(maxsize=2)
def _counts(texts: int, resamples: int, seed: int) -> Floats:
    """How often each text is drawn, `[B, texts]`: the same for all methods that are compared on an eval set."""
    rng = np.random.default_rng([seed, 0])
    return rng.multinomial(texts, np.full(texts, 1 / texts), size=resamples).astype(np.float64)
