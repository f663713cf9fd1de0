"""SAEForFeatureExtraction: a sparse autoencoder on the hidden states of a language model."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from selfreg.sae.activation_fns import ACTIVATIONS, Active, Weights
from selfreg.sae.configuration import SAEConfig
from selfreg.sae.input_norm import Standardized, standardize
from selfreg.sae.interop.formats import read_foreign
from selfreg.sae.interop.locate import Place, locate
from selfreg.sae.kernels import sparse_decode, sparse_encode
from selfreg.sae.outputs import SAEOutput, SparseFeatures, normalized_error
from selfreg.sae.prefixes import decode_prefixes
from selfreg.sae.training_mixin import SAETrainingMixin
from selfreg.utils.hub import PushMixin
from selfreg.utils.processes import mean_over, sum_over
from selfreg.utils.sharding import AFTER_FSDP, check_whole

_HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")

_COUNTERS = frozenset({"tokens_since_fired", "dead_on_task", "sparsity_coefficient"})
"""Buffers that only training reads; a converted SAE may lack them."""


class SAEForFeatureExtraction(PushMixin, SAETrainingMixin, PreTrainedModel):  # type: ignore[misc]
    """A sparse autoencoder: a(h) = σ(W_enc (x - b_dec) + b_enc), x̂ = a W_dec + b_dec.

    σ chooses a few features: see `SAEConfig.activation` and `selfreg.sae.activation_fns`.

    It takes and gives raw hidden states; inside, x = (norm(h) - mean) / scale, with `mean` and `scale` set from data
    before training and saved with the model, and norm the normalisation of each state by itself that some published
    SAEs have (`SAEConfig.input_norm`). Shapes: `W_enc`, `W_dec` `[num_features, hidden_size]`.

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
    sparsity_coefficient: Tensor
    prefix_ends: Tensor

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
        if self.activation.threshold == "running":
            self.register_buffer("threshold", torch.zeros(()))
        elif self.activation.threshold == "learned":
            self.threshold = nn.Parameter(torch.zeros(config.num_features))
        if self.activation.penalty == "l1":
            self.register_buffer("sparsity_coefficient", torch.ones(()))
        self.register_buffer("prefix_ends", torch.tensor(config.prefixes or [], dtype=torch.long), persistent=False)
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
        if self.activation.threshold != "none":
            init.zeros_(self.threshold)
        if self.activation.penalty == "l1":
            init.ones_(self.sparsity_coefficient)
        # Not in the checkpoint: on the meta device it has lost its values.
        init.copy_(self.prefix_ends, torch.tensor(self.config.prefixes or [], dtype=torch.long))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> "SAEForFeatureExtraction":
        """As in transformers, and other libraries' SAEs as well; weights stay float32 unless `dtype` says otherwise.

        Reads folders and Hub repos (with `subfolder` where there are many) of SAELens, Gemma Scope, sparsify,
        dictionary_learning, the sparse autoencoder module of sentence-transformers, and the `.pth` files of the
        paper's authors; see `selfreg.sae.interop`. What such a file does not say can be given:
        `base_model_name_or_path=`, `layer=`, `token_rule=`, …

        Raises:
            ValueError: the checkpoint lacks a weight (training counters may be missing), or has an option that is not
                known; or there are many SAEs at that place: lists them.
            OSError: there is no such folder or repo.
        """
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        kwargs.setdefault("dtype", torch.float32)
        if not {"config", "state_dict"} & set(kwargs):
            hub = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
            place = locate(pretrained_model_name_or_path, **hub)
            if not place.is_own:
                return cls._from_foreign(place, {name: value for name, value in kwargs.items() if name not in hub})
        wants_info = kwargs.pop("output_loading_info", False)
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

    @classmethod
    def _from_foreign(cls, place: Place, kwargs: dict[str, Any]) -> "SAEForFeatureExtraction":
        foreign = read_foreign(place.path, place.name)
        own = SAEConfig.__annotations__
        foreign.settings |= {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        config, state = foreign.convert()
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **kwargs
        )
        model, info = loaded
        model.eval()
        return (model, info) if wants_info else model  # type: ignore[return-value]

    @property
    def decoder_weight(self) -> Tensor:
        """W_dec, or W_enc where they are tied; in the space of the centred, scaled states."""
        return self.W_enc if self.config.tied else self.W_dec

    @property
    def encoder_directions(self) -> Tensor:
        """`[num_features, hidden_size]`, in the space of hidden states (after `input_norm`, where there is one):
        pre-activation = direction · h + bias."""
        return self.W_enc / self.scale

    @property
    def encoder_bias(self) -> Tensor:
        """`[num_features]`, the bias that belongs to `encoder_directions`."""
        return self.b_enc - self.W_enc @ (self.b_dec + self.mean / self.scale)

    @property
    def decoder_directions(self) -> Tensor:
        """`[num_features, hidden_size]`, in the same space: what an activation of 1 adds to ĥ."""
        return self.decoder_weight * self.scale

    @property
    def decoder_bias(self) -> Tensor:
        """`[hidden_size]`: ĥ where nothing is active."""
        return self.b_dec * self.scale + self.mean

    def normalize(self, hidden_states: Tensor) -> Tensor:
        """h -> x = (norm(h) - mean) / scale, in the dtype of the SAE."""
        return self._normalize(self._standardize(hidden_states))

    def encode(self, hidden_states: Tensor) -> SparseFeatures:
        """The active features of raw hidden states `[..., hidden_size]`.

        Raises:
            ValueError: the states have another width.
        """
        self._check_width(hidden_states)
        x = self.normalize(hidden_states)
        flat = x.reshape(-1, x.shape[-1])
        return self._features(self._encode_in_inference(flat), x.shape[:-1])

    def decode(self, features: SparseFeatures, hidden_states: Tensor | None = None) -> Tensor:
        """Features -> reconstruction `[..., hidden_size]`, in the space of raw hidden states.

        Args:
            features: from `encode`.
            hidden_states (*optional*): the raw states that they are of; needed where `config.input_norm` normalises
                each state by itself, since the features alone no longer tell its length.

        Raises:
            ValueError: the states are needed and not given.
        """
        if hidden_states is None and self.config.input_norm != "none":
            raise ValueError(
                f"this SAE normalises each state by itself (input_norm={self.config.input_norm!r}): "
                "give decode(features, hidden_states) the states as well"
            )
        decoded = self._sum(features) + self.b_dec
        if hidden_states is None:
            return self._denormalize(decoded)
        return self._standardize(hidden_states).restore(self._denormalize(decoded))

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """As in transformers.

        Raises:
            ValueError: FSDP has dealt out the weights.
        """
        if "state_dict" not in kwargs:
            check_whole(self, *AFTER_FSDP, within=False)
        super().save_pretrained(save_directory, **kwargs)

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: it reads hidden states, not tokens. accelerate asks, before it shards a model."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: Tensor,
        k: int | None = None,
        dead: Tensor | None = None,
        aux_coefficient: float = 0.0,
        dead_loss_weight: float | None = None,
        sparsity_coefficient: float | None = None,
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
            sparsity_coefficient: weight of the penalty of `relu` and `jumprelu`; None leads to k active features.
        """
        self._check_width(hidden_states)
        if dead_loss_weight is not None:
            if dead is None:
                raise ValueError("dead_loss_weight needs dead, the features that are dead on the task")
            return self.task_loss(hidden_states, dead, dead_loss_weight, sparsity_coefficient)
        standardized = self._standardize(hidden_states)
        x = self._normalize(standardized)
        flat = x.reshape(-1, x.shape[-1])
        k = k or self.config.k
        if self.training:
            flat_hat, active, prefix_error = self._autoencode(flat, k, self._weights, self.prefix_ends)
        else:
            active, prefix_error = self._encode_in_inference(flat), None
            flat_hat = sparse_decode(active.values, active.indices, self.decoder_weight) + self.b_dec
        x_hat = flat_hat.view_as(x)
        features = self._features(active, x.shape[:-1])
        error, energy = (flat - flat_hat).pow(2).sum(), flat.pow(2).sum()
        tiny = torch.finfo(x.dtype).tiny
        loss = (error if prefix_error is None else prefix_error) / mean_over(energy).clamp_min(tiny)
        if active.sparsity is not None:
            loss = loss + self._penalty(active.sparsity, active.l0, k, sparsity_coefficient)
        aux_loss = None
        if dead is not None and aux_coefficient > 0:
            # Zero, not an index error, where nothing is dead.
            ids = dead.nonzero().flatten()
            if len(ids):
                aux_loss = self.residual_loss(x, x_hat.detach(), ids, self.config.hidden_size // 2)
                loss = loss + aux_coefficient * aux_loss
        reconstruction = standardized.restore(self._denormalize(x_hat))
        with torch.no_grad():
            if self.config.input_norm == "none":
                # x is centred on the mean of the data: what is subtracted is small.
                fvu = _unexplained(error, energy, flat.mean(dim=0), len(flat))
            else:
                raw = hidden_states.reshape(-1, x.shape[-1]).to(x.dtype)
                centre = mean_over(raw.mean(dim=0))
                missed, centred = (raw - reconstruction.view_as(raw)).pow(2).sum(), raw - centre
                fvu = _unexplained(missed, centred.pow(2).sum(), centred.mean(dim=0), len(raw))
        return SAEOutput(loss, reconstruction, features, fvu, active.l0, aux_loss, sparsity=active.sparsity)

    def residual_loss(self, x: Tensor, x_hat: Tensor, feature_ids: Tensor, k: int) -> Tensor:
        """Normalised squared error of the residual x - x̂ rebuilt from the features `feature_ids` alone, unrectified.

        Args:
            x, x_hat (`[..., hidden_size]`): centred states and their reconstruction, which gets no gradient.
            feature_ids (`[n]`): which features.
            k: how many of them at most.
        """
        residual = (x - x_hat).detach().reshape(-1, x.shape[-1])
        weights = self._weights.of(feature_ids)
        values, indices = sparse_encode(
            x.reshape(-1, x.shape[-1]),
            weights.W_enc,
            weights.b_enc,
            weights.b_dec,
            min(k, len(feature_ids)),
            rectify=False,
        )
        return normalized_error(residual, sparse_decode(values, indices, weights.W_dec))

    def task_loss(
        self, hidden_states: Tensor, dead: Tensor, dead_weight: float, sparsity_coefficient: float | None = None
    ) -> SAEOutput:
        """The two-part loss of task fine-tuning (Wu et al. 2025).

        ŷ₁ = decode(TopK over the live features), ŷ₂ = decode(TopK over the dead features);
        loss = nl2(ŷ₁, x) + dead_weight · nl2(ŷ₂, x - stopgrad(ŷ₁)).

        Args:
            hidden_states (`[..., hidden_size]`): raw.
            dead (`[num_features]`, bool): features that are active on no token of the task; see
                `SAETrainer.split_task_features`.
            dead_weight: weight of the second part.
            sparsity_coefficient: as for `forward`.

        Returns:
            the loss with `live_loss` (the sparsity penalty and the mean over prefixes in it, where there are such) and
            `aux_loss` (the dead features' part).
        """
        x = self.normalize(hidden_states)
        x = x.reshape(-1, x.shape[-1])
        dead_ids = dead.nonzero().flatten()
        weights, ends = self._weights, self.prefix_ends
        if len(dead_ids):
            live_ids = (~dead).nonzero().flatten()
            # How many of the live features a prefix holds.
            weights, ends = weights.of(live_ids), torch.searchsorted(live_ids, ends)
        x_hat, active, prefix_error = self._autoencode(x, min(self.config.k, len(weights.W_enc)), weights, ends)
        live_loss = normalized_error(x, x_hat)
        if prefix_error is not None:
            live_loss = prefix_error / mean_over(x.pow(2).sum()).clamp_min(torch.finfo(x.dtype).tiny)
        if active.sparsity is not None:
            # Without it, what is active would grow in number and buy a lower error.
            live_loss = live_loss + self._penalty(active.sparsity, active.l0, self.config.k, sparsity_coefficient)
        dead_loss = torch.zeros_like(live_loss)
        if len(dead_ids) and dead_weight > 0:
            dead_loss = self.residual_loss(x, x_hat.detach(), dead_ids, self.config.k)
        loss = live_loss + dead_weight * dead_loss
        return SAEOutput(loss, l0=active.l0, aux_loss=dead_loss, live_loss=live_loss, sparsity=active.sparsity)

    @property
    def _weights(self) -> Weights:
        threshold = self.threshold if self.activation.threshold != "none" else None
        return Weights(self.W_enc, self.b_enc, self.decoder_weight, self.b_dec, threshold)

    def _autoencode(
        self, x_ND: Tensor, k: int, weights: Weights, ends: Tensor
    ) -> tuple[Tensor, Active, Tensor | None]:
        """In training: x̂, what is active, and where there are prefixes the mean over them of Σ‖x - x̂‖²."""
        error = None
        if self.config.prefixes is None:
            x_hat_ND, active = self.activation.autoencode(x_ND, weights, k)
        else:
            active = self.activation.encode(x_ND, weights, k)
            x_hat_NPD = decode_prefixes(active.values, active.indices, weights.W_dec, ends) + weights.b_dec
            error = (x_ND.unsqueeze(1) - x_hat_NPD).pow(2).sum() / len(ends)
            x_hat_ND = x_hat_NPD[:, -1]
        if self.training and self.activation.threshold == "running":
            self._follow_threshold(active.values)
        return x_hat_ND, active, error

    def _encode_in_inference(self, x_ND: Tensor) -> Active:
        weights = self._weights
        select = self.activation.select_in_inference(weights.threshold)
        values, indices = sparse_encode(
            x_ND, weights.W_enc, weights.b_enc, weights.b_dec, self.config.k, select=select
        )
        return Active(values, indices)

    def _features(self, active: Active, shape: torch.Size) -> SparseFeatures:
        shape = torch.Size((*shape, active.values.shape[1]))
        return SparseFeatures(active.indices.view(shape), active.values.view(shape), self.config.num_features)

    def _sum(self, features: SparseFeatures) -> Tensor:
        k = features.values.shape[-1]
        flat = sparse_decode(features.values.reshape(-1, k), features.indices.reshape(-1, k), self.decoder_weight)
        return flat.view(*features.values.shape[:-1], self.config.hidden_size)

    def _standardize(self, hidden_states: Tensor) -> Standardized:
        return standardize(hidden_states.to(self.W_enc.dtype), self.config.input_norm)

    def _normalize(self, standardized: Standardized) -> Tensor:
        return (standardized.states - self.mean) / self.scale

    def _denormalize(self, x: Tensor) -> Tensor:
        return x * self.scale + self.mean

    def _check_width(self, hidden_states: Tensor) -> None:
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"the SAE takes hidden states of width {self.config.hidden_size}, these have "
                f"{hidden_states.shape[-1]}: is it an SAE of another backbone?"
            )


def _unexplained(error: Tensor, energy: Tensor, mean_D: Tensor, count: int) -> Tensor:
    """The FVU of states with this sum of squares and this mean, over all processes that share the batch."""
    sums = sum_over(torch.cat([torch.stack([error, energy, energy.new_tensor(float(count))]), mean_D * count]))
    variance = sums[1] - sums[3:].pow(2).sum() / sums[2]
    return sums[0] / variance.clamp_min(torch.finfo(energy.dtype).tiny)
