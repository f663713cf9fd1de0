"""HeadTerms: all of the solver's objective that looks at the weights alone, with its curvature.

Shapes: L logits, D hidden size, U unintended features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfreg.classifier.penalty import dependence_term
from selfreg.classifier.terms import Regularizer


class HeadTerms:
    """penalty, dependence and ridge as one function of the weights, in float64."""

    def __init__(self, regularizer: Regularizer | None, ridge: float) -> None:
        self.ridge = ridge
        self.penalty_weight = self.dependence_weight = 0.0
        self.similarity = ""
        self.mask: Tensor | None = None
        self.directions: list[Tensor] = []
        if regularizer is not None:
            self.regularizer = regularizer
            self.similarity = regularizer.similarity
            self.mask = None if regularizer.mask is None else regularizer.mask.cpu().double()
            self.directions = [rows.cpu().double() for rows in regularizer.directions]
            self.dependence_UD = regularizer.dependence_directions.cpu().double()
            self.penalty_weight = 0.0 if regularizer.empty else regularizer.penalty_weight
            self.dependence_weight = regularizer.dependence_weight if len(self.dependence_UD) else 0.0

    @property
    def scale_free(self) -> bool:
        return self.penalty_weight > 0 and self.similarity in ("cosine", "subspace")

    @property
    def absolute(self) -> bool:
        return self.penalty_weight > 0 and self.similarity != "subspace"

    def __call__(self, weight_LD: Tensor, smoothing: float) -> Tensor:
        value = self.ridge / 2 * weight_LD.pow(2).sum()
        if self.penalty_weight:
            value = value + self.penalty_weight * self._similarity(weight_LD, smoothing)
        if self.dependence_weight:
            value = value + self.dependence_weight * dependence_term(weight_LD, self.dependence_UD, self.mask)
        return value

    def _similarity(self, weight_LD: Tensor, smoothing: float) -> Tensor:
        if self.similarity == "subspace":
            return self.regularizer(weight_LD)[0]
        if self.similarity == "cosine":
            weight_LD = F.normalize(weight_LD, dim=1)
        along_LU = weight_LD @ self.directions[0].T
        # |x| itself at 0, where the square root has no derivative.
        size_LU = along_LU.abs() if smoothing == 0 else (along_LU.pow(2) + smoothing**2).sqrt() - smoothing
        return (size_LU * self._share(size_LU)).sum()

    def _share(self, values_LU: Tensor) -> Tensor:
        """The weight of each pair of logit and feature in a mean over those that count."""
        if self.mask is None:
            return torch.full_like(values_LU, 1 / values_LU.numel())
        return self.mask / self.mask.sum().clamp_min(1)

    def curvature(self, weight_LD: Tensor, smoothing: float) -> Tensor:
        """Estimate of the second derivative by the weights of a logit, averaged over logits: `[D, D]`."""
        labels, width = weight_LD.shape
        total = self.ridge * torch.eye(width, dtype=weight_LD.dtype)
        length_L = weight_LD.norm(dim=1, keepdim=True).clamp_min(smoothing or 1e-4)
        if self.penalty_weight and self.similarity == "subspace":
            scale = 2 * self.penalty_weight / labels / float(length_L.mean()) ** 2 / len(self.directions)
            total += scale * sum(rows.T @ rows for rows in self.directions)
        elif self.penalty_weight:
            along_LU = weight_LD @ self.directions[0].T
            if self.similarity == "cosine":
                along_LU = along_LU / length_L
            bend_LU = self._share(along_LU) / (along_LU.pow(2) + smoothing**2).sqrt()
            if self.similarity == "cosine":
                bend_LU = bend_LU / length_L.pow(2)
            total += self.penalty_weight * (self.directions[0].T * bend_LU.mean(dim=0)) @ self.directions[0]
        if self.dependence_weight:
            share_U = self._share(weight_LD @ self.dependence_UD.T).mean(dim=0)
            total += 2 * self.dependence_weight * (self.dependence_UD.T * share_U) @ self.dependence_UD
        return total
