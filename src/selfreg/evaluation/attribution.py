"""Exact contributions of SAE features to the logits of a linear head.

Letters in shapes: N texts, L labels (logits), d hidden size, U features.

A pooled state h is its SAE reconstruction plus an error e, h = Σ_c a_c W_dec[c] + b_dec + e, and the head is linear,
so that with no approximation

    logit_y = w_y · h + b_y
            = Σ_c a_c (w_y · W_dec[c])        one contribution a feature
            + (w_y · b_dec + b_y)             the bias part, the same for every text
            + w_y · e                         the residual: what the features given do not write

It holds for any set of features: with a part of the dictionary, the others go to the residual. Under mean pooling a_c
is the mean over the pooled tokens of the feature's activation (not the largest one), under last-token pooling that of
the token.

`weight`, `bias`, pooled states and decoder rows must be in one space. Decoder rows are in that of raw hidden states;
a head (w, b) over standardised states (h − m) / s is the head (w / s, b − w · m / s) over raw ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selfreg.evaluation.arrays import FloatArray, as_matrix


class LogitExplanation(NamedTuple):
    """The parts that a logit is the sum of."""

    features: FloatArray
    """`[N, L, U]`: contribution of each feature."""
    bias: FloatArray
    """`[L]`: the head's bias, and what the decoder's bias adds."""
    residual: FloatArray
    """`[N, L]`: through what the features do not reconstruct."""

    @property
    def logits(self) -> FloatArray:
        """`[N, L]`: the sum of all parts, which is the head's output."""
        return np.asarray(self.features.sum(axis=2) + self.bias + self.residual)


def feature_contributions(
    pooled_activations: npt.ArrayLike, weight: npt.ArrayLike, decoder_directions: npt.ArrayLike
) -> FloatArray:
    """Contribution of each feature to each logit, a_c (w_y · W_dec[c]), as `[N, L, U]` in float64.

    To compare labels under a softmax, whose logits have a free constant, pass `weight - weight.mean(axis=0)`.

    Args:
        pooled_activations: `[N, U]`, activations pooled as the states are.
        weight: `[L, d]`.
        decoder_directions: `[U, d]`.

    Raises:
        ValueError: shapes that do not fit, or NaN.
    """
    activations_NU = as_matrix("pooled_activations", pooled_activations, may_be_empty=True)
    weight_Ld = as_matrix("weight", weight)
    decoder_Ud = as_matrix(
        "decoder_directions",
        decoder_directions,
        rows=activations_NU.shape[1],
        columns=weight_Ld.shape[1],
        may_be_empty=True,
    )
    return np.asarray(activations_NU[:, None, :] * (weight_Ld @ decoder_Ud.T))


def explain_logit(
    pooled: npt.ArrayLike,
    activations: npt.ArrayLike,
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    decoder_directions: npt.ArrayLike,
    decoder_bias: npt.ArrayLike | None,
) -> LogitExplanation:
    """Splits logits into features, bias and residual, which sum to the logit (see the top of this file).

    Args:
        pooled: `[N, d]` pooled states as the head sees them.
        activations: `[N, U]`, pooled as the states are.
        weight: `[L, d]`.
        bias: `[L]`, or None for a head without.
        decoder_directions: `[U, d]`.
        decoder_bias: `[d]`, or None for a decoder without.

    Raises:
        ValueError: shapes that do not fit, or NaN.
    """
    weight_Ld = as_matrix("weight", weight)
    num_labels, hidden_size = weight_Ld.shape
    pooled_Nd = as_matrix("pooled", pooled, columns=hidden_size)
    activations_NU = as_matrix("activations", activations, rows=len(pooled_Nd), may_be_empty=True)
    features_NLU = feature_contributions(activations_NU, weight_Ld, decoder_directions)
    bias_L = _vector_or_zeros("bias", bias, num_labels)
    decoder_bias_d = _vector_or_zeros("decoder_bias", decoder_bias, hidden_size)

    reconstruction_Nd = activations_NU @ np.asarray(decoder_directions, dtype=np.float64) + decoder_bias_d
    return LogitExplanation(
        features=features_NLU,
        bias=weight_Ld @ decoder_bias_d + bias_L,
        residual=(pooled_Nd - reconstruction_Nd) @ weight_Ld.T,
    )


def top_contributions(
    contributions: npt.ArrayLike, feature_ids: Sequence[int] | npt.NDArray[np.integer] | None = None, k: int = 10
) -> list[tuple[int, float]]:
    """The features that move one logit of one text most, as (feature id, contribution).

    Args:
        contributions: `[U]`, one text and one logit of `feature_contributions`: `contributions[i, y]`.
        feature_ids: `[U]`, the features' ids in the SAE; None where row c is feature c.
        k: at most so many.

    Returns:
        Sorted by size, up or down alike, the largest first, equal ones in the order given. Features that contribute
        nothing are left out.

    Raises:
        ValueError: shapes that do not fit, NaN, or a negative `k`.
    """
    contributions_U = as_matrix("contributions", np.atleast_2d(np.asarray(contributions)), rows=1, may_be_empty=True)[
        0
    ]
    ids = np.arange(len(contributions_U)) if feature_ids is None else np.asarray(feature_ids)
    if ids.shape != contributions_U.shape:
        raise ValueError(f"feature_ids must have {len(contributions_U)} entries, one a contribution, got {len(ids)}")
    if k < 0:
        raise ValueError(f"k must be 0 or more, got {k}")
    order = np.argsort(-np.abs(contributions_U), kind="stable")[:k]
    return [(int(ids[c]), float(contributions_U[c])) for c in order if contributions_U[c] != 0]


def _vector_or_zeros(name: str, values: npt.ArrayLike | None, length: int) -> FloatArray:
    if values is None:
        return np.zeros(length)
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must have one dimension of {length} entries, got shape {vector.shape}")
    return as_matrix(name, vector[None], columns=length).reshape(length)
