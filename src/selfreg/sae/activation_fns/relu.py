"""ReLU: whatever is above zero, kept few by an L1 penalty (Bricken et al. 2023; Conerly et al. 2024)."""

import torch
from torch import Tensor

from selfreg.sae.activation_fns.base import SelectingActivation, Weights
from selfreg.sae.activation_fns.start import threshold_for
from selfreg.sae.kernels import select_above


class ReLU(SelectingActivation):
    """a(h) = ReLU(pre), penalised by mean_n Σ_f a_f(h_n) ‖W_dec[f]‖ / D.

    With the length of the decoder direction, so that a long one with a small activation gains nothing.
    """

    penalty = "l1"

    def select(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, _k: int) -> tuple[Tensor, Tensor]:
        return select_above(x_ND, W_enc_FD, b_enc_F, x_ND.new_zeros(()))

    def sparsity(self, values: Tensor, indices: Tensor, weights: Weights) -> Tensor:
        norms = torch.linalg.vector_norm(weights.W_dec, dim=1)
        at = norms.index_select(0, indices.flatten()).view_as(values)
        return (values * at).sum() / (len(values) * weights.W_dec.shape[1])

    @torch.no_grad()
    def start_from(self, x_ND: Tensor, weights: Weights, k: int) -> None:
        # With half of the features active, the first steps would be dense, and many times slower.
        weights.b_enc.sub_(threshold_for(x_ND, weights, k))
