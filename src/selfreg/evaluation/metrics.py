"""What a controlled classifier is measured by: scores, group figures, and its reliance on unintended features.

Pure functions of arrays. Letters in shapes: N texts, L labels (logits), d hidden size, U unintended features.

The free constant of a softmax: adding the same number to all logits of a text changes no prediction and no loss, so
whatever looks at logits here first takes that constant out, by centring over labels or by looking at log odds.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Groups: TypeAlias = Sequence[str | int | None] | npt.NDArray[Any]

_MIN_CELL = 10
"""Rows that a (label, group) cell needs before its accuracy counts in `worst_group_accuracy`."""

_RANK_TOLERANCE = 1e-6
"""Of the largest singular value. Above the rounding of float32 feature rows (6e-8), whatever type they arrive in."""

_CONSTANT_TOLERANCE = 1e-9
"""A standard deviation under this share of the size of what was added up is rounding, and counts as zero."""

_RIDGE_STRENGTHS = np.logspace(-2, 6, 9)

_FOLDS = 5


class GroupCell(TypedDict):
    """Accuracy among the texts of one true label and one group, with a bootstrap interval."""

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

    Returns:
        accuracy, f1, auc, worst_group_accuracy, group_gap, leakage, unintended_use, unintended_dependence. None where
        a figure does not apply: no groups, no `pooled`/`weight`/`directions`, no `activations` (or fewer texts than
        folds), or the reasons that each function names.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, labels or groups that are not what is said above.
    """
    logits_NL = as_matrix("logits", logits)
    labels_N = _labels_of(labels, logits_NL)
    num_texts, num_labels = logits_NL.shape
    predictions = logits_NL.argmax(axis=1)
    figures = classification_scores(logits_NL, labels_N)
    figures |= dict.fromkeys(
        ("worst_group_accuracy", "group_gap", "leakage", "unintended_use", "unintended_dependence")
    )
    if groups is not None:
        figures["worst_group_accuracy"] = worst_group_accuracy(predictions, labels_N, groups)
        figures["group_gap"] = group_gap(predictions, labels_N, groups)
        figures["leakage"] = leakage(logits_NL, labels_N, groups)
    if pooled is not None and weight is not None and directions is not None:
        figures["unintended_use"] = unintended_use(
            as_matrix("pooled", pooled, rows=num_texts), as_matrix("weight", weight, rows=num_labels), directions
        )
    if activations is not None:
        activations_NU = as_matrix("activations", activations, rows=num_texts, may_be_empty=True)
        if num_texts >= _FOLDS:
            figures["unintended_dependence"] = unintended_dependence(logits_NL, labels_N, activations_NU)
    return figures


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
    labels_N = _labels_of(labels, logits_NL)
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
    labels_M, codes_M, _, predictions_M = _of_known_group(labels, groups, predictions)
    correct = predictions_M == labels_M
    accuracies = [
        float(correct[rows].mean()) for _, _, rows in _cells(labels_M, codes_M) if np.count_nonzero(rows) >= _MIN_CELL
    ]
    return min(accuracies, default=None)


def group_cells(
    predictions: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: Groups,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[GroupCell]:
    """Size, accuracy and bootstrap percentile interval of every (label, group) cell that has a row.

    A bootstrap sample of n rows of which a share p is right holds Binomial(n, p) right ones, so the resamples are
    drawn from there: the very distribution of resampling, in memory that does not grow with n. The interval of a cell
    where all rows are right (or all wrong) has no width, however small the cell: read it beside n.

    Args:
        predictions: `[N]` integers.
        labels: `[N]` integers.
        groups: `[N]`, see `evaluate_predictions`.
        confidence: share of the bootstrap distribution inside the interval, above 0 and under 1.
        resamples: bootstrap samples a cell.
        seed: of the resampling; the same seed and rows give the same intervals.

    Returns:
        One `GroupCell` a cell, sorted by label, then group.

    Raises:
        ValueError: lengths that differ, values that are not labels or groups, or options out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}: pass 0.95 for a 95 % interval")
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    labels_M, codes_M, names, predictions_M = _of_known_group(labels, groups, predictions)
    correct = predictions_M == labels_M
    rng = np.random.default_rng(seed)
    tail = (1 - confidence) / 2
    table: list[GroupCell] = []
    for label, code, rows in _cells(labels_M, codes_M):
        n = int(np.count_nonzero(rows))
        accuracy = float(correct[rows].mean())
        low, high = np.quantile(rng.binomial(n, accuracy, size=resamples) / n, [tail, 1 - tail])
        table.append(
            GroupCell(label=label, group=names[code], n=n, accuracy=accuracy, low=float(low), high=float(high))
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

    labels_M, codes_M, _, predictions_M = _of_known_group(labels, groups, predictions)
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
    labels_M, codes_M, _, logits_ML = _of_known_group(_labels_of(labels, logits_NL, least=1), groups, logits_NL)
    total, weights = 0.0, 0
    for label, code, rows in _cells(labels_M, codes_M):
        same_label = labels_M == label
        n = int(np.count_nonzero(rows))
        smaller_side = min(n, int(np.count_nonzero(same_label)) - n)
        if smaller_side:
            auc = _auc(codes_M[same_label] == code, _log_odds(logits_ML[same_label], label))
            total += smaller_side * 2 * abs(auc - 0.5)
            weights += smaller_side
    return total / weights if weights else None


# --- Unintended features ---------------------------------------------------------------------------------------------


def unintended_use(pooled: npt.ArrayLike, weight: npt.ArrayLike, directions: npt.ArrayLike) -> float:
    """The share of the variance of the logit margin that comes through the span of the unintended features.

        mean over logits of  Var(w · P_U h') / Var(w · h')

    over the texts, with h' the rows of `pooled`, P_U the orthogonal projector on the span of the rows of `directions`,
    and w the rows of `weight` centred over labels (for L of 2 or more), so that a part that all logits share counts
    as nothing. A logit that does not vary counts as 0.

    The value depends on the span only: rows of `directions` may be scaled, mixed, repeated or zero. Nor does it change
    when `pooled` is shifted or scaled as a whole, so standardised and raw states give the same, as long as `weight`
    fits `pooled`. It is not bounded by 1: where the part inside the span and the part outside cancel one another, each
    varies more than their sum.

    Args:
        pooled: `[N, d]`.
        weight: `[L, d]`.
        directions: `[U, d]`; U = 0 gives 0.0.

    Raises:
        ValueError: shapes that do not fit, or NaN.
    """
    pooled_Nd = as_matrix("pooled", pooled)
    weight_Ld = _centred_over_labels(as_matrix("weight", weight, columns=pooled_Nd.shape[1]), axis=0)
    basis_Rd = _orthonormal_rows(as_matrix("directions", directions, columns=pooled_Nd.shape[1], may_be_empty=True))
    centred_Nd = pooled_Nd - pooled_Nd.mean(axis=0)
    total_L = (centred_Nd @ weight_Ld.T).var(axis=0)
    through_L = (centred_Nd @ basis_Rd.T @ (basis_Rd @ weight_Ld.T)).var(axis=0)
    size_L = np.linalg.norm(weight_Ld, axis=1) * np.sqrt((pooled_Nd**2).sum(axis=1).mean())
    return float(np.mean(_ratio(through_L, total_L, floor=(_CONSTANT_TOLERANCE * size_L) ** 2)))


def unintended_dependence(
    logits: npt.ArrayLike, labels: npt.ArrayLike, activations: npt.ArrayLike, *, folds: int = _FOLDS, seed: int = 0
) -> float:
    """How much of what varies in the logits among texts of the same true label the unintended features predict.

        mean over logits of  max(0, R²),   R² = 1 − Σ (l − l̂)² / Σ l²

    with l a logit (centred over labels for L of 2 or more, then within the true label), and l̂ its prediction for
    texts held out, by ridge regression on the activations (centred within the true label, at unit variance). The sums
    run over all texts, each predicted once, by the fold that did not see it. Unlike `unintended_use` this sees
    reliance through directions that are merely correlated with the features.

    Each logit's R² is floored by itself: below 0 it says that ridge regression overfitted, not that there is less
    than no dependence, so it must not cancel what another logit shows. A logit that does not vary counts as 0.

    The ridge strength is chosen for each logit within the training folds (by leave-one-out). The centring and the
    activations' scale come from all texts. A scale from the training folds alone would blow up a feature that fires
    in two or three texts when one of them is held out: in a simulation of 400 texts, with 100 features that fire in
    two texts each beside 3 that matter, R² went from 0.47 without the rare ones to -0.6 so, and to 0.36 with a scale
    from all texts. Rare features in large number do make the value too low, then, and a low value is no proof there.

    Args:
        logits: `[N, L]`.
        labels: `[N]` integers in 0..L-1 (any integers for L = 1).
        activations: `[N, U]`; U = 0 gives 0.0.
        folds: parts that the texts are dealt into, 2 to N.
        seed: of the deal; the same seed gives the same value.

    Raises:
        ValueError: shapes that do not fit, NaN, labels out of range, or folds that are not 2 to N.
    """
    logits_NL = as_matrix("logits", logits)
    labels_N = _labels_of(labels, logits_NL, least=1)
    activations_NU = as_matrix("activations", activations, rows=len(labels_N), may_be_empty=True)
    if not 2 <= folds <= len(labels_N):
        raise ValueError(f"folds must lie between 2 and the number of texts ({len(labels_N)}), got {folds}")

    target_NL = _centred_within(_centred_over_labels(logits_NL, axis=1), labels_N)
    z_NU = _centred_within(activations_NU, labels_N)
    scale_U = z_NU.std(axis=0)
    varies_U = scale_U > _CONSTANT_TOLERANCE * np.abs(activations_NU).max(axis=0)
    varies_L = target_NL.std(axis=0) > _CONSTANT_TOLERANCE * np.abs(logits_NL).max()
    if not varies_U.any() or not varies_L.any():
        return 0.0
    # In units of its own spread, so that the sums of squares are the same for logits of any size.
    target_NV = target_NL[:, varies_L] / target_NL[:, varies_L].std(axis=0)
    error_NV = target_NV - _held_out_predictions(z_NU[:, varies_U] / scale_U[varies_U], target_NV, folds, seed)
    r2_V = 1 - (error_NV**2).sum(axis=0) / (target_NV**2).sum(axis=0)
    return float(np.maximum(r2_V, 0).sum() / len(varies_L))


def _held_out_predictions(inputs: FloatArray, targets: FloatArray, folds: int, seed: int) -> FloatArray:
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    predictions = np.empty_like(targets)
    for train, held_out in KFold(folds, shuffle=True, random_state=seed).split(inputs):
        ridge = RidgeCV(_RIDGE_STRENGTHS, alpha_per_target=True).fit(inputs[train], targets[train])
        predictions[held_out] = ridge.predict(inputs[held_out]).reshape(len(held_out), -1)
    return predictions


def _centred_over_labels(values: FloatArray, axis: int) -> FloatArray:
    """Without what all labels share; a single logit has no softmax, and stays."""
    return values - values.mean(axis=axis, keepdims=True) if values.shape[axis] > 1 else values


def _centred_within(values: FloatArray, labels: IntArray) -> FloatArray:
    centred = np.empty_like(values)
    for label in np.unique(labels):
        rows = labels == label
        centred[rows] = values[rows] - values[rows].mean(axis=0)
    return centred


def _orthonormal_rows(rows: FloatArray) -> FloatArray:
    """`[R, d]`, an orthonormal basis of the span of `rows` `[U, d]`."""
    lengths = np.linalg.norm(rows, axis=1)
    rows = rows[lengths > 0]
    if not len(rows):
        return rows
    # At unit length, so that a short row is not taken for a rounding error of a long one.
    _, sizes, basis = np.linalg.svd(rows / lengths[lengths > 0, None], full_matrices=False)
    return np.asarray(basis[sizes > _RANK_TOLERANCE * sizes[0]])


def _ratio(part: FloatArray, whole: FloatArray, floor: FloatArray) -> FloatArray:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > floor)


# --- Checks ----------------------------------------------------------------------------------------------------------


def as_matrix(
    name: str,
    values: npt.ArrayLike,
    *,
    rows: int | None = None,
    columns: int | None = None,
    may_be_empty: bool = False,
) -> FloatArray:
    """`values` as a float64 matrix of finite numbers, or a ValueError that names `name` and what to mend."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {matrix.shape}: pass one row a text or label")
    if not matrix.size and not may_be_empty:
        raise ValueError(f"{name} is empty, shape {matrix.shape}: pass at least one row and one column")
    for wanted, found, what in ((rows, matrix.shape[0], "rows"), (columns, matrix.shape[1], "columns")):
        if wanted is not None and wanted != found:
            raise ValueError(f"{name} must have {wanted} {what} to fit the other arrays, got shape {matrix.shape}")
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} holds NaN or infinite values in {len(bad)} rows (the first is row {bad[0]}): "
            "leave these rows out of every array, or mend what made them"
        )
    return matrix


def _as_integers(name: str, values: npt.ArrayLike) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}: pass one integer a text")
    if array.dtype.kind not in "biu":
        raise ValueError(f"{name} must be integers, got {array.dtype}: number the label names from 0")
    return array.astype(np.int64)


def _labels_of(labels: npt.ArrayLike, logits_NL: FloatArray, least: int = 2) -> IntArray:
    """Checked `labels` `[N]` that fit `logits_NL`."""
    labels_N = _as_integers("labels", labels)
    num_texts, num_labels = logits_NL.shape
    if num_labels < least:
        raise ValueError(f"logits must have {least} or more columns, one a label, got shape {logits_NL.shape}")
    if len(labels_N) != num_texts:
        raise ValueError(f"labels must have {num_texts} entries, one a row of logits, got {len(labels_N)}")
    if num_labels > 1 and (labels_N.min() < 0 or labels_N.max() >= num_labels):
        raise ValueError(
            f"labels must lie in 0..{num_labels - 1}, as logits has {num_labels} columns, got "
            f"{labels_N.min()}..{labels_N.max()}: number the labels from 0, or give logits one column a label"
        )
    return labels_N


def _group_name(value: Any) -> str | int | None:
    """A plain str or int, or None for an unknown group (None or NaN). Whole floats are what pandas makes of ints."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float) and (np.isnan(value) or value.is_integer()):
        return None if np.isnan(value) else int(value)
    raise ValueError(f"groups must hold names or whole numbers, or None where unknown, got {value!r}: bin it first")


def _of_known_group(
    labels: npt.ArrayLike, groups: Groups, values: npt.ArrayLike
) -> tuple[IntArray, IntArray, list[str | int], npt.NDArray[Any]]:
    """The texts whose group is known.

    Returns:
        Their labels `[M]`, group codes `[M]`, the sorted names that the codes number, and their rows of `values`
        (predictions, or a matrix that has been checked).
    """
    labels_N = _as_integers("labels", labels)
    values = np.asarray(values)
    values_N = _as_integers("predictions", values) if values.ndim < 2 else values
    if len(values_N) != len(labels_N):
        raise ValueError(f"predictions must have {len(labels_N)} entries, one a label, got {len(values_N)}")
    if len(groups) != len(labels_N):
        raise ValueError(f"groups must have {len(labels_N)} entries, one a label, got {len(groups)}: None if unknown")
    of_text = [_group_name(group) for group in groups]
    names = sorted({name for name in of_text if name is not None}, key=lambda name: (isinstance(name, str), name))
    code_of: dict[str | int | None, int] = {name: code for code, name in enumerate(names)}
    codes_N = np.array([code_of.get(name, -1) for name in of_text], dtype=np.int64)
    known = codes_N >= 0
    return labels_N[known], codes_N[known], names, values_N[known]


def _cells(labels: IntArray, codes: IntArray) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
    """(label, group code, mask over rows) of every cell that has a row, in order."""
    for label, code in np.unique(np.stack([labels, codes], axis=1), axis=0):
        yield int(label), int(code), (labels == label) & (codes == code)
