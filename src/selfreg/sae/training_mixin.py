"""What an SAE needs in training only: where it starts, what is counted, and what holds it in its form."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfreg.sae.activation_fns import Activation, Weights
from selfreg.sae.configuration import SAEConfig
from selfreg.sae.kernels import sampled_dot, select_topk
from selfreg.sae.outputs import SparseFeatures
from selfreg.utils.processes import largest_over, mean_over, together
from selfreg.utils.sharding import own_rows

_THRESHOLD_STEP = 0.01
"""Share of a batch in the running mean of the threshold."""

_SPARSITY_STEP = 0.003
"""How fast the coefficient of the penalty follows what is missing to k active features."""

_PRESSURE_LIMIT = 5.0
"""How many times k (or 1/k) the active features are taken to be at most, where the penalty answers to their number."""


class SAETrainingMixin:
    """The training side of an [`SAEForFeatureExtraction`], whose parameters and buffers these methods work on."""

    config: SAEConfig
    activation: Activation
    training: bool
    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    mean: Tensor
    scale: Tensor
    threshold: Tensor
    tokens_since_fired: Tensor
    sparsity_coefficient: Tensor

    if TYPE_CHECKING:

        @property
        def decoder_weight(self) -> Tensor: ...
        @property
        def _weights(self) -> Weights: ...
        def normalize(self, hidden_states: Tensor) -> Tensor: ...

    @torch.no_grad()
    def set_normalization(self, mean: Tensor, scale: Tensor) -> None:
        """Sets input centring `[hidden_size]` and scale `[]`.

        Raises:
            ValueError: the scale is not positive (all states are the same), or a value is not finite.
        """
        if not (torch.isfinite(mean).all() and torch.isfinite(scale) and scale > 0):
            raise ValueError(f"can't normalise hidden states with mean norm {mean.norm():.3g} and scale {scale:.3g}")
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    @property
    def is_normalized(self) -> bool:
        """Whether centring and scale were set; a new SAE, and one of another library, takes raw states."""
        return bool(self.mean.any() or self.scale != 1)

    @torch.no_grad()
    def start_from(self, hidden_states: Tensor, k: int) -> None:
        """Sets what a new SAE should start with where k features of these raw states are active: thresholds."""
        x = self.normalize(hidden_states)
        self.activation.start_from(x.reshape(-1, x.shape[-1]), self._weights, k)

    @torch.no_grad()
    def rescale(self, mean: Tensor, scale: Tensor) -> None:
        """Another centring and scale, with weights that give the same reconstructions; activations divided by what the
        scale is multiplied with.

        For SAEs of other libraries, which take raw states: rates, bandwidths and penalties are made for states with a
        mean squared norm of hidden_size.
        """
        factor = scale / self.scale
        self.b_dec.copy_((self.b_dec * self.scale + self.mean - mean) / scale)
        self.b_enc.div_(factor)
        if self.activation.threshold != "none":
            self.threshold.div_(factor)
        self.set_normalization(mean, scale)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Takes out of the decoder's gradient what would only change the length of a direction.

        Nothing to do without `normalize_decoder`; a tied weight is the encoder too, whose length is free.
        """
        weight, gradient = self.decoder_weight, self.decoder_weight.grad
        if self.config.normalize_decoder and not self.config.tied and gradient is not None:
            # Row by row: vecdot would hold the elementwise product of the two, as large as the decoder.
            weight, gradient = own_rows(weight), own_rows(gradient)
            rows = torch.arange(len(weight), device=weight.device).unsqueeze(1)
            along = sampled_dot(gradient, weight, rows)
            gradient.addcmul_(along, weight, value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Gives decoder directions unit length, if the config says so."""
        if self.config.normalize_decoder:
            weight = own_rows(self.decoder_weight)
            weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def project(self) -> None:
        """After a step: decoder directions to unit length, thresholds to zero or above.

        A clamp within the forward pass would have no gradient below zero, and a threshold would stay there for good.
        """
        self.normalize_decoder()
        if self.activation.threshold == "learned":
            own_rows(self.threshold).clamp_(min=0)

    @torch.no_grad()
    def count_fired(self, features: SparseFeatures) -> None:
        """Counts up the states since each feature was active, on any process that shares the batch."""
        self.tokens_since_fired += features.values.shape[:-1].numel() * together()
        # Where a value is 0, what stands there did not fire; it is sent to a place behind the last feature.
        places = features.indices.masked_fill(features.values <= 0, self.config.num_features).flatten()
        fired = places.new_zeros(self.config.num_features + 1, dtype=torch.bool).index_fill_(0, places, True)[:-1]
        self.tokens_since_fired.masked_fill_(largest_over(fired), 0)

    @torch.no_grad()
    def max_preactivations(self, hidden_states: Tensor) -> Tensor:
        """The largest pre-activation of every feature over raw states `[N, hidden_size]` -> `[num_features]`."""
        x = self.normalize(hidden_states) - self.b_dec
        maxima = select_topk(x, self.W_enc, self.b_enc, 1, keep_maxima=True)[2]
        assert maxima is not None
        return maxima

    def _penalty(self, sparsity: Tensor, l0: Tensor, k: int, coefficient: float | None) -> Tensor:
        """The sparsity penalty with its weight; without one, the penalty that leads to k active features.

        For an L0 penalty that is (L0 / k - 1)²: of both signs, since a threshold that is too high gets little gradient
        from the reconstruction. For an L1 penalty, c (l0 / k)² L1: at once more where too many are active, while c,
        the buffer `sparsity_coefficient`, follows slowly to where l0 = k.
        """
        if coefficient is not None:
            return coefficient * sparsity
        if self.activation.penalty == "l0":
            # The number over all processes that share the batch, with the gradient of this one's.
            sparsity = sparsity + (mean_over(sparsity) - sparsity).detach()
            return (sparsity * self.config.hidden_size / k - 1) ** 2
        with torch.no_grad():
            ratio = (mean_over(l0) / k).clamp(1 / _PRESSURE_LIMIT, _PRESSURE_LIMIT)
            if self.training:
                self.sparsity_coefficient.mul_((_SPARSITY_STEP * ratio.log()).exp())
            weight = self.sparsity_coefficient * ratio**2
        return weight * sparsity

    @torch.no_grad()
    def _follow_threshold(self, values: Tensor) -> None:
        """Follows the smallest activation that the choice over a batch let through, as a running mean."""
        smallest = -largest_over(-values.masked_fill(values <= 0, torch.inf).amin())
        if torch.isfinite(smallest):
            step = 1.0 if self.threshold <= 0 else _THRESHOLD_STEP
            self.threshold += step * (smallest - self.threshold)
