"""The two extra terms of the loss, with what they need worked out once."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfreg.classifier.arguments import RegularizationArguments
from selfreg.classifier.penalty import dependence_term, orthonormal_basis, similarity_penalty, subspace_share
from selfreg.features.selection import UnintendedFeatures

logger = logging.getLogger(__name__)


class Regularizer:
    """similarity and dependence of a head's weights, for one set of unintended features.

    Args:
        unintended: the features.
        args: weights and similarity.
        mask (`[L, U]`, bool, *optional*): for which labels each feature is unintended; None: for all.

    Attributes:
        directions (`list[Tensor]`): rows of the unintended features at unit length, `[U, D]`; for `"subspace"` an
            orthonormal basis of them, one a label where there is a mask.
        dependence_directions (`[U, D]`): see `penalty.dependence_directions`; none until they are set.
    """

    def __init__(
        self, unintended: UnintendedFeatures, args: RegularizationArguments, mask: Tensor | None = None
    ) -> None:
        self.similarity: Any = args.similarity
        self.penalty_weight, self.dependence_weight = args.term_weights
        self.mask = None if mask is None or bool(mask.all()) else mask
        rows = unintended.encoder_directions if args.similarity == "encoder" else unintended.decoder_directions
        # Worked out once: a decomposition at every step would cost more than the step.
        if args.similarity != "subspace":
            self.directions = [F.normalize(rows, dim=1)]
        elif self.mask is None:
            self.directions = [orthonormal_basis(rows)]
        else:
            self.directions = [orthonormal_basis(rows[of_label]) for of_label in self.mask]
        self.dependence_directions = rows[:0]
        self.empty = len(unintended) == 0
        if self.empty and (self.penalty_weight or self.dependence_weight):
            logger.warning("the set of unintended features is empty: this trains the plain classifier")

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the head's weights `[L, D]`, before their coefficients."""
        dependence = dependence_term(weight, self.dependence_directions.to(weight), self._mask(weight))
        if self.empty:
            return weight.new_zeros(()), dependence
        directions = [rows.to(weight) for rows in self.directions]
        if self.similarity != "subspace":
            return similarity_penalty(weight, directions[0], self.similarity, self._mask(weight)), dependence
        if self.mask is None:
            return subspace_share(weight, directions[0]), dependence
        shares = [subspace_share(weight[y : y + 1], basis) for y, basis in enumerate(directions)]
        return torch.stack(shares).mean(), dependence

    def _mask(self, weight: Tensor) -> Tensor | None:
        return None if self.mask is None else self.mask.to(weight.device)
