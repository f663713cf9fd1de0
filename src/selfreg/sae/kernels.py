"""Sparse encoding and decoding with hand-written gradients, in plain torch.

The dense product with the encoder is the one large product of a step; all else touches the k active features of a
state only. Shapes: N states, D hidden size, F features, K active features of a state.
"""

import math
import threading
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from selfreg.sae.screening import can_screen, screened_topk

_CHUNK_ELEMENTS = 1 << 24
"""Pre-activations held at once (64 MB in float32), whatever the number of states and features."""

Select = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Centred states, encoder rows, their biases and k -> values `[N, K]` and indices `[N, K]` of the active features."""

_local = threading.local()


def select_topk(
    x_ND: Tensor, W_enc_FD: Tensor, bias_F: Tensor, k: int, *, keep_maxima: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k largest of `x @ W_enc.T + bias` for each state, not rectified, in chunks of states.

    Returns:
        values `[N, K]`, indices `[N, K]` (in no order), and with `keep_maxima` the largest pre-activation of every
        feature over the states, `[F]`.
    """
    num_states, num_features = len(x_ND), len(W_enc_FD)
    rows = max(1, min(num_states, _CHUNK_ELEMENTS // num_features))
    values = x_ND.new_empty(num_states, k)
    indices = torch.empty(num_states, k, dtype=torch.long, device=x_ND.device)
    maxima = x_ND.new_full((num_features,), -math.inf) if keep_maxima else None
    for start in range(0, num_states, rows):
        chunk = x_ND[start : start + rows]
        # A fresh buffer of this size would cost more in page faults than the selection itself.
        pre_NF = torch.addmm(bias_F, chunk, W_enc_FD.T, out=_buffer(len(chunk), num_features, chunk))
        values[start : start + rows], indices[start : start + rows] = topk(pre_NF, k)
        if maxima is not None:
            maxima = torch.maximum(maxima, pre_NF.amax(dim=0))
    return values, indices, maxima


def select_active(x_ND: Tensor, W_enc_FD: Tensor, bias_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`TopK(ReLU(x @ W_enc.T + bias))`: values `[N, K]`, indices `[N, K]` in no order."""
    num_states, num_features = len(x_ND), len(W_enc_FD)
    if not can_screen(x_ND, num_features, k):
        values, indices, _ = select_topk(x_ND, W_enc_FD, bias_F, k)
        return values.relu_(), indices
    W16_FD = W_enc_FD.bfloat16()
    rows = max(1, min(num_states, _CHUNK_ELEMENTS // num_features))
    values = x_ND.new_empty(num_states, k)
    indices = torch.empty(num_states, k, dtype=torch.long)
    for start in range(0, num_states, rows):
        chunk = x_ND[start : start + rows]
        buffer = _buffer(len(chunk), num_features, W16_FD)
        part = slice(start, start + rows)
        values[part], indices[part] = screened_topk(chunk, W_enc_FD, W16_FD, bias_F, k, buffer)
    return values, indices


def select_above(x_ND: Tensor, W_enc_FD: Tensor, bias_F: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """What of `x @ W_enc.T + bias` is above a threshold (`[]`, or `[F]`, one a feature), in chunks of states.

    Returns:
        values `[N, K]` and indices `[N, K]`, K being the most that a state has (1 at least); 0 where a place is not
        used.
    """
    num_states, num_features = len(x_ND), len(W_enc_FD)
    if num_states == 0:
        return x_ND.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.long, device=x_ND.device)
    rows = max(1, min(num_states, _CHUNK_ELEMENTS // num_features))
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, num_states, rows):
        chunk = x_ND[start : start + rows]
        pre_NF = torch.addmm(bias_F, chunk, W_enc_FD.T, out=_buffer(len(chunk), num_features, chunk))
        pre_NF.mul_(pre_NF > threshold)
        most = max(1, int(torch.count_nonzero(pre_NF, dim=1).max()))
        parts.append(topk(pre_NF.relu_(), most))
    widest = max(values.shape[1] for values, _ in parts)
    padded = [tuple(F.pad(part, (0, widest - part.shape[1])) for part in pair) for pair in parts]
    return torch.cat([values for values, _ in padded]), torch.cat([indices for _, indices in padded])


def above(threshold: Tensor) -> Select:
    """`select_above` this threshold, whatever k."""

    def select(x_ND: Tensor, W_enc_FD: Tensor, bias_F: Tensor, _k: int) -> tuple[Tensor, Tensor]:
        return select_above(x_ND, W_enc_FD, bias_F, threshold)

    return select


def topk(pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of each row, in no order.

    On a CPU in two levels: with the columns dealt into strided groups, the k largest lie in the k groups of largest
    maximum, so that a full selection is needed among groups and among their members only.
    """
    num_states, num_features = pre_NF.shape
    groups = _group_count(num_features, k) if pre_NF.device.type == "cpu" else 0
    if not groups:
        values, indices = pre_NF.topk(k, dim=1, sorted=False)
        return values, indices
    members = num_features // groups
    pre_NMG = pre_NF.view(num_states, members, groups)
    best_NK = pre_NMG.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = pre_NMG.gather(2, best_NK.unsqueeze(1).expand(-1, members, -1)).flatten(1)
    values, chosen = candidates.topk(k, dim=1, sorted=False)
    return values, best_NK.gather(1, chosen % k) + (chosen // k) * groups


@lru_cache
def _group_count(num_features: int, k: int) -> int:
    """The divisor of `num_features` that makes both levels of `topk` cheapest; 0 where plain top-k is better."""
    ideal = math.sqrt(k * num_features)
    fitting = [g for g in range(2 * k, num_features // 2 + 1) if num_features % g == 0 and ideal / 3 < g < ideal * 3]
    return min(fitting, key=lambda g: abs(math.log(g / ideal)), default=0)


def _buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    buffers: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("buffers", {})
    held = buffers.get(like.dtype)
    if held is None or held.numel() < rows * columns:
        # Made as a normal tensor even under inference_mode, or training could not write to it later.
        with torch.inference_mode(False):
            buffers[like.dtype] = held = torch.empty(rows * columns, dtype=like.dtype)
    return held[: rows * columns].view(rows, columns)


def sampled_dot(a_ND: Tensor, W_FD: Tensor, indices_NK: Tensor) -> Tensor:
    """`out[n, j] = a[n] · W[indices[n, j]]`, `[N, K]`, a K at a time so that `W[indices]` is never held whole."""
    num_states, k = indices_NK.shape
    if a_ND.device.type == "cpu":
        flat = indices_NK.reshape(-1)
        offsets = torch.arange(0, num_states * k, k, device=flat.device)
        empty = torch.empty(0, dtype=torch.long, device=flat.device)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            a_ND.contiguous(), W_FD, flat, offsets, empty, 0
        ).view(num_states, k)
    return torch.stack([(a_ND * W_FD[indices_NK[:, j]]).sum(dim=1) for j in range(k)], dim=1)


def gather_sum(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """`out[n] = Σ_j values[n, j] · W[indices[n, j]]`, `[N, D]`."""
    return F.embedding_bag(indices_NK, W_FD, mode="sum", per_sample_weights=values_NK)


class TransposedIndex:
    """The active features of N states, sorted by feature: who uses feature f, and with which weight.

    Args:
        indices_NK: the active features.
        num_features: F.
        rows: where each of the N · K stands in what `outer_sum` is given; its state, if left out.
    """

    def __init__(self, indices_NK: Tensor, num_features: int, rows: Tensor | None = None) -> None:
        flat = indices_NK.reshape(-1)
        # stable=True takes the radix sort, many times faster here than a comparison sort.
        ordered, self.order = flat.sort(stable=True)
        self.rows = self.order // indices_NK.shape[1] if rows is None else rows[self.order]
        self.offsets = torch.zeros(num_features + 1, dtype=torch.long, device=flat.device)
        torch.cumsum(torch.bincount(ordered, minlength=num_features), 0, out=self.offsets[1:])

    def outer_sum(self, weights_NK: Tensor, a_ND: Tensor) -> Tensor:
        """`out[f] = Σ_{n, j: indices[n, j] = f} weights[n, j] · a[n]`, `[F, D]`."""
        return F.embedding_bag(
            self.rows,
            a_ND,
            self.offsets,
            mode="sum",
            per_sample_weights=weights_NK.reshape(-1)[self.order],
            include_last_offset=True,
        )


def _encoder_gradients(
    transposed: TransposedIndex, grad_NK: Tensor, indices_NK: Tensor, centred_ND: Tensor, W_enc_FD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of W_enc `[F, D]`, b_enc `[F]`, and of the bias `[D]` that is taken off the states before the product."""
    grad_W = transposed.outer_sum(grad_NK, centred_ND)
    grad_b = torch.zeros_like(W_enc_FD[:, 0]).index_add_(0, indices_NK.reshape(-1), grad_NK.reshape(-1))
    # The bias moves every state alike, so that the sum over states can be taken before the product.
    return grad_W, grad_b, -grad_b @ W_enc_FD


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_ND: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        b_pre_D: Tensor,
        k: int,
        rectify: bool,
        select: Select,
    ) -> tuple[Tensor, Tensor]:
        centred_ND = x_ND - b_pre_D
        if rectify:
            values_NK, indices_NK = select(centred_ND, W_enc_FD, b_enc_F, k)
        else:
            values_NK, indices_NK, _ = select_topk(centred_ND, W_enc_FD, b_enc_F, k)
        ctx.rectify = rectify  # type: ignore[attr-defined]
        ctx.save_for_backward(centred_ND, W_enc_FD, values_NK, indices_NK)
        ctx.mark_non_differentiable(indices_NK)
        return values_NK, indices_NK

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred_ND, W_enc_FD, values_NK, indices_NK = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_NK = grads[0] * (values_NK > 0) if ctx.rectify else grads[0]  # type: ignore[attr-defined]
        transposed = TransposedIndex(indices_NK, len(W_enc_FD))
        grad_W, grad_b, grad_pre = _encoder_gradients(transposed, grad_NK, indices_NK, centred_ND, W_enc_FD)
        grad_x = gather_sum(grad_NK, indices_NK, W_enc_FD) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        return grad_x, grad_W, grad_b, grad_pre, None, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor) -> Tensor:
        ctx.save_for_backward(values_NK, indices_NK, W_dec_FD)
        return gather_sum(values_NK, indices_NK, W_dec_FD)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_NK, indices_NK, W_dec_FD = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_values = sampled_dot(grads[0], W_dec_FD, indices_NK)
        grad_W = TransposedIndex(indices_NK, len(W_dec_FD)).outer_sum(values_NK, grads[0].contiguous())
        return grad_values, None, grad_W


class _SparseAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_ND: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        W_dec_FD: Tensor,
        b_dec_D: Tensor,
        k: int,
        select: Select,
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred_ND = x_ND - b_dec_D
        values_NK, indices_NK = select(centred_ND, W_enc_FD, b_enc_F, k)
        x_hat_ND = gather_sum(values_NK, indices_NK, W_dec_FD).add_(b_dec_D)
        ctx.save_for_backward(centred_ND, W_enc_FD, W_dec_FD, values_NK, indices_NK)
        ctx.mark_non_differentiable(indices_NK)
        ctx.set_materialize_grads(False)
        return x_hat_ND, values_NK, indices_NK

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        centred_ND, W_enc_FD, W_dec_FD, values_NK, indices_NK = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_x_hat_ND, grad_values_NK = grads[0], grads[1]
        # Both weights are sorted by the same features: one sort serves them.
        transposed = TransposedIndex(indices_NK, len(W_enc_FD))
        grad_W_dec = grad_b_dec = None
        if grad_x_hat_ND is not None:
            grad_x_hat_ND = grad_x_hat_ND.contiguous()
            through = sampled_dot(grad_x_hat_ND, W_dec_FD, indices_NK)
            grad_values_NK = through if grad_values_NK is None else through + grad_values_NK
            grad_W_dec = transposed.outer_sum(values_NK, grad_x_hat_ND)
            grad_b_dec = grad_x_hat_ND.sum(dim=0)
        if grad_values_NK is None:
            return None, None, None, grad_W_dec, grad_b_dec, None, None
        grad_NK = grad_values_NK * (values_NK > 0)
        grad_W_enc, grad_b_enc, grad_pre_D = _encoder_gradients(transposed, grad_NK, indices_NK, centred_ND, W_enc_FD)
        grad_b_dec = grad_pre_D if grad_b_dec is None else grad_b_dec + grad_pre_D
        grad_x = gather_sum(grad_NK, indices_NK, W_enc_FD) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        return grad_x, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None


def sparse_autoencode(
    x_ND: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    b_dec_D: Tensor,
    k: int,
    select: Select = select_active,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sparse_encode` and `sparse_decode` in one: x̂ = select(W_enc (x - b_dec) + b_enc) W_dec + b_dec.

    Args:
        select: chooses the active features; TopK of ReLU if left out. See `selfreg.sae.activation_fns`.

    Returns:
        x̂ `[N, D]`, values `[N, K]`, indices `[N, K]`; the first two differentiable in all tensors.
    """
    x_hat, values, indices = _SparseAutoencode.apply(x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, k, select)
    return x_hat, values, indices


def sparse_encode(
    x_ND: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_pre_D: Tensor,
    k: int,
    *,
    rectify: bool = True,
    select: Select = select_active,
) -> tuple[Tensor, Tensor]:
    """`TopK(ReLU(W_enc (x - b_pre) + b_enc))` -> values `[N, K]`, indices `[N, K]`; differentiable in all tensors.

    Without `rectify`, the k largest pre-activations as they are: features that are never above zero get no gradient
    through a ReLU, and so could not be revived.
    """
    values, indices = _SparseEncode.apply(x_ND, W_enc_FD, b_enc_F, b_pre_D, k, rectify, select)
    return values, indices


def sparse_decode(values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """`Σ_j values[n, j] · W_dec[indices[n, j]]` -> `[N, D]`; differentiable in values and W_dec."""
    out: Tensor = _SparseDecode.apply(values_NK, indices_NK, W_dec_FD)
    return out
