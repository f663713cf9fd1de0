"""RegularizedSequenceClassifier: a linear head on pooled hidden states that knows what it must not use."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.classifier.assembly import check_parts, classifier_config, label_names, unintended_mask
from selfreg.classifier.checkpoint import (
    BACKBONE_OPTIONS,
    BACKBONE_PREFIX,
    HUB_OPTIONS,
    check_saved_whole,
    load_tokenizer_of,
    load_whole_backbone,
    save_parts,
)
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.lora import Lora, add_adapter, check_plain, merge
from selfreg.classifier.outputs import RegularizedClassifierOutput
from selfreg.classifier.pooling_mixin import PoolingMixin
from selfreg.classifier.tasks import Task, num_logits, task_loss
from selfreg.features.selection import UnintendedFeatures
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.hub import MODEL_FILES, UPLOAD_OPTIONS, PushMixin, told_offline, upload_folder
from selfreg.utils.quantized import keep_unpacked
from selfreg.utils.sharding import AFTER_FSDP, check_whole


class RegularizedSequenceClassifier(PushMixin, PoolingMixin, PreTrainedModel):  # type: ignore[misc]
    """Backbone, pooling and a linear head `score`, with the rows of the unintended features.

    logits = score((pool(h') - mean) / scale), h' = h - Σ_c a_c(h) · W_dec[c] where the features are removed. `mean`
    and the one scalar `scale` are set from the training set (for `regression` those of the target too). It needs no
    SAE to run. Of pairs (`preference`) it scores each side by itself. With an adapter (LoRA) `backbone` is peft's
    `PeftModel`, so that its methods are at hand there (`model.backbone.print_trainable_parameters()`).

    Args:
        config (`RegularizedSequenceClassifierConfig`): the configuration.
        backbone (`PreTrainedModel`, *optional*): the language model. Without one only `pooled` states can be scored.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, saved with the classifier.
    """

    config_class = RegularizedSequenceClassifierConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    config: RegularizedSequenceClassifierConfig
    encoder_directions: Tensor
    encoder_bias: Tensor
    decoder_directions: Tensor
    pooled_mean: Tensor
    pooled_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(
        self,
        config: RegularizedSequenceClassifierConfig,
        backbone: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(config)
        shape = (config.num_unintended, config.hidden_size)
        self.task: Task = config.task  # type: ignore[assignment]
        self.score = nn.Linear(config.hidden_size, num_logits(self.task, len(config.id2label or {})))
        self.register_buffer("encoder_directions", torch.zeros(shape))
        self.register_buffer("encoder_bias", torch.zeros(config.num_unintended))
        self.register_buffer("decoder_directions", torch.zeros(shape))
        self.register_buffer("pooled_mean", torch.zeros(config.hidden_size))
        self.register_buffer("pooled_scale", torch.ones(()))
        if self.task == "regression":
            # Of the target, so that the weights of the terms mean the same whatever its unit.
            self.register_buffer("target_mean", torch.zeros(()))
            self.register_buffer("target_scale", torch.ones(()))
        self.backbone: Any = None
        self.tokenizer = tokenizer
        self.post_init()
        if backbone is not None:
            self.set_backbone(backbone)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.score:
            # A linear head on standardised states needs no symmetry broken: from zero, training has no seed to it but
            # the order of the batches, and weights that no gradient moves stay off every feature.
            init.zeros_(self.score.weight)
            init.zeros_(self.score.bias)
        elif module is self:
            for buffer in (self.encoder_directions, self.encoder_bias, self.decoder_directions, self.pooled_mean):
                init.zeros_(buffer)
            init.ones_(self.pooled_scale)
            if self.task == "regression":
                init.zeros_(self.target_mean)
                init.ones_(self.target_scale)

    @classmethod
    def from_backbone(
        cls,
        extractor: HiddenStateExtractor,
        sae: SAEForFeatureExtraction | None,
        unintended: UnintendedFeatures | None,
        *,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        task: Task = "single_label",
        remove_unintended: bool = True,
        lora: Lora | None = None,
    ) -> "RegularizedSequenceClassifier":
        """A classifier with an untrained head. The backbone is frozen: it is named when the classifier is saved, so
        that what training changed in it would be lost. An adapter is saved with the classifier.

        Args:
            extractor: backbone, layer, pooling, template and token rule.
            sae: the SAE that the features are of, to check that all three belong together; may be None.
            unintended: what the classifier must not use; None or empty gives the plain classifier.
            num_labels, id2label: the labels; one of the two. `regression` and `preference` have none.
            task: `"single_label"`, `"multi_label"`, `"regression"` or `"preference"` (a score that is higher for the
                better of two texts).
            remove_unintended: take the features out of the hidden states; those that are unintended for some labels
                only stay in, and are left to the two terms.
            lora: adapt the backbone, up to the layer, while the head is trained: fields of `peft.LoraConfig`, such as
                `{"r": 8}` (all linear layers, where `target_modules` is not given), or any `peft.PeftConfig` that
                adapts layers. The extractor's own backbone stays as it is, and shares its weights. The adapter's
                start is random: set a seed.

        Raises:
            ValueError: the SAE or the features are of another width, layer or model, the labels don't fit the task, or
                the adapter doesn't fit the backbone.
        """
        check_parts(extractor, sae, unintended)
        check_plain(extractor.backbone, "the extractor")
        config = classifier_config(
            extractor,
            unintended,
            task=task,
            id2label=label_names(task, num_labels, id2label),
            remove_unintended=remove_unintended,
        )
        extractor.backbone.requires_grad_(False)
        backbone: Any = extractor.backbone
        if lora is not None:
            check_whole(backbone, "no adapter can be put in", "leave .shard() out, and train with fsdp=True")
            backbone = add_adapter(extractor.backbone, lora, extractor.spec)
            config.adapter = True
        model = cls(config, backbone=backbone, tokenizer=extractor.tokenizer)
        if unintended is not None:
            model.encoder_directions.copy_(unintended.encoder_directions)
            model.encoder_bias.copy_(unintended.encoder_bias)
            model.decoder_directions.copy_(unintended.decoder_directions)
        return model.to(extractor.device)  # type: ignore[arg-type]

    def set_backbone(self, backbone: Any) -> None:
        """Puts a language model under the head: a model of transformers, or peft's over one."""
        keep_unpacked(backbone)
        self.backbone = backbone
        # The backbone is named in the config, not saved, and an adapter has its own file; with this the Trainer
        # neither writes them with the head nor misses them.
        self._keys_to_ignore_on_save = {BACKBONE_PREFIX + key for key in backbone.state_dict()}
        # What FSDP gathers one at a time.
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)

    def merge_adapter(self) -> "RegularizedSequenceClassifier":
        """Works the adapter into the backbone's weights, for faster inference: the logits stay the same.

        The backbone is then no longer the one that the config names, so that it is saved with `save_backbone=True`.

        Raises:
            ValueError: there is no adapter, or peft can't merge this kind.
        """
        if not self.config.adapter:
            raise ValueError("the classifier has no adapter to merge: from_backbone(..., lora={'r': 8}) makes one")
        check_whole(self._require_backbone(), *AFTER_FSDP)
        self.set_backbone(merge(self._require_backbone()))
        self.config.adapter, self.config.adapter_merged = False, True
        return self

    @property
    def backbone_is_frozen(self) -> bool:
        return self.backbone is None or not any(p.requires_grad for p in self.backbone.parameters())

    @property
    def unintended(self) -> UnintendedFeatures:
        """The unintended features, as `from_backbone` took them."""
        spec = self.config.hidden_state_spec()
        return UnintendedFeatures(
            feature_ids=list(self.config.unintended_feature_ids or []),
            reasons=list(self.config.unintended_reasons or []),
            encoder_directions=self.encoder_directions.detach().cpu(),
            encoder_bias=self.encoder_bias.detach().cpu(),
            decoder_directions=self.decoder_directions.detach().cpu(),
            num_features=self.config.sae_num_features or 0,
            spec=spec if spec.model else None,
            input_norm=self.config.input_norm,
            labels=self.config.unintended_labels,
        )

    @property
    def unintended_mask(self) -> Tensor | None:
        """For which labels each feature is unintended, `[L, U]` bool; None: each for all."""
        return unintended_mask(self.config)

    def train(self, mode: bool = True) -> "RegularizedSequenceClassifier":
        super().train(mode)
        if self.backbone is not None and self.backbone_is_frozen:
            # Dropout in a frozen backbone would only blur the states that the head learns from.
            self.backbone.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self._require_backbone().get_input_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """
        Raises:
            ValueError: always: the backbone is named when the classifier is saved, so that new tokens would be lost.
        """
        raise ValueError(
            "the vocabulary is that of the backbone, which a classifier names and does not save: resize and save the "
            "backbone first, and build the extractor and the classifier from it"
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pooled: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
        output_pooled: bool = False,
    ) -> Any:
        """
        Args:
            input_ids, attention_mask (`[batch, tokens]`): what the tokenizer makes of the bare texts, padded on either
                side; the template is put around them here, and what is over `max_length` is cut off.
            labels: for the loss of the task; see `tasks.task_loss`. Class ids `[batch]`, or `[batch, L]` of 0 and 1
                (`multi_label`), or numbers `[batch]` (`regression`).
            pooled (`[batch, hidden_size]`): cached states from `pooled_states`, instead of texts.
            token_type_ids: taken for the sake of tokenizers that give them, and not used.
            return_dict: as in transformers.
            output_pooled: give the pooled states and the activations of the unintended features too.

        Returns:
            `RegularizedClassifierOutput` with `logits` `[batch, num_labels]`, and the loss with labels.
        """
        if (pooled is None) == (input_ids is None):
            raise ValueError("give either input_ids or pooled states")
        activations = None
        if input_ids is not None:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            pooled, activations = self.pool(input_ids, attention_mask)
        assert pooled is not None
        logits = self.logits(pooled)
        loss = None
        if labels is not None:
            if self.task == "preference" and logits.shape[-1] != 2:
                raise ValueError(
                    "a single text has no preference: labels need pooled states of both sides, [N, 2, hidden_size]; "
                    "RegularizedTrainer pairs texts"
                )
            loss = task_loss(self.task, logits, labels, target_scale=self.loss_scale)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        if not output_pooled:
            return RegularizedClassifierOutput(loss=loss, logits=logits)
        return RegularizedClassifierOutput(loss, logits, pooled=pooled, unintended_activations=activations)

    def logits(self, pooled: Tensor) -> Tensor:
        """Raw pooled states `[N, D]` (pairs `[N, 2, D]`) -> logits `[N, L]` (pairs `[N, 2]`)."""
        scores: Tensor = self.score(self.standardize(pooled))
        if self.task == "regression":
            return scores * self.target_scale + self.target_mean
        return scores.squeeze(-1) if pooled.ndim == 3 else scores

    @property
    def loss_scale(self) -> Tensor | float:
        """What a squared error of the target is measured in."""
        return self.target_scale if self.task == "regression" else 1.0

    def standardize(self, pooled: Tensor) -> Tensor:
        """Raw pooled states -> what the head sees."""
        return (pooled.to(self.score.weight.dtype) - self.pooled_mean) / self.pooled_scale

    @torch.no_grad()
    def set_standardization(self, pooled: Tensor, labels: Tensor | None = None) -> None:
        """Sets `pooled_mean` and `pooled_scale` from the raw pooled states `[N, hidden_size]` (pairs: `[N, 2,
        hidden_size]`) of the training set; for `regression` mean and scale of the target too, from `labels` `[N]`.

        Raises:
            ValueError: all states (or targets) are the same, or one is not finite.
        """
        states = pooled.double().flatten(0, -2)
        mean = states.mean(dim=0)
        scale = (states - mean).pow(2).mean().sqrt()
        if not (torch.isfinite(scale) and scale > 0):
            raise ValueError(f"the pooled states have a spread of {float(scale)}: they are all alike, or not finite")
        self.pooled_mean.copy_(mean)
        self.pooled_scale.copy_(scale)
        if self.task == "regression" and labels is not None:
            spread = labels.double().std(correction=0)
            if not (torch.isfinite(spread) and spread > 0):
                raise ValueError(f"the targets have a spread of {float(spread)}: they are all alike, or not finite")
            self.target_mean.copy_(labels.double().mean())
            self.target_scale.copy_(spread)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, save_backbone: bool = False, **kwargs: Any
    ) -> None:
        """Writes head, feature rows, config and tokenizer; and the adapter in peft's own format, in `adapter/`.

        Args:
            save_directory: the folder.
            save_backbone: write the backbone too, so that the folder needs nothing else.
            kwargs: as in transformers.

        Raises:
            ValueError: the backbone has parameters that are trained, and would not be saved.
        """
        if "state_dict" not in kwargs:
            # A backbone that was sharded by itself is not saved.
            check_whole(self, *AFTER_FSDP, within=False)
        check_saved_whole(self.config, self.backbone, save_backbone=save_backbone)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.backbone_saved = save_backbone
        push, hub = kwargs.pop("push_to_hub", False), {k: kwargs.pop(k) for k in UPLOAD_OPTIONS if k in kwargs}
        of_parts = {name: kwargs[name] for name in ("state_dict", "is_main_process") if name in kwargs}
        save_parts(folder, self.config, self.backbone, self.tokenizer, save_backbone=save_backbone, **of_parts)
        super().save_pretrained(folder, **kwargs)
        if push:
            # transformers uploads what its own save_pretrained wrote, which is neither tokenizer nor backbone.
            upload_folder(folder, replaces=MODEL_FILES, **hub)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        backbone: PreTrainedModel | None = None,
        load_backbone_weights: bool = True,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> "RegularizedSequenceClassifier":
        """Loads a classifier, its backbone and its adapter.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            backbone: the backbone without the adapter, if it is in memory already; it stays as it is.
            load_backbone_weights: False for the head alone, which takes cached states.
            is_trainable: train the adapter on, as in peft; False: it is frozen as the backbone is.
            kwargs: as in transformers; `dtype`, `device_map`, `max_memory`, `offload_folder`, `quantization_config`
                and `attn_implementation` are the backbone's. The head stays float32 and goes where the backbone is.

        Raises:
            ValueError: the folder lacks weights of the head.
            FileNotFoundError: the folder lacks the adapter.
            OSError: there is no such folder or repo, or no way to it.
        """
        dtype = kwargs.pop("dtype", None)
        of_backbone: dict[str, Any] = {name: kwargs.pop(name) for name in BACKBONE_OPTIONS if name in kwargs}
        wants_info = kwargs.pop("output_loading_info", False)
        with told_offline(str(pretrained_model_name_or_path)):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, dtype=torch.float32, output_loading_info=True, **kwargs
            )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {', '.join(sorted(info['missing_keys']))}: it is not a whole "
                "classifier; save it again"
            )
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        if load_backbone_weights:
            whole = load_whole_backbone(
                pretrained_model_name_or_path,
                model.config,
                backbone,
                dtype=dtype,
                is_trainable=is_trainable,
                hub=hub,
                options=of_backbone,
            )
            model.set_backbone(whole)
            _move_head(model, whole.device)
        model.tokenizer = load_tokenizer_of(pretrained_model_name_or_path, hub)
        model.eval()
        return (model, info) if wants_info else model  # type: ignore[return-value]


def _move_head(model: RegularizedSequenceClassifier, device: torch.device) -> None:
    """All but the backbone, which may be spread over several devices."""
    model.score.to(device)
    for name, buffer in model.named_buffers(recurse=False):
        model.register_buffer(name, buffer.to(device))
