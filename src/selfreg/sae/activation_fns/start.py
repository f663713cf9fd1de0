"""Where thresholds start."""

from torch import Tensor

from selfreg.sae.activation_fns.base import Weights
from selfreg.sae.kernels import select_active


def threshold_for(x_ND: Tensor, weights: Weights, k: int) -> Tensor:
    """The threshold `[]` that lets k features of these centred, scaled states through, on average."""
    places = min(4 * k, len(weights.W_enc))
    values, _ = select_active(x_ND - weights.b_dec, weights.W_enc, weights.b_enc, places)
    return values.flatten().topk(k * len(x_ND), sorted=False).values.amin()
