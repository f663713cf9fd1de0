"""Top-k with most of the product in bfloat16, where the CPU multiplies that several times faster (AMX).

A bfloat16 product proposes more candidates than are wanted, exact float32 pre-activations of these decide, and a row
whose margin does not certify the choice is done again in float32. Values are always float32. Shapes: N states, D
hidden size, F features, K active features, M candidates.
"""

from functools import cache

import torch
from torch import Tensor

_EXTRA = 16
"""Candidates over k: the more, the fewer rows are done twice."""

_MIN_FEATURES = 1024
"""Under this the product is too small to pay for the rest."""

_MARGIN = 2.0
"""A feature outside the candidates is taken to be off by at most this many times the largest error inside."""


@cache
def screening_pays() -> bool:
    """Whether bfloat16 products are fast here. Without AMX they are up to a hundred times slower than float32."""
    return torch.cpu._is_amx_tile_supported()


def can_screen(x_ND: Tensor, num_features: int, k: int) -> bool:
    """Whether `screened_topk` takes these states: float32 on a CPU with AMX, and few active features of many."""
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype == torch.float32
        and num_features >= max(_MIN_FEATURES, 8 * (k + _EXTRA))
        and screening_pays()
    )


def screened_topk(
    x_ND: Tensor, W_enc_FD: Tensor, W16_FD: Tensor, bias_F: Tensor, k: int, buffer_NF: Tensor
) -> tuple[Tensor, Tensor]:
    """The k largest of `relu(x @ W_enc.T + bias)` for each state.

    Args:
        W16_FD: `W_enc_FD` in bfloat16.
        buffer_NF: bfloat16, for the product.

    Returns:
        values `[N, K]`, rectified, and indices `[N, K]` (in no order; any index where the value is 0).
    """
    from selfreg.sae.kernels import sampled_dot, topk

    approximate_NF = torch.addmm(bias_F.bfloat16(), x_ND.bfloat16(), W16_FD.T, out=buffer_NF)
    # The bits of positive bfloat16 numbers are ordered like int16, whose top-k needs no comparison of floats; those of
    # negative ones are below them all, in the wrong order among themselves, which the rectifier makes all alike.
    bits_NM, candidates_NM = topk(approximate_NF.view(torch.int16), k + _EXTRA)
    approximate_NM = bits_NM.view(torch.bfloat16).float()
    exact_NM = sampled_dot(x_ND, W_enc_FD, candidates_NM) + bias_F[candidates_NM]
    values_NK, chosen_NK = exact_NM.topk(k, dim=1, sorted=False)
    indices_NK = candidates_NM.gather(1, chosen_NK)
    values_NK.relu_()
    error_N = (exact_NM - approximate_NM).abs_().amax(dim=1)
    # Outside the candidates nothing is above this, up to the error.
    outside_N = approximate_NM.amin(dim=1) + _MARGIN * error_N
    uncertain = (values_NK.amin(dim=1) < outside_N).nonzero().flatten()
    if len(uncertain):
        again = torch.addmm(bias_F, x_ND[uncertain], W_enc_FD.T)
        values, indices = topk(again, k)
        values_NK[uncertain], indices_NK[uncertain] = values.relu_(), indices
    return values_NK, indices_NK
