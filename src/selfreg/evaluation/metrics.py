"""What a controlled classifier is measured by: scores, group figures, and its reliance on unintended features.

Pure functions of arrays. Letters in shapes: N texts, L labels (logits), d hidden size, U unintended features.

The free constant of a softmax: adding the same number to all logits of a text changes no prediction and no loss, so
scores are compared between texts as log odds here, where that constant is out.
"""

from typing import TypedDict

import numpy as np
import numpy.typing as npt

from selfreg.evaluation.arrays import FloatArray, Groups, IntArray, as_matrix, cells, labels_of, of_known_group
from selfreg.evaluation.reliance import reliance_figures, unintended_dependence, unintended_use

__all__ = [
    "GroupCell",
    "classification_scores",
    "evaluate_predictions",
    "group_cells",
    "group_gap",
    "leakage",
    "unintended_dependence",
    "unintended_use",
    "worst_group_accuracy",
]

MIN_CELL = 10
"""Rows that a (label, group) cell needs before its accuracy counts in `worst_group_accuracy`."""


class GroupCell(TypedDict):
    """Accuracy among the texts of one true label and one group, with its interval."""

    label: int
    group: str | int
    n: int
    accuracy: float
    low: float
    high: float


def evaluate_predictions(
    *,
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: Groups | None = None,
    pooled: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    directions: npt.ArrayLike | None = None,
    activations: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
) -> dict[str, float | None]:
    """Every figure of one classifier on one set of texts, under the keys (and in the order) of `metrics.json`.

    Args:
        logits: `[N, L]`, L of 2 or more.
        labels: `[N]` integers in 0..L-1.
        groups: `[N]` names or whole numbers; None (or NaN) where the group of a text is not known. Such texts are
            left out of the group figures and stay in the others.
        pooled: `[N, d]` pooled states as the head sees them (after a removal or an erasure).
        weight: `[L, d]` weights of the head, in the space of `pooled`.
        directions: `[U, d]` decoder directions of the unintended features.
        activations: `[N, U]` largest activation of each unintended feature in each text.
        mask: `[L, U]`, for which labels each feature is unintended; None: each for all.

    Returns:
        accuracy, f1, auc, worst_group_accuracy, group_gap, leakage, unintended_use, unintended_dependence. None where
        a figure does not apply: no groups, no `pooled`/`weight`/`directions`, no `activations` (or fewer texts than
        folds), or the reasons that each function names.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, labels or groups that are not what is said above.
    """
    logits_NL = as_matrix("logits", logits)
    labels_N = labels_of(labels, logits_NL)
    num_texts, num_labels = logits_NL.shape
    predictions = logits_NL.argmax(axis=1)
    figures = classification_scores(logits_NL, labels_N)
    figures |= dict.fromkeys(("worst_group_accuracy", "group_gap", "leakage"))
    if groups is not None:
        figures["worst_group_accuracy"] = worst_group_accuracy(predictions, labels_N, groups)
        figures["group_gap"] = group_gap(predictions, labels_N, groups)
        figures["leakage"] = leakage(logits_NL, labels_N, groups)
    return figures | reliance_figures(
        logits_NL,
        labels_N,
        pooled=None if pooled is None else as_matrix("pooled", pooled, rows=num_texts),
        weight=None if weight is None else as_matrix("weight", weight, rows=num_labels),
        directions=directions,
        activations=activations,
        mask=mask,
    )


# --- Scores ----------------------------------------------------------------------------------------------------------


def classification_scores(logits: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float | None]:
    """scikit-learn's accuracy, F1 and AUC of single-label classification.

    Args:
        logits: `[N, L]`, L of 2 or more; the prediction is the largest.
        labels: `[N]` integers in 0..L-1.

    Returns:
        `accuracy`; `f1`: of label 1 for two labels, else the mean over the labels that occur as truth or prediction
        (0 where it is 0/0); `auc`: of label 1 for two labels, else one against the rest, mean over the labels that
        occur in `labels`. `auc` is None where `labels` holds one label only.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 labels, NaN, or labels out of range.
    """
    from sklearn.metrics import accuracy_score, f1_score

    logits_NL = as_matrix("logits", logits)
    labels_N = labels_of(labels, logits_NL)
    predictions = logits_NL.argmax(axis=1)
    if logits_NL.shape[1] == 2:
        f1 = f1_score(labels_N, predictions, pos_label=1, average="binary", zero_division=0.0)
    else:
        f1 = f1_score(labels_N, predictions, average="macro", zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(labels_N, predictions)),
        "f1": float(f1),
        "auc": _macro_auc(logits_NL, labels_N),
    }


def _macro_auc(logits_NL: FloatArray, labels_N: IntArray) -> float | None:
    present = np.unique(labels_N)
    if len(present) < 2:
        return None
    if logits_NL.shape[1] == 2:
        present = present[1:]  # label 0 against label 1 is the same number
    return float(np.mean([_auc(labels_N == label, _log_odds(logits_NL, label)) for label in present]))


def _auc(positive: npt.NDArray[np.bool_], score: FloatArray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, score))


def _log_odds(logits_NL: FloatArray, label: int) -> FloatArray:
    """log p(label) / (1 - p(label)) under the softmax: its logit less the logsumexp of the others. `[N]`.

    The order is that of the softmax's probability, without the ties that come when probabilities round to 1.
    """
    if logits_NL.shape[1] == 1:
        return logits_NL[:, 0]
    others: FloatArray = np.logaddexp.reduce(np.delete(logits_NL, label, axis=1), axis=1)
    return logits_NL[:, label] - others


# --- Groups ----------------------------------------------------------------------------------------------------------


def worst_group_accuracy(predictions: npt.ArrayLike, labels: npt.ArrayLike, groups: Groups) -> float | None:
    """The smallest accuracy over (label, group) cells of 10 rows or more; None where no cell has 10 rows.

    Args:
        predictions: `[N]` integers.
        labels: `[N]` integers.
        groups: `[N]`, see `evaluate_predictions`.

    Raises:
        ValueError: lengths that differ, or values that are not labels or groups.
    """
    labels_M, codes_M, _, predictions_M = of_known_group(labels, groups, predictions)
    correct = predictions_M == labels_M
    accuracies = [
        float(correct[rows].mean()) for _, _, rows in cells(labels_M, codes_M) if np.count_nonzero(rows) >= MIN_CELL
    ]
    return min(accuracies, default=None)


def group_cells(
    predictions: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: Groups,
    *,
    confidence: float = 0.95,
) -> list[GroupCell]:
    """Size, accuracy and Wilson interval of every (label, group) cell that has a row.

    The interval keeps its width where all rows are right (or all wrong), as it should: ten right answers of ten do not
    show that there are no wrong ones.

    Args:
        predictions: `[N]` integers.
        labels: `[N]` integers.
        groups: `[N]`, see `evaluate_predictions`.
        confidence: of the interval, above 0 and under 1.

    Returns:
        One `GroupCell` a cell, sorted by label, then group.

    Raises:
        ValueError: lengths that differ, values that are not labels or groups, or a confidence out of range.
    """
    from scipy.stats import binomtest

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}: pass 0.95 for a 95 % interval")
    labels_M, codes_M, names, predictions_M = of_known_group(labels, groups, predictions)
    correct = predictions_M == labels_M
    table: list[GroupCell] = []
    for label, code, rows in cells(labels_M, codes_M):
        n, right = int(np.count_nonzero(rows)), int(np.count_nonzero(correct[rows]))
        interval = binomtest(right, n).proportion_ci(confidence, method="wilson")
        table.append(
            GroupCell(
                label=label,
                group=names[code],
                n=n,
                accuracy=right / n,
                low=float(interval.low),
                high=float(interval.high),
            )
        )
    return table


def group_gap(predictions: npt.ArrayLike, labels: npt.ArrayLike, groups: Groups) -> float | None:
    """fairlearn's equalized odds difference: the largest gap between groups in how often a label is predicted.

    For a label k: among the texts whose true label is k, and among the texts whose true label is another, the largest
    less the smallest share (over groups) of texts predicted as k; the larger of the two gaps. fairlearn's function
    knows two labels. For more, each label is set against the rest and the largest gap counts, so that a gap on one
    label is not thinned by those where there is none. For two labels either one gives the same number.

    A group without texts of a true label is left out of that comparison (`equalized_odds_difference` itself would
    count its rate as 0, and so give a perfect classifier a gap of 1). Where every group has texts on either side the
    value is exactly fairlearn's.

    Args:
        predictions: `[N]` integers.
        labels: `[N]` integers.
        groups: `[N]`, see `evaluate_predictions`.

    Returns:
        0 to 1, or None where no two groups can be compared.

    Raises:
        ValueError: lengths that differ, or values that are not labels or groups.
    """
    from fairlearn.metrics import demographic_parity_difference

    labels_M, codes_M, _, predictions_M = of_known_group(labels, groups, predictions)
    values = np.union1d(labels_M, predictions_M)
    gaps = []
    for label in values[1:] if len(values) == 2 else values:
        for rows in (labels_M == label, labels_M != label):
            if len(np.unique(codes_M[rows])) > 1:
                # Among texts of one truth, the gap in selection rate is the gap in true (or false) positive rate.
                predicted = (predictions_M[rows] == label).astype(int)
                truth = (labels_M[rows] == label).astype(int)
                gaps.append(float(demographic_parity_difference(truth, predicted, sensitive_features=codes_M[rows])))
    return max(gaps, default=None)


def leakage(logits: npt.ArrayLike, labels: npt.ArrayLike, groups: Groups) -> float | None:
    """How well the classifier's score tells the group among texts of the same true label.

        sum over (y, g) of m_yg · 2·|AUC_yg − 0.5| / sum of m_yg

    with AUC_yg that of the score for telling group g from the other groups among the texts of true label y, and m_yg
    the smaller of the two sides. 0: nothing; 1: the group can be read off the score.

    The score among texts of true label y is the log odds of y, logit_y − logsumexp of the other logits. It is what
    the classifier says of the right label: it does not move with the softmax's free constant, orders texts as the
    probability of y does, and for two labels is the logit margin itself (up to a sign that |AUC − 0.5| does not see).
    A mean of the other logits would also follow labels that are far from being predicted. What the classifier says of
    wrong labels, the log odds of y being equal, is not looked at.

    In small cells an AUC is off 0.5 by chance: two sides of 20 texts give about 0.15 where there is nothing.

    Args:
        logits: `[N, L]`; with L = 1 the score is the logit itself.
        labels: `[N]` integers in 0..L-1 (any integers for L = 1).
        groups: `[N]`, see `evaluate_predictions`.

    Returns:
        0 to 1, or None where no true label has texts of two groups.

    Raises:
        ValueError: shapes that do not fit, NaN, labels out of range, or values that are not groups.
    """
    logits_NL = as_matrix("logits", logits)
    labels_M, codes_M, _, logits_ML = of_known_group(labels_of(labels, logits_NL, least=1), groups, logits_NL)
    total, weights = 0.0, 0
    for label, code, rows in cells(labels_M, codes_M):
        same_label = labels_M == label
        n = int(np.count_nonzero(rows))
        smaller_side = min(n, int(np.count_nonzero(same_label)) - n)
        if smaller_side:
            auc = _auc(codes_M[same_label] == code, _log_odds(logits_ML[same_label], label))
            total += smaller_side * 2 * abs(auc - 0.5)
            weights += smaller_side
    return total / weights if weights else None
