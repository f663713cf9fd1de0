"""SAEForFeatureExtraction: a sparse autoencoder on the hidden states of a language model."""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from selfreg.sae.activation_fns import ACTIVATIONS
from selfreg.sae.configuration import SAEConfig
from selfreg.sae.kernels import (
    Select,
    select_above,
    select_active,
    select_topk,
    sparse_autoencode,
    sparse_decode,
    sparse_encode,
)

_THRESHOLD_STEP = 0.01
"""Share of a batch in the running mean of the threshold."""

_COUNTERS = frozenset({"tokens_since_fired", "dead_on_task"})
"""Buffers that only training reads; a converted SAE may lack them."""


class SparseFeatures(NamedTuple):
    """The active features of hidden states.

    Attributes:
        indices (`[..., K]`, int64): which features, in no order. K is k for TopK, and the most that any state has for
            activations with a threshold.
        values (`[..., K]`): their activations; 0 where a state has fewer.
        num_features (`int`): width of the dense form.
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
        loss (`[]`): normalised squared error, Σ‖x - x̂‖² / Σ‖x‖² of the centred states, plus the auxiliary loss with
            its coefficient where there is one.
        reconstruction (`[..., hidden_size]`): ĥ, in the space of raw hidden states.
        features (`SparseFeatures`): what was active.
        fvu (`[]`): fraction of variance unexplained, Σ‖h - ĥ‖² / Σ‖h - h̄‖² over these states.
        l0 (`[]`): mean number of active features of a state.
        aux_loss (`[]`, *optional*): the auxiliary loss (in task fine-tuning, the dead features' part) before its
            coefficient; None where nothing is dead.
        live_loss (`[]`, *optional*): the live features' part in task fine-tuning.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    features: SparseFeatures | None = None
    fvu: Tensor | None = None
    l0: Tensor | None = None
    aux_loss: Tensor | None = None
    live_loss: Tensor | None = None


def normalized_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Σ‖x - x̂‖² / Σ‖x‖²."""
    return (x - x_hat).pow(2).sum() / x.pow(2).sum().clamp_min(torch.finfo(x.dtype).tiny)


class SAEForFeatureExtraction(PreTrainedModel):
    """A sparse autoencoder: a(h) = σ(W_enc (x - b_dec) + b_enc), x̂ = a W_dec + b_dec.

    σ chooses a few features: see `SAEConfig.activation` and `selfreg.sae.activation_fns`.

    It takes and gives raw hidden states; inside, x = (h - mean) / scale, with `mean` and `scale` set from data before
    training and saved with the model. Shapes: `W_enc`, `W_dec` `[num_features, hidden_size]`.

    Args:
        config (`SAEConfig`): the configuration.
    """

    config_class = SAEConfig
    base_model_prefix = "sae"
    main_input_name = "hidden_states"
    config: SAEConfig
    mean: Tensor
    scale: Tensor
    tokens_since_fired: Tensor
    dead_on_task: Tensor
    threshold: Tensor

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        shape = (config.num_features, config.hidden_size)
        self.W_enc = nn.Parameter(torch.empty(shape))
        self.b_enc = nn.Parameter(torch.empty(config.num_features))
        if not config.tied:
            self.W_dec = nn.Parameter(torch.empty(shape))
        self.b_dec = nn.Parameter(torch.empty(config.hidden_size))
        self.register_buffer("mean", torch.zeros(config.hidden_size))
        self.register_buffer("scale", torch.ones(()))
        # Training statistics are buffers, so that they are saved, resumed and moved with the weights.
        self.register_buffer("tokens_since_fired", torch.zeros(config.num_features, dtype=torch.long))
        self.register_buffer("dead_on_task", torch.zeros(config.num_features, dtype=torch.bool))
        self.activation = ACTIVATIONS[config.activation]
        if self.activation.learns_threshold:
            self.register_buffer("threshold", torch.zeros(()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is not self:
            return
        decoder = torch.nn.functional.normalize(torch.randn(self.W_enc.shape), dim=1)
        # transformers' own functions: they leave alone what was loaded from a checkpoint.
        init.zeros_(self.b_enc)
        init.zeros_(self.b_dec)
        init.copy_(self.W_enc, decoder)
        if not self.config.tied:
            # An encoder that starts as the decoder's transpose leaves far fewer features dead.
            init.copy_(self.W_dec, decoder)
        init.zeros_(self.mean)
        init.ones_(self.scale)
        init.zeros_(self.tokens_since_fired)
        init.zeros_(self.dead_on_task)
        if self.activation.learns_threshold:
            init.zeros_(self.threshold)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> "SAEForFeatureExtraction":
        """As in transformers; weights stay float32 unless `dtype` says otherwise.

        Raises:
            ValueError: the checkpoint lacks a weight; training counters may be missing.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("dtype", torch.float32)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        missing = sorted(set(info["missing_keys"]) - _COUNTERS)
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {', '.join(missing)}: it is not a whole sparse autoencoder"
            )
        return (model, info) if wants_info else model  # type: ignore[return-value]

    @property
    def decoder_weight(self) -> Tensor:
        """W_dec, or W_enc where they are tied; in the space of the centred, scaled states."""
        return self.W_enc if self.config.tied else self.W_dec

    @property
    def encoder_directions(self) -> Tensor:
        """`[num_features, hidden_size]`, in the space of raw hidden states: pre-activation = direction · h + bias."""
        return self.W_enc / self.scale

    @property
    def encoder_bias(self) -> Tensor:
        """`[num_features]`, the bias that belongs to `encoder_directions`."""
        return self.b_enc - self.W_enc @ (self.b_dec + self.mean / self.scale)

    @property
    def decoder_directions(self) -> Tensor:
        """`[num_features, hidden_size]`, in the space of raw hidden states: what an activation of 1 adds to ĥ."""
        return self.decoder_weight * self.scale

    @property
    def decoder_bias(self) -> Tensor:
        """`[hidden_size]`: ĥ where nothing is active."""
        return self.b_dec * self.scale + self.mean

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
        """Whether centring and scale were set."""
        return bool(self.mean.any() or self.scale != 1)

    def normalize(self, hidden_states: Tensor) -> Tensor:
        """h -> x = (h - mean) / scale, in the dtype of the SAE."""
        return (hidden_states.to(self.W_enc.dtype) - self.mean) / self.scale

    def encode(self, hidden_states: Tensor) -> SparseFeatures:
        """The active features of raw hidden states `[..., hidden_size]`.

        Raises:
            ValueError: the states have another width.
        """
        self._check_width(hidden_states)
        x = self.normalize(hidden_states)
        if not self.activation.learns_threshold or self.threshold <= 0:
            # Without a threshold yet, the first batch has not been seen.
            return self._encode(x, self.config.k, select=select_active)
        return self._encode(x, self.config.k, select=self._select_above)

    def _select_above(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, _k: int) -> tuple[Tensor, Tensor]:
        return select_above(x_ND, W_enc_FD, b_enc_F, self.threshold)

    def decode(self, features: SparseFeatures) -> Tensor:
        """Features -> reconstruction `[..., hidden_size]`, in the space of raw hidden states."""
        return self._decode(features) * self.scale + self.mean

    def forward(
        self,
        hidden_states: Tensor,
        k: int | None = None,
        dead: Tensor | None = None,
        aux_coefficient: float = 0.0,
        dead_loss_weight: float | None = None,
    ) -> SAEOutput:
        """
        Args:
            hidden_states (`[..., hidden_size]`): raw.
            k: active features of a state, `config.k` if None; training starts with more.
            dead (`[num_features]`, bool): features that have not fired for long. They get the auxiliary loss: the
                residual, detached, reconstructed from the dead features alone (Gao et al. 2024).
            aux_coefficient: weight of the auxiliary loss; 0 turns it off.
            dead_loss_weight: where it is given, the loss is that of task fine-tuning with this weight; `dead` are then
                the features that are dead on the task. See `task_loss`.
        """
        self._check_width(hidden_states)
        if dead_loss_weight is not None:
            if dead is None:
                raise ValueError("dead_loss_weight needs dead, the features that are dead on the task")
            loss, live_loss, dead_loss = self.task_loss(hidden_states, dead, dead_loss_weight)
            return SAEOutput(loss, live_loss=live_loss, aux_loss=dead_loss)
        x = self.normalize(hidden_states)
        flat = x.reshape(-1, x.shape[-1])
        k = k or self.config.k
        flat_hat, values, indices = sparse_autoencode(
            flat, self.W_enc, self.b_enc, self.decoder_weight, self.b_dec, k, self._select()
        )
        if self.training and self.activation.learns_threshold:
            self._learn_threshold(values)
        x_hat = flat_hat.view_as(x)
        shape = (*x.shape[:-1], values.shape[1])
        features = SparseFeatures(indices.view(shape), values.view(shape), self.config.num_features)
        error, energy = (flat - flat_hat).pow(2).sum(), flat.pow(2).sum()
        tiny = torch.finfo(x.dtype).tiny
        loss = error / energy.clamp_min(tiny)
        aux_loss = None
        if dead is not None and aux_coefficient > 0:
            # Zero, not an index error, where nothing is dead.
            ids = dead.nonzero().flatten()
            if len(ids):
                aux_loss = self.residual_loss(x, x_hat.detach(), ids, self.config.hidden_size // 2)
                loss = loss + aux_coefficient * aux_loss
        with torch.no_grad():
            # x is centred on the mean of the data: what is subtracted is small.
            variance = energy - flat.mean(dim=0).pow(2).sum() * len(flat)
            fvu = error / variance.clamp_min(tiny)
            l0 = (features.values > 0).sum(dim=-1).float().mean()
        return SAEOutput(loss, x_hat * self.scale + self.mean, features, fvu, l0, aux_loss)

    def residual_loss(self, x: Tensor, x_hat: Tensor, feature_ids: Tensor, k: int) -> Tensor:
        """Normalised squared error of the residual x - x̂ rebuilt from the features `feature_ids` alone, unrectified.

        Args:
            x, x_hat (`[..., hidden_size]`): centred states and their reconstruction, which gets no gradient.
            feature_ids (`[n]`): which features.
            k: how many of them at most.
        """
        residual = (x - x_hat).detach()
        features = self._encode(x, min(k, len(feature_ids)), feature_ids, rectify=False)
        return normalized_error(residual, self._sum(features))

    def task_loss(self, hidden_states: Tensor, dead: Tensor, dead_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """The two-part loss of task fine-tuning (Wu et al. 2025).

        ŷ₁ = decode(TopK over the live features), ŷ₂ = decode(TopK over the dead features);
        loss = nl2(ŷ₁, x) + dead_weight · nl2(ŷ₂, x - stopgrad(ŷ₁)).

        Args:
            hidden_states (`[..., hidden_size]`): raw.
            dead (`[num_features]`, bool): features whose pre-activation is above zero on no token of the task.
            dead_weight: weight of the second part.

        Returns:
            the loss and its two parts, each `[]`.
        """
        x = self.normalize(hidden_states)
        dead_ids = dead.nonzero().flatten()
        live_ids = None if len(dead_ids) == 0 else (~dead).nonzero().flatten()
        k = self.config.k if live_ids is None else min(self.config.k, len(live_ids))
        x_hat = self._decode(self._encode(x, k, live_ids))
        live_loss = normalized_error(x, x_hat)
        dead_loss = torch.zeros_like(live_loss)
        if len(dead_ids) and dead_weight > 0:
            dead_loss = self.residual_loss(x, x_hat.detach(), dead_ids, self.config.k)
        return live_loss + dead_weight * dead_loss, live_loss, dead_loss

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Takes out of the decoder's gradient what would only change the length of a direction.

        Nothing to do without `normalize_decoder`; a tied weight is the encoder too, whose length is free.
        """
        weight = self.decoder_weight
        if self.config.normalize_decoder and not self.config.tied and weight.grad is not None:
            along = torch.linalg.vecdot(weight.grad, weight).unsqueeze(1)
            weight.grad.addcmul_(along, weight, value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Gives decoder directions unit length, if the config says so."""
        if self.config.normalize_decoder:
            weight = self.decoder_weight
            weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def count_fired(self, features: SparseFeatures) -> None:
        """Counts up the states since each feature was active."""
        self.tokens_since_fired += features.values.shape[:-1].numel()
        # Where a value is 0, what stands there did not fire; it is sent to a place behind the last feature.
        fired = features.indices.masked_fill(features.values <= 0, self.config.num_features).flatten()
        counters = torch.cat([self.tokens_since_fired, self.tokens_since_fired.new_zeros(1)])
        self.tokens_since_fired.copy_(counters.index_fill_(0, fired, 0)[:-1])

    @torch.no_grad()
    def max_preactivations(self, hidden_states: Tensor) -> Tensor:
        """The largest pre-activation of every feature over raw states `[N, hidden_size]` -> `[num_features]`."""
        x = self.normalize(hidden_states) - self.b_dec
        maxima = select_topk(x, self.W_enc, self.b_enc, 1, keep_maxima=True)[2]
        assert maxima is not None
        return maxima

    def _select(self) -> Select:
        """How `forward` chooses: in evaluation as `encode` does."""
        if self.training or not self.activation.learns_threshold:
            return self.activation.select
        return self._select_above if self.threshold > 0 else select_active

    @torch.no_grad()
    def _learn_threshold(self, values: Tensor) -> None:
        """Follows the smallest activation that the choice over a batch let through, as a running mean."""
        positive = values[values > 0]
        if len(positive):
            smallest = positive.amin()
            step = 1.0 if self.threshold <= 0 else _THRESHOLD_STEP
            self.threshold += step * (smallest - self.threshold)

    def _encode(
        self,
        x: Tensor,
        k: int,
        feature_ids: Tensor | None = None,
        *,
        rectify: bool = True,
        select: Select | None = None,
    ) -> SparseFeatures:
        W_enc: Tensor = self.W_enc
        b_enc: Tensor = self.b_enc
        if feature_ids is not None:
            W_enc, b_enc = W_enc[feature_ids], b_enc[feature_ids]
        select = select or self._select()
        flat = x.reshape(-1, x.shape[-1])
        values, indices = sparse_encode(flat, W_enc, b_enc, self.b_dec, k, rectify=rectify, select=select)
        if feature_ids is not None:
            indices = feature_ids[indices]
        shape = (*x.shape[:-1], values.shape[1])
        return SparseFeatures(indices.view(shape), values.view(shape), self.config.num_features)

    def _sum(self, features: SparseFeatures) -> Tensor:
        k = features.values.shape[-1]
        flat = sparse_decode(features.values.reshape(-1, k), features.indices.reshape(-1, k), self.decoder_weight)
        return flat.view(*features.values.shape[:-1], self.config.hidden_size)

    def _decode(self, features: SparseFeatures) -> Tensor:
        return self._sum(features) + self.b_dec

    def _check_width(self, hidden_states: Tensor) -> None:
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"the SAE takes hidden states of width {self.config.hidden_size}, these have "
                f"{hidden_states.shape[-1]}: is it an SAE of another backbone?"
            )
