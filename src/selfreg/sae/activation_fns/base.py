"""What an activation is: how the few active features of a state are chosen, in training and in inference."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selfreg.sae.kernels import Select, sparse_autoencode, sparse_encode


class Weights(NamedTuple):
    """The parameters of an SAE, or those of some of its features. F features, D hidden size.

    Attributes:
        W_enc, W_dec: `[F, D]`.
        b_enc: `[F]`.
        b_dec: `[D]`.
        threshold (*optional*): `[]` or `[F]`; see `Activation.threshold`.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None

    def of(self, feature_ids: Tensor) -> "Weights":
        """The weights of these features alone."""
        threshold = self.threshold
        if threshold is not None and threshold.ndim:
            threshold = threshold[feature_ids]
        W_enc, b_enc, W_dec = self.W_enc[feature_ids], self.b_enc[feature_ids], self.W_dec[feature_ids]
        return Weights(W_enc, b_enc, W_dec, self.b_dec, threshold)


class Active(NamedTuple):
    """The active features of N states.

    Attributes:
        values (`[N, K]`): none negative; 0 where a place is not used.
        indices (`[N, K]`): which features.
        sparsity (`[]`, *optional*): what is penalised so that they are few; differentiable.
    """

    values: Tensor
    indices: Tensor
    sparsity: Tensor | None = None

    @property
    def l0(self) -> Tensor:
        """Mean number of active features of a state, `[]`."""
        return (self.values.detach() > 0).sum(dim=1).float().mean()


class Activation(ABC):
    """Chooses the active features of states from the pre-activations `x @ W_enc.T + b_enc`."""

    threshold: Literal["none", "running", "learned"] = "none"
    """What inference compares with: nothing; one number `[]` that training follows; a parameter `[F]` of its own."""

    penalty: Literal["none", "l1", "l0"] = "none"
    """What keeps active features few, where k does not choose them: a penalty on their sum, or on their number."""

    @abstractmethod
    def encode(self, x_ND: Tensor, weights: Weights, k: int) -> Active:
        """The active features of centred, scaled states in training; differentiable."""

    @abstractmethod
    def autoencode(self, x_ND: Tensor, weights: Weights, k: int) -> tuple[Tensor, Active]:
        """Likewise, with the reconstruction x̂ `[N, D]` before them."""

    @abstractmethod
    def select_in_inference(self, threshold: Tensor | None) -> Select:
        """The choice in inference: in such a way that it is the same for a state whatever the batch."""

    @torch.no_grad()  # noqa: B027
    def start_from(self, x_ND: Tensor, weights: Weights, k: int) -> None:
        """Before the first step, sets in place what should start where k features of these states are active."""


class SelectingActivation(Activation):
    """One whose choice in training needs the pre-activations alone: encoder and decoder can share one kernel."""

    @abstractmethod
    def select(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The choice in training.

        Args:
            x_ND: centred states, after the subtraction of b_dec.
            W_enc_FD, b_enc_F: the encoder, or the rows of it that may be chosen.
            k: features of a state, on average.

        Returns:
            values `[N, K]`, none negative, and indices `[N, K]`; 0 where a place is not used.
        """

    def sparsity(self, values: Tensor, indices: Tensor, weights: Weights) -> Tensor | None:
        """What is penalised, `[]`; None where nothing is."""
        return None

    def encode(self, x_ND: Tensor, weights: Weights, k: int) -> Active:
        values, indices = sparse_encode(x_ND, weights.W_enc, weights.b_enc, weights.b_dec, k, select=self.select)
        return Active(values, indices, self.sparsity(values, indices, weights))

    def autoencode(self, x_ND: Tensor, weights: Weights, k: int) -> tuple[Tensor, Active]:
        x_hat, values, indices = sparse_autoencode(
            x_ND, weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec, k, self.select
        )
        return x_hat, Active(values, indices, self.sparsity(values, indices, weights))

    def select_in_inference(self, threshold: Tensor | None) -> Select:
        return self.select
