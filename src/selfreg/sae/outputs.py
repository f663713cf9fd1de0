"""What an SAE gives: sparse features, and the outcome of a forward pass."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from selfreg.utils.processes import mean_over


class SparseFeatures(NamedTuple):
    """The active features of hidden states.

    Attributes:
        indices (`[..., K]`, int64): which features, in no order. K is k for TopK, and the most that any state has for
            activations with a threshold.
        values (`[..., K]`): their activations; 0 where a state has fewer.
        num_features (`int`): width of the dense form.

    Example:
        >>> import torch
        >>> SparseFeatures(torch.tensor([[2, 0]]), torch.tensor([[1.5, 0.5]]), 4).to_dense()
        tensor([[0.5000, 0.0000, 1.5000, 0.0000]])
    """

    indices: Tensor
    values: Tensor
    num_features: int

    def to_dense(self) -> Tensor:
        """`[..., num_features]`."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.num_features)
        return dense.scatter_add(-1, self.indices, self.values)


@dataclass
class SAEOutput(ModelOutput):
    """
    Attributes:
        loss (`[]`): normalised squared error, Σ‖x - x̂‖² / Σ‖x‖² of the centred states (in training its mean over
            the prefixes of a Matryoshka SAE), plus, in training, the auxiliary loss and the sparsity penalty with
            their coefficients where there are such.
        reconstruction (`[..., hidden_size]`): ĥ, in the space of raw hidden states.
        features (`SparseFeatures`): what was active.
        fvu (`[]`): fraction of variance unexplained, Σ‖h - ĥ‖² / Σ‖h - h̄‖² over these states.
        l0 (`[]`): mean number of active features of a state.
        aux_loss (`[]`, *optional*): the auxiliary loss (in task fine-tuning, the dead features' part) before its
            coefficient; None where nothing is dead.
        live_loss (`[]`, *optional*): the live features' part in task fine-tuning.
        sparsity (`[]`, *optional*): what `relu` and `jumprelu` are penalised for, before its coefficient.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    features: SparseFeatures | None = None
    fvu: Tensor | None = None
    l0: Tensor | None = None
    aux_loss: Tensor | None = None
    live_loss: Tensor | None = None
    sparsity: Tensor | None = None


def normalized_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Σ‖x - x̂‖² / Σ‖x‖²; the denominator over all processes that share the batch (see `one_batch`)."""
    return (x - x_hat).pow(2).sum() / mean_over(x.pow(2).sum()).clamp_min(torch.finfo(x.dtype).tiny)
