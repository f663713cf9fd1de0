"""JumpReLU: whatever is above a learned threshold, kept few by an L0 penalty (Rajamanoharan et al. 2024)."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from selfreg.sae.activation_fns.base import Activation, Active, Weights
from selfreg.sae.activation_fns.start import threshold_for
from selfreg.sae.kernels import Select, above, sparse_decode, sparse_encode

BANDWIDTH = 0.5
"""ε, the width of the band around a threshold in which activations teach it something. Pre-activations of centred,
scaled states have a standard deviation of about 1 at the start."""


class _Jump(torch.autograd.Function):
    """pre, θ -> pre · H(pre - θ) and H(pre - θ), with the step's derivative replaced by that of a box of width ε."""

    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        gate = pre > threshold
        ctx.save_for_backward(pre, threshold, gate)
        return pre * gate, gate.to(pre.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold, gate = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_values, grad_gate = grads
        # pre > 0: what lies at or below zero is not among the places that were looked at.
        box = ((pre - threshold).abs() < BANDWIDTH / 2) & (pre > 0)
        return grad_values * gate, -(threshold * grad_values + grad_gate) * box / BANDWIDTH


class JumpReLU(Activation):
    """a(h) = pre · H(pre - θ), θ one a feature, penalised by the mean number of active features over D.

    θ ≥ 0: `SAETrainingMixin.project` holds it there.

    The gradient of θ is the straight-through estimate: ∂a/∂θ = -θ/ε · 1[|pre - θ| < ε/2] and
    ∂H(pre - θ)/∂θ = -1/ε · 1[|pre - θ| < ε/2].
    """

    threshold = "learned"
    penalty = "l0"

    def select_in_inference(self, threshold: Tensor | None) -> Select:
        assert threshold is not None
        return above(threshold.clamp_min(0))

    def encode(self, x_ND: Tensor, weights: Weights, k: int) -> Active:
        assert weights.threshold is not None
        threshold = weights.threshold
        # Also what is just below its threshold: that is where the threshold learns that it is too high.
        near = above((threshold.detach() - BANDWIDTH / 2).clamp_min(0))
        pre, indices = sparse_encode(x_ND, weights.W_enc, weights.b_enc, weights.b_dec, k, select=near)
        at = threshold.index_select(0, indices.flatten()).view_as(pre)
        values, gates = _Jump.apply(pre, at)
        return Active(values, indices, gates.sum() / (len(gates) * weights.W_enc.shape[1]))

    def autoencode(self, x_ND: Tensor, weights: Weights, k: int) -> tuple[Tensor, Active]:
        active = self.encode(x_ND, weights, k)
        return sparse_decode(active.values, active.indices, weights.W_dec) + weights.b_dec, active

    @torch.no_grad()
    def start_from(self, x_ND: Tensor, weights: Weights, k: int) -> None:
        assert weights.threshold is not None
        weights.threshold.fill_(threshold_for(x_ND, weights, k))
