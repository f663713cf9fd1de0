"""Matryoshka SAEs: each of several prefixes of the features has to reconstruct by itself (Bussmann et al. 2025).

Shapes: N states, D hidden size, F features, K active features of a state, P prefixes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from selfreg.sae.kernels import TransposedIndex


class _DecodePrefixes(torch.autograd.Function):
    """The active features of a state are put in the order of their blocks (what a prefix adds to the one before it),
    so that one `embedding_bag` with P bags a state gives the sum of every block."""

    @staticmethod
    def forward(ctx: FunctionCtx, values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor, ends_P: Tensor) -> Tensor:
        num_states, num_prefixes = len(indices_NK), len(ends_P)
        indices_NK, order_NK = indices_NK.sort(dim=1)
        values_NK = values_NK.gather(1, order_NK)
        blocks_NK = torch.bucketize(indices_NK, ends_P, right=True)
        bags_NK = blocks_NK + torch.arange(num_states, device=blocks_NK.device).unsqueeze(1) * num_prefixes
        counts = torch.bincount(bags_NK.flatten(), minlength=num_states * num_prefixes)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        sums = F.embedding_bag(
            indices_NK.flatten(),
            W_dec_FD,
            offsets,
            mode="sum",
            per_sample_weights=values_NK.flatten(),
            include_last_offset=True,
        )
        ctx.save_for_backward(values_NK, indices_NK, order_NK, bags_NK, offsets, W_dec_FD)
        ctx.num_prefixes = num_prefixes  # type: ignore[attr-defined]
        return sums.view(num_states, num_prefixes, -1).cumsum(dim=1)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_NK, indices_NK, order_NK, bags_NK, offsets, W_dec_FD = ctx.saved_tensors  # type: ignore[attr-defined]
        # A block is part of its own prefix and of all that are longer.
        grad_NPD = grads[0].flip(1).cumsum(dim=1).flip(1).contiguous()
        grad_bags = grad_NPD.view(-1, W_dec_FD.shape[1])
        pairs = bags_NK.reshape(-1)
        grad_values = _bag_dot(grad_bags, W_dec_FD, indices_NK, bags_NK, offsets)
        grad_values = torch.zeros_like(grad_values).scatter_(1, order_NK, grad_values)
        grad_W = TransposedIndex(indices_NK, len(W_dec_FD), rows=pairs).outer_sum(values_NK, grad_bags)
        return grad_values, None, grad_W, None


def _bag_dot(a_BD: Tensor, W_FD: Tensor, indices_NK: Tensor, bags_NK: Tensor, offsets: Tensor) -> Tensor:
    """`out[n, j] = a[bags[n, j]] · W[indices[n, j]]`, without holding `a[bags]`."""
    if a_BD.device.type == "cpu":
        flat = indices_NK.flatten()
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            a_BD, W_FD, flat, offsets[:-1].contiguous(), bags_NK.flatten(), 0
        ).view_as(indices_NK)
    columns = [(a_BD[bags_NK[:, j]] * W_FD[indices_NK[:, j]]).sum(dim=1) for j in range(indices_NK.shape[1])]
    return torch.stack(columns, dim=1)


def decode_prefixes(values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor, ends_P: Tensor) -> Tensor:
    """`out[n, p] = Σ_{j: indices[n, j] < ends[p]} values[n, j] · W_dec[indices[n, j]]`.

    Differentiable in values and W_dec.

    Args:
        values_NK, indices_NK: the active features.
        W_dec_FD: decoder directions.
        ends_P (int64): number of features of each prefix, rising, the last F.

    Returns:
        `[N, P, D]`.
    """
    out: Tensor = _DecodePrefixes.apply(values_NK, indices_NK, W_dec_FD, ends_P)
    return out
