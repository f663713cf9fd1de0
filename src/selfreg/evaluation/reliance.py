"""How much a classifier's decision relies on unintended features: what goes through them, and what they predict.

Pure functions of arrays. Letters in shapes: N texts, L labels (logits), d hidden size, U unintended features.

The free constant of a softmax: adding the same number to all logits of a text changes no prediction and no loss, so
both functions first take that constant out, by centring over labels.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from selfreg.evaluation.arrays import FloatArray, IntArray, as_matrix, labels_of

_RANK_TOLERANCE = 1e-6
"""Of the largest singular value. Above the rounding of float32 feature rows (6e-8), whatever type they arrive in."""

_CONSTANT_TOLERANCE = 1e-9
"""A standard deviation under this share of the size of what was added up is rounding, and counts as zero."""

_RIDGE_STRENGTHS = np.logspace(-2, 6, 9)

FOLDS = 5
"""Parts that the texts are dealt into, and so the fewest texts, unless `unintended_dependence` is told otherwise."""


def reliance_figures(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    pooled: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    directions: npt.ArrayLike | None = None,
    activations: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
) -> dict[str, float | None]:
    """`unintended_use` and `unintended_dependence`, None where what they need is not given."""
    figures: dict[str, float | None] = {"unintended_use": None, "unintended_dependence": None}
    if pooled is not None and weight is not None and directions is not None:
        figures["unintended_use"] = unintended_use(pooled, weight, directions, mask=mask)
    if activations is not None and len(np.asarray(logits)) >= FOLDS:
        figures["unintended_dependence"] = unintended_dependence(logits, labels, activations, mask=mask)
    return figures


def unintended_use(
    pooled: npt.ArrayLike, weight: npt.ArrayLike, directions: npt.ArrayLike, *, mask: npt.ArrayLike | None = None
) -> float:
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
        mask: `[L, U]`, for which logits each feature is unintended; each logit is then measured against its own. None:
            each for all.

    Raises:
        ValueError: shapes that do not fit, or NaN.
    """
    pooled_Nd = as_matrix("pooled", pooled)
    weight_Ld = _centred_over_labels(as_matrix("weight", weight, columns=pooled_Nd.shape[1]), axis=0)
    directions_Ud = as_matrix("directions", directions, columns=pooled_Nd.shape[1], may_be_empty=True)
    centred_Nd = pooled_Nd - pooled_Nd.mean(axis=0)
    total_L = (centred_Nd @ weight_Ld.T).var(axis=0)
    through_L = np.zeros(len(weight_Ld))
    for own_U, logits in _by_features(mask, len(weight_Ld), len(directions_Ud)):
        basis_Rd = _orthonormal_rows(directions_Ud[own_U])
        through_L[logits] = (centred_Nd @ basis_Rd.T @ (basis_Rd @ weight_Ld[logits].T)).var(axis=0)
    size_L = np.linalg.norm(weight_Ld, axis=1) * np.sqrt((pooled_Nd**2).sum(axis=1).mean())
    return float(np.mean(_ratio(through_L, total_L, floor=(_CONSTANT_TOLERANCE * size_L) ** 2)))


def unintended_dependence(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    activations: npt.ArrayLike,
    *,
    mask: npt.ArrayLike | None = None,
    folds: int = FOLDS,
    seed: int = 0,
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
        labels: `[N]` integers in 0..L-1 (any integers for L = 1). With L = 1 also `[N]` floats, a target on a scale:
            then what a straight line in the target predicts is taken off, instead of the mean within each label.
        activations: `[N, U]`; U = 0 gives 0.0.
        mask: `[L, U]`, for which logits each feature is unintended; each logit is then measured against its own. None:
            each for all.
        folds: parts that the texts are dealt into, 2 to N.
        seed: of the deal; the same seed gives the same value.

    Raises:
        ValueError: shapes that do not fit, NaN, labels out of range, or folds that are not 2 to N.
    """
    logits_NL = as_matrix("logits", logits)
    num_logits = logits_NL.shape[1]
    on_a_scale = num_logits == 1 and np.asarray(labels).dtype.kind == "f"
    labels_N: Any = np.asarray(labels, dtype=np.float64) if on_a_scale else labels_of(labels, logits_NL, least=1)
    activations_NU = as_matrix("activations", activations, rows=len(labels_N), may_be_empty=True)
    if not 2 <= folds <= len(labels_N):
        raise ValueError(f"folds must lie between 2 and the number of texts ({len(labels_N)}), got {folds}")

    margins_NL = _centred_over_labels(logits_NL, axis=1)
    if on_a_scale:
        target_NL, z_NU = (_without_line(values, labels_N) for values in (margins_NL, activations_NU))
    else:
        target_NL, z_NU = (_centred_within(values, labels_N) for values in (margins_NL, activations_NU))
    scale_U = z_NU.std(axis=0)
    varies_U = scale_U > _CONSTANT_TOLERANCE * np.abs(activations_NU).max(axis=0, initial=0.0)
    varies_L = target_NL.std(axis=0) > _CONSTANT_TOLERANCE * np.abs(logits_NL).max()
    r2_L = np.zeros(num_logits)
    for own_U, logits_of in _by_features(mask, num_logits, activations_NU.shape[1]):
        used_U, used_L = own_U & varies_U, np.intersect1d(logits_of, np.flatnonzero(varies_L))
        if used_U.any() and len(used_L):
            # In units of its own spread, so that the sums of squares are the same for logits of any size.
            target_NV = target_NL[:, used_L] / target_NL[:, used_L].std(axis=0)
            error_NV = target_NV - _held_out_predictions(z_NU[:, used_U] / scale_U[used_U], target_NV, folds, seed)
            r2_L[used_L] = 1 - (error_NV**2).sum(axis=0) / (target_NV**2).sum(axis=0)
    return float(np.maximum(r2_L, 0).mean())


def _by_features(
    mask: npt.ArrayLike | None, num_logits: int, num_features: int
) -> Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]]:
    """(which features, the logits that they are unintended for), so that equal sets are worked out once."""
    if mask is None:
        yield np.ones(num_features, dtype=bool), np.arange(num_logits)
        return
    rows_LU = np.asarray(mask, dtype=bool)
    if rows_LU.shape != (num_logits, num_features):
        raise ValueError(f"mask must have shape {(num_logits, num_features)}: logits, features; got {rows_LU.shape}")
    sets, which_L = np.unique(rows_LU, axis=0, return_inverse=True)
    for number, own_U in enumerate(sets):
        yield own_U, np.flatnonzero(which_L.reshape(-1) == number)


def _without_line(values: FloatArray, target_N: FloatArray) -> FloatArray:
    """What is left after a linear regression on the target."""
    line = target_N - target_N.mean()
    centred = values - values.mean(axis=0)
    size = float(line @ line)
    return centred - np.outer(line, line @ centred) / size if size > 0 else centred


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
