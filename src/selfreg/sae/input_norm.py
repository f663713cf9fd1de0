"""Normalisation of each hidden state by itself, which some published SAEs were trained with."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

InputNorm = Literal["none", "rms", "layer_norm"]

_EPSILON = 1e-5
"""As SAELens, OpenAI's SAEs and sentence-transformers have it: in the forward direction only."""


class Standardized(NamedTuple):
    """States `[..., D]` that were normalised one by one, and what brings them back: h = states · factor + shift."""

    states: Tensor
    shift: Tensor | None
    factor: Tensor | float | None

    def restore(self, reconstruction: Tensor) -> Tensor:
        """A reconstruction of `states`, in the space of raw hidden states."""
        if self.factor is not None:
            reconstruction = reconstruction * self.factor
        return reconstruction if self.shift is None else reconstruction + self.shift


def length_factor(hidden_states: Tensor, kind: InputNorm) -> Tensor | float:
    """What a decoder direction is multiplied with on its way back to raw states `[..., D]` -> `[..., 1]`."""
    if kind == "none":
        return 1.0
    if kind == "rms":
        return torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True) / hidden_states.shape[-1] ** 0.5
    return hidden_states.std(dim=-1, keepdim=True)


def standardize(hidden_states: Tensor, kind: InputNorm) -> Standardized:
    """
    - `"none"`: as they are;
    - `"rms"`: h · √D / ‖h‖ (SAELens' `constant_norm_rescale`);
    - `"layer_norm"`: (h - m) / (s + 1e-5), m and s mean and standard deviation (D - 1) over the dimensions of a state.
    """
    if kind == "none":
        return Standardized(hidden_states, None, None)
    if kind == "rms":
        factor = torch.as_tensor(length_factor(hidden_states, kind))
        # A state of zeros has no direction to keep.
        return Standardized(hidden_states / factor.clamp_min(torch.finfo(factor.dtype).tiny), None, factor)
    shift = hidden_states.mean(dim=-1, keepdim=True)
    spread = length_factor(hidden_states, kind)
    return Standardized((hidden_states - shift) / (spread + _EPSILON), shift, spread)
