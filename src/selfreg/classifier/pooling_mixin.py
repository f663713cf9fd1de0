"""PoolingMixin: how a classifier gets from texts to the states that its head reads."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from selfreg.activations.backbone import hidden_states_at
from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.prompt import wrap_batch
from selfreg.activations.store import ActivationStore
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.pooling import FeatureRows, pool_store, pool_texts, pool_tokens
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import Task, as_targets
from selfreg.features.selection import UnintendedFeatures
from selfreg.utils.sharding import without_gradient

logger = logging.getLogger(__name__)


class PoolingMixin:
    """The part of a [`RegularizedSequenceClassifier`] before its head."""

    config: RegularizedSequenceClassifierConfig
    task: Task
    score: nn.Linear
    backbone: Any
    tokenizer: Any
    encoder_directions: Tensor
    encoder_bias: Tensor
    decoder_directions: Tensor
    unintended_mask: Any

    @property
    def is_adapted(self) -> bool:
        """Whether its states are others than those of the backbone that it names: there is an adapter, or was one."""
        return self.config.adapter or self.config.adapter_merged

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
            texts: strings, or, without an adapter, an `ActivationStore` of the same backbone, layer and settings. For
                `preference` the two sides of each pair one after the other, the chosen one first: 2N texts; see
                `render_pairs`.
            labels: class ids `[N]`; `[N, L]` of 0 and 1 (`multi_label`); numbers `[N]` (`regression`); None for pairs.
            activations_of: features whose activations to note; the classifier's own if None.
            weights (`[N]`, *optional*): weight of each text (or pair) in the loss.
            margins (`[N]`, *optional*): of pairs: by how much the chosen side should win at least.

        Raises:
            ValueError: an empty text, a label that is no class id, or a store of other states.
        """
        if isinstance(texts, ActivationStore) and self.is_adapted:
            raise ValueError(
                f"the store {texts.path} holds states of the backbone as it was, and an adapter has changed those of "
                "this classifier: give the texts"
            )
        rows = self._rows()
        if activations_of is not None:
            rows = rows._replace(
                watched_directions=activations_of.encoder_directions,
                watched_bias=activations_of.encoder_bias,
                watched_norm=activations_of.input_norm,
            ).to(self.score.weight.device)
        with without_gradient(self.backbone):
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
            same = int((pooled[:, 0] == pooled[:, 1]).all(dim=1).sum())
            if same:
                logger.warning(
                    "%d of %d pairs have the same tokens on both sides, cut at max_length=%d: nothing can be learned "
                    "of them; raise max_length, or use template='{chat}', which cuts what was said before the reply",
                    same,
                    len(pooled),
                    self.config.max_length,
                )
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
        # Whatever the head is cast to: what is removed is a small difference of large states.
        decoder = self.decoder_directions.float()
        if mask is not None:
            # What is unintended for some labels only can't be taken out of the one state that all labels read.
            decoder = decoder * mask.all(dim=0).unsqueeze(1).to(decoder)
        encoder, bias = self.encoder_directions.float(), self.encoder_bias.float()
        return FeatureRows(encoder, bias, decoder, self.config.input_norm)

    def extractor(self) -> HiddenStateExtractor:
        """The extractor that gives the states this classifier reads. With an adapter those are no longer the states of
        the named backbone, and its spec says so."""
        if self.tokenizer is None:
            raise ValueError("the classifier has no tokenizer: load it with from_pretrained, or set model.tokenizer")
        spec = self.config.hidden_state_spec()
        extractor = HiddenStateExtractor(
            self._require_backbone(),
            self.tokenizer,
            layer=spec.layer,
            pooling=self.config.pooling,  # type: ignore[arg-type]
            max_length=spec.max_length,
            template=spec.template,
            token_rule=spec.token_rule,
            name=f"{spec.model} (adapted)" if self.is_adapted else spec.model,
            revision=spec.revision,
            gguf_file=spec.gguf_file,
        )
        extractor.run = self.run_backbone
        return extractor

    def run_backbone(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[batch, tokens, hidden_size]` at the layer that the head reads."""
        return hidden_states_at(self._require_backbone(), self.config.layer, input_ids, attention_mask)  # type: ignore[arg-type]

    def _require_backbone(self) -> Any:
        if self.backbone is None:
            raise ValueError(
                "this classifier was loaded without its backbone, so that it takes pooled states only; load it with "
                "from_pretrained to get both"
            )
        return self.backbone


def _column(values: Any) -> Tensor | None:
    return None if values is None else torch.as_tensor(values, dtype=torch.float32)
