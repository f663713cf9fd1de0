"""How well features tell a labelled attribute of the texts, within each label."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MIN_ACTIVE = 5
_FEW_TEXTS = 10

logger = logging.getLogger(__name__)


def attribute_reason(group: Any, groups: list[Any], auc: float) -> str:
    """Why a feature was chosen, for a reader."""
    if len(groups) == 2:
        # Of the group that it fires for, which is the one that a reader asks about.
        other = next(value for value in groups if value != group)
        more, less = (group, other) if auc >= 0.5 else (other, group)
        return f"fires for {more!r} rather than {less!r} within a label: AUC {max(auc, 1 - auc):.3f}"
    return f"fires {'more' if auc >= 0.5 else 'less'} for {group!r} than for the rest within a label: AUC {auc:.3f}"


def has_two_groups(attribute: Sequence[Any], labels: Sequence[Any]) -> bool:
    """Whether some label has texts of two groups, without which the attribute can't be told apart from the label."""
    found: dict[Any, set[Any]] = {}
    for group, label in zip(attribute, labels, strict=True):
        if group is not None:
            found.setdefault(label, set()).add(group)
    return any(len(groups) > 1 for groups in found.values())


def attribute_strength(
    activations: NDArray[np.floating[Any]], attribute: Sequence[Any], labels: Sequence[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Any]]:
    """How well each feature tells the group of a text among texts of the same label.

    Args:
        activations: `[texts, features]`.
        attribute, labels: one of each for every text.

    Returns:
        AUC averaged over labels, weighted by the smaller group, `[features]`; its two-sided p-value (normal
        approximation of the Mann-Whitney statistic, with ties; 1 for a feature that is active in fewer than 5 of the
        texts); and the group that it is about. With more than two groups each is told from the rest, the one furthest
        from 0.5 counts, and p is multiplied by their number.

    Raises:
        ValueError: no label has texts of two groups.
    """
    from scipy.stats import norm

    known = np.array([value is not None for value in attribute])
    groups, labels_array = np.array(attribute, dtype=object), np.array(labels, dtype=object)
    values = sorted({str(value): value for value in groups[known]}.items())
    # With two groups, one against the rest says everything already.
    targets = [value for _, value in values][-1:] if len(values) == 2 else [value for _, value in values]
    num_features = activations.shape[1]
    best = np.full(num_features, 0.5)
    p_best = np.ones(num_features)
    which: list[Any] = [targets[0] if targets else None] * num_features
    usable = False
    for target in targets:
        total = np.zeros(num_features)
        variance = np.zeros(num_features)
        active = np.zeros(num_features, dtype=int)
        weights = 0.0
        for label in {str(value): value for value in labels_array}.values():
            rows = known & (labels_array == label)
            positive = (groups[rows] == target).astype(bool)
            smaller = min(positive.sum(), (~positive).sum())
            if smaller == 0:
                continue
            auc, var = _auc_and_variance(activations[rows], positive)
            total += smaller * auc
            variance += smaller**2 * var
            active += (activations[rows] != 0).sum(axis=0)
            weights += smaller
        if weights == 0:
            continue
        usable = True
        if weights < _FEW_TEXTS:
            logger.warning(
                "%d texts tell %r from the rest within a label: too few to tell features of it from chance",
                int(weights),
                target,
            )
        mean = total / weights
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(variance > 0, np.abs(total - 0.5 * weights) / np.sqrt(variance), 0.0)
        z[active < _MIN_ACTIVE] = 0.0
        p = np.minimum(1.0, 2 * norm.sf(z) * len(targets))
        better = np.abs(mean - 0.5) > np.abs(best - 0.5)
        best, p_best = np.where(better, mean, best), np.where(better, p, p_best)
        which = [target if b else old for b, old in zip(better, which, strict=True)]
    if not usable:
        raise ValueError("no label has texts of two groups: the attribute can't be told apart from the label")
    return best, p_best, which


def _auc_and_variance(
    activations: NDArray[np.floating[Any]], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from scipy.stats import rankdata

    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    n = n_pos + n_neg
    ranks = rankdata(activations, axis=0)
    auc = (ranks[positive].sum(axis=0) - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
    # Under no difference, the rank sum is that of n_pos draws from these ranks without replacement; ties included.
    variance = ranks.var(axis=0) * n_pos * n_neg / (n - 1) / (n_pos * n_neg) ** 2
    return auc, variance
