"""The figures of `metrics.py` for pairs, many labels and targets on a scale.

Pure functions of arrays. Letters in shapes: N texts (or pairs), L labels (logits), d hidden size, U unintended
    features.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from selfreg.evaluation.arrays import Groups, as_matrix, of_known_group
from selfreg.evaluation.metrics import group_gap, leakage, worst_group_accuracy
from selfreg.evaluation.reliance import reliance_figures

Figures = dict[str, float | None]


def evaluate_pairs(scores: npt.ArrayLike, groups: Groups | None, **reliance: Any) -> Figures:
    """Figures of a score on pairs.

    `accuracy`: the share of pairs whose chosen side has the higher score; a tie counts as wrong. The group figures are
    over pairs: `worst_group_accuracy` by group, `group_gap` the largest difference between groups in accuracy,
    `leakage` how well the difference of the scores tells the group. Use and dependence are of that difference. There
    is one class, so that `f1` and `auc` do not apply.

    Args:
        scores: `[N, 2]`, the chosen side first.
        groups: `[N]`, of each pair.
        reliance: `pooled [N, d]`, `activations [N, U]` (of pairs: chosen less rejected), `weight [1, d]`, `directions
            [U, d]`; any may be left out.
    """
    scores_N2 = as_matrix("scores", scores, columns=2)
    margin_N1 = scores_N2[:, :1] - scores_N2[:, 1:]
    right_N = (margin_N1[:, 0] > 0).astype(np.int64)
    figures: Figures = {"accuracy": float(right_N.mean()), "f1": None, "auc": None}
    figures |= _no_groups()
    ones = np.ones_like(right_N)
    if groups is not None:
        figures["worst_group_accuracy"] = worst_group_accuracy(right_N, ones, groups)
        figures["group_gap"] = group_gap(right_N, ones, groups)
        figures["leakage"] = leakage(margin_N1, ones, groups)
    return figures | reliance_figures(margin_N1, ones, **reliance)


def evaluate_multi_label(
    logits: npt.ArrayLike, labels: npt.ArrayLike, groups: Groups | None, *, mask: Any = None, **reliance: Any
) -> Figures:
    """Figures where each of several labels is there or not.

    `accuracy`: the share of right decisions over all texts and labels; `f1`, `auc`: scikit-learn's, macro over labels
    (`auc` over those that occur and don't always occur). Of the group figures each label is looked at by itself:
    `worst_group_accuracy` is the smallest over (label, there or not, group) cells, `group_gap` the largest, `leakage`
    and `unintended_dependence` the mean over labels.

    Args:
        logits: `[N, L]`; a label is predicted where its logit is over 0.
        labels: `[N, L]` of 0 and 1.
        groups: `[N]`.
        mask: `[L, U]`, for which labels each feature is unintended.
        reliance: as for `evaluate_pairs`, with `weight [L, d]`.
    """
    from sklearn.metrics import f1_score, roc_auc_score

    logits_NL = as_matrix("logits", logits)
    labels_NL = as_matrix("labels", labels, rows=len(logits_NL), columns=logits_NL.shape[1]).astype(np.int64)
    predicted_NL = (logits_NL > 0).astype(np.int64)
    both = [y for y in range(labels_NL.shape[1]) if 0 < labels_NL[:, y].mean() < 1]
    aucs = [float(roc_auc_score(labels_NL[:, y], logits_NL[:, y])) for y in both]
    figures: Figures = {
        "accuracy": float((predicted_NL == labels_NL).mean()),
        "f1": float(f1_score(labels_NL, predicted_NL, average="macro", zero_division=0.0)),
        "auc": float(np.mean(aucs)) if aucs else None,
    }
    figures |= _no_groups()
    columns = range(labels_NL.shape[1])
    if groups is not None:
        worst = [worst_group_accuracy(predicted_NL[:, y], labels_NL[:, y], groups) for y in columns]
        gaps = [group_gap(predicted_NL[:, y], labels_NL[:, y], groups) for y in columns]
        leaks = [leakage(logits_NL[:, y : y + 1], labels_NL[:, y], groups) for y in columns]
        figures["worst_group_accuracy"] = min((value for value in worst if value is not None), default=None)
        figures["group_gap"] = max((value for value in gaps if value is not None), default=None)
        known = [value for value in leaks if value is not None]
        figures["leakage"] = float(np.mean(known)) if known else None
    parts = []
    for y in columns:
        own = None if mask is None else np.asarray(mask)[y : y + 1]
        part = dict(reliance)
        if part.get("weight") is not None:
            part["weight"] = as_matrix("weight", part["weight"])[y : y + 1]
        parts.append(reliance_figures(logits_NL[:, y : y + 1], labels_NL[:, y], mask=own, **part))
    for name in ("unintended_use", "unintended_dependence"):
        found = [value for part in parts if (value := part[name]) is not None]
        figures[name] = float(np.mean(found)) if found else None
    return figures


def evaluate_regression(
    predictions: npt.ArrayLike, targets: npt.ArrayLike, groups: Groups | None, **reliance: Any
) -> Figures:
    """Figures of a prediction on a scale.

    `r2` and `mae`: scikit-learn's. The figures of labels do not apply, but for `leakage`: how well the error, after a
    straight line in the target is taken off, tells the group; 2·|AUC - 0.5|, over groups, weighted by the smaller
    side.

    Args:
        predictions: `[N]`.
        targets: `[N]`.
        groups: `[N]`.
        reliance: as for `evaluate_pairs`.
    """
    from sklearn.metrics import mean_absolute_error, r2_score

    targets_N = np.asarray(targets, dtype=np.float64)
    predictions_N1 = as_matrix("predictions", np.asarray(predictions).reshape(-1, 1), rows=len(targets_N))
    figures: Figures = {"accuracy": None, "f1": None, "auc": None}
    figures |= _no_groups()
    if groups is not None:
        line = np.polynomial.Polynomial.fit(targets_N, predictions_N1[:, 0], 1) if np.ptp(targets_N) > 0 else None
        error_N = predictions_N1[:, 0] - (line(targets_N) if line is not None else 0.0)
        figures["leakage"] = leakage(error_N[:, None], np.zeros(len(targets_N), dtype=np.int64), groups)
    figures |= reliance_figures(predictions_N1, targets_N, **reliance)
    figures["r2"] = float(r2_score(targets_N, predictions_N1[:, 0]))
    figures["mae"] = float(mean_absolute_error(targets_N, predictions_N1[:, 0]))
    return figures


def regression_cells(
    predictions: npt.ArrayLike, targets: npt.ArrayLike, groups: Groups
) -> list[dict[str, str | int | float]]:
    """Size and mean absolute error of every group."""
    targets_N = np.asarray(targets, dtype=np.float64)
    errors_N1 = np.abs(np.asarray(predictions, dtype=np.float64).reshape(-1) - targets_N)[:, None]
    zeros = np.zeros(len(targets_N), dtype=np.int64)
    _, codes_M, names, errors_M1 = of_known_group(zeros, groups, errors_N1)
    return [
        {"group": name, "n": int((codes_M == code).sum()), "mae": float(errors_M1[codes_M == code].mean())}
        for code, name in enumerate(names)
    ]


def _no_groups() -> Figures:
    return dict.fromkeys(("worst_group_accuracy", "group_gap", "leakage"))
