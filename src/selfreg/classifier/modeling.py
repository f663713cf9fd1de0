"""RegularizedSequenceClassifier: a linear head on pooled hidden states that knows what it must not use."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from selfreg.activations.backbone import hidden_states_at, load_backbone, resolve_model
from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.prompt import wrap_batch
from selfreg.activations.store import ActivationStore
from selfreg.classifier.assembly import check_parts, classifier_config, label_names, unintended_mask
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.pooling import FeatureRows, pool_store, pool_texts, pool_tokens
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import Task, as_targets, num_logits, task_loss
from selfreg.features.selection import UnintendedFeatures
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.hub import UPLOAD_OPTIONS, upload_folder

BACKBONE_FOLDER = "backbone"
_BACKBONE_PREFIX = "backbone."


class RegularizedSequenceClassifier(PreTrainedModel):
    """Backbone, pooling and a linear head `score`, with the rows of the unintended features.

    logits = score((pool(h') - mean) / scale), h' = h - Σ_c a_c(h) · W_dec[c] where the features are removed. `mean`
    and the one scalar `scale` are set from the training set (for `regression` those of the target too). It needs no
    SAE to run. Of pairs (`preference`) it scores each side by itself.

    Args:
        config (`RegularizedSequenceClassifierConfig`): the configuration.
        backbone (`PreTrainedModel`, *optional*): the language model. Without one only `pooled` states can be scored.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, saved with the classifier.
    """

    config_class = RegularizedSequenceClassifierConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
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
        self.backbone: PreTrainedModel | None = None
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
    ) -> "RegularizedSequenceClassifier":
        """A classifier with an untrained head. The backbone is frozen: it is named when the classifier is saved, so
        that what training changed in it would be lost.

        Args:
            extractor: backbone, layer, pooling, template and token rule.
            sae: the SAE that the features are of, to check that all three belong together; may be None.
            unintended: what the classifier must not use; None or empty gives the plain classifier.
            num_labels, id2label: the labels; one of the two. `regression` and `preference` have none.
            task: `"single_label"`, `"multi_label"`, `"regression"` or `"preference"` (a score that is higher for the
                better of two texts).
            remove_unintended: take the features out of the hidden states; those that are unintended for some labels
                only stay in, and are left to the two terms.

        Raises:
            ValueError: the SAE or the features are of another width, layer or model, or the labels don't fit the task.
        """
        check_parts(extractor, sae, unintended)
        config = classifier_config(
            extractor,
            unintended,
            task=task,
            id2label=label_names(task, num_labels, id2label),
            remove_unintended=remove_unintended,
        )
        extractor.backbone.requires_grad_(False)
        model = cls(config, backbone=extractor.backbone, tokenizer=extractor.tokenizer)
        if unintended is not None:
            model.encoder_directions.copy_(unintended.encoder_directions)
            model.encoder_bias.copy_(unintended.encoder_bias)
            model.decoder_directions.copy_(unintended.decoder_directions)
        return model.to(extractor.device)  # type: ignore[arg-type]

    def set_backbone(self, backbone: PreTrainedModel) -> None:
        """Puts a language model under the head."""
        self.backbone = backbone
        # The backbone is named in the config, not saved; with this the Trainer neither writes it nor misses it.
        self._keys_to_ignore_on_save = {_BACKBONE_PREFIX + key for key in backbone.state_dict()}

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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pooled: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """
        Args:
            input_ids, attention_mask (`[batch, tokens]`): what the tokenizer makes of the bare texts, padded on either
                side; the template is put around them here, and what is over `max_length` is cut off.
            labels (`[batch]`): class ids.
            pooled (`[batch, hidden_size]`): cached states from `pooled_states`, instead of texts.
            token_type_ids: taken for the sake of tokenizers that give them, and not used.
            return_dict: as in transformers.

        Returns:
            `SequenceClassifierOutput` with `logits` `[batch, num_labels]`, and the mean cross-entropy with labels.
        """
        if (pooled is None) == (input_ids is None):
            raise ValueError("give either input_ids or pooled states")
        if input_ids is not None:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            pooled, _ = self.pool(input_ids, attention_mask)
        assert pooled is not None
        logits = self.logits(pooled)
        loss = None
        if labels is not None:
            loss = task_loss(self.task, logits, labels, target_scale=self.loss_scale)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

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

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Texts as the tokenizer gives them -> raw pooled states `[batch, hidden_size]`, after removal where it is on,
        and the largest activation of each unintended feature `[batch, U]`."""
        config = self.config
        backbone = self._require_backbone()
        batch = wrap_batch(config.layout(), input_ids, attention_mask, config.pad_id)
        empty = (~batch.text_mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"text {empty[0]} of the batch is empty: it has no token to take a state from")
        hidden = hidden_states_at(
            backbone,
            config.layer,  # type: ignore[arg-type]
            batch.input_ids,
            batch.attention_mask,
        ).float()
        return pool_tokens(config, hidden, batch, self._rows())

    def pooled_states(
        self,
        texts: Any,
        labels: Any,
        *,
        activations_of: UnintendedFeatures | None = None,
        weights: Any = None,
        margins: Any = None,
    ) -> PooledStates:
        """Runs the backbone over texts once.

        Args:
            texts: strings, or an `ActivationStore` of the same backbone, layer and settings. For `preference` the two
                sides of each pair one after the other, the chosen one first: 2N texts; see `render_pairs`.
            labels: class ids `[N]`; `[N, L]` of 0 and 1 (`multi_label`); numbers `[N]` (`regression`); None for pairs.
            activations_of: features whose activations to note; the classifier's own if None.
            weights (`[N]`, *optional*): weight of each text (or pair) in the loss.
            margins (`[N]`, *optional*): of pairs: by how much the chosen side should win at least.

        Raises:
            ValueError: an empty text, a label that is no class id, or a store of other states.
        """
        rows = self._rows()
        if activations_of is not None:
            rows = rows._replace(
                watched_directions=activations_of.encoder_directions,
                watched_bias=activations_of.encoder_bias,
                watched_norm=activations_of.input_norm,
            ).to(self.score.weight.device)
        with torch.inference_mode():
            if isinstance(texts, ActivationStore):
                pooled, activations = pool_store(self.config, texts, rows)
            else:
                pooled, activations = pool_texts(self.config, self.extractor(), list(texts), rows)
        # Copies: tensors of inference mode could not be trained on.
        pooled, activations = pooled.clone(), activations.clone()
        if self.task == "preference":
            if len(pooled) % 2:
                raise ValueError(
                    f"{len(pooled)} texts can't be pairs: give the chosen and the rejected one of each pair"
                )
            pooled, activations = pooled.unflatten(0, (-1, 2)), activations.unflatten(0, (-1, 2))
            labels = [0] * len(pooled)
        return PooledStates(
            pooled,
            activations,
            as_targets(self.task, labels, self.score.out_features, "labels"),
            removed=self.config.remove_unintended,
            weights=_column(weights),
            margins=_column(margins),
        )

    def _rows(self) -> FeatureRows:
        mask = self.unintended_mask
        decoder = self.decoder_directions
        if mask is not None:
            # What is unintended for some labels only can't be taken out of the one state that all labels read.
            decoder = decoder * mask.all(dim=0).unsqueeze(1).to(decoder)
        return FeatureRows(self.encoder_directions, self.encoder_bias, decoder, self.config.input_norm)

    def extractor(self) -> HiddenStateExtractor:
        """The extractor that gives the states this classifier reads."""
        if self.tokenizer is None:
            raise ValueError("the classifier has no tokenizer: load it with from_pretrained, or set model.tokenizer")
        spec = self.config.hidden_state_spec()
        return HiddenStateExtractor(
            self._require_backbone(),
            self.tokenizer,
            layer=spec.layer,
            pooling=self.config.pooling,  # type: ignore[arg-type]
            max_length=spec.max_length,
            template=spec.template,
            token_rule=spec.token_rule,
            name=spec.model,
            revision=spec.revision,
            gguf_file=spec.gguf_file,
        )

    def _require_backbone(self) -> PreTrainedModel:
        if self.backbone is None:
            raise ValueError(
                "this classifier was loaded without its backbone, so that it takes pooled states only; load it with "
                "from_pretrained to get both"
            )
        return self.backbone

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, save_backbone: bool = False, **kwargs: Any
    ) -> None:
        """Writes head, feature rows, config and tokenizer.

        Args:
            save_directory: the folder.
            save_backbone: write the backbone too, so that the folder needs nothing else.
            kwargs: as in transformers.

        Raises:
            ValueError: the backbone has parameters that are trained, and would not be saved.
        """
        if not (self.backbone_is_frozen or save_backbone):
            raise ValueError(
                "the backbone has trainable parameters, and only its name would be saved: save_backbone=True saves "
                "it too, model.backbone.requires_grad_(False) says that it is as it was"
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.backbone_saved = save_backbone
        push, hub = kwargs.pop("push_to_hub", False), {k: kwargs.pop(k) for k in UPLOAD_OPTIONS if k in kwargs}
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if save_backbone:
            self._require_backbone().save_pretrained(folder / BACKBONE_FOLDER)
        super().save_pretrained(folder, **kwargs)
        if push:
            # transformers uploads what its own save_pretrained wrote, which is neither tokenizer nor backbone.
            upload_folder(folder, **hub)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        backbone: PreTrainedModel | None = None,
        load_backbone_weights: bool = True,
        **kwargs: Any,
    ) -> "RegularizedSequenceClassifier":
        """Loads a classifier and its backbone.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            backbone: the backbone, if it is in memory already.
            load_backbone_weights: False for the head alone, which takes cached states.
            kwargs: as in transformers; `dtype`, `device_map` and `attn_implementation` are the backbone's. The head
                stays float32 and goes where the backbone is.

        Raises:
            ValueError: the folder lacks weights of the head.
        """
        dtype = kwargs.pop("dtype", None)
        of_backbone = {k: kwargs.pop(k) for k in ("attn_implementation", "device_map") if k in kwargs}
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, dtype=torch.float32, output_loading_info=True, **kwargs
        )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {', '.join(sorted(info['missing_keys']))}: it is not a whole "
                "classifier; save it again"
            )
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
        if load_backbone_weights:
            if backbone is None:
                backbone = model._load_backbone(pretrained_model_name_or_path, dtype, hub, of_backbone)
            model.set_backbone(backbone)
            _move_head(model, backbone.device)
        try:
            model.tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
        except (OSError, ValueError):
            # A head alone is still good for cached states; what needs a tokenizer says so.
            model.tokenizer = None
        model.eval()
        return (model, info) if wants_info else model  # type: ignore[return-value]

    def _load_backbone(
        self, path: str | os.PathLike[str], dtype: Any, hub: dict[str, Any], options: dict[str, Any]
    ) -> PreTrainedModel:
        config = self.config
        if dtype is None or dtype == "auto":
            dtype = config.backbone_dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        if config.backbone_saved:
            backbone = AutoModel.from_pretrained(path, subfolder=BACKBONE_FOLDER, dtype=dtype, **hub, **options)
            backbone.requires_grad_(False)
            return backbone.eval()
        if config.base_model_name_or_path is None:
            raise ValueError("the config names no backbone (base_model_name_or_path): pass one with backbone=")
        source = resolve_model(
            config.base_model_name_or_path,
            revision=config.base_model_revision,
            gguf_file=config.base_model_gguf_file,
        )
        return load_backbone(source, layer=config.layer, dtype=dtype, **options)  # type: ignore[arg-type]


def _column(values: Any) -> Tensor | None:
    return None if values is None else torch.as_tensor(values, dtype=torch.float32)


def _move_head(model: RegularizedSequenceClassifier, device: torch.device) -> None:
    """All but the backbone, which may be spread over several devices."""
    model.score.to(device)
    for name, buffer in model.named_buffers(recurse=False):
        model.register_buffer(name, buffer.to(device))
