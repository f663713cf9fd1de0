"""From hidden states of tokens to one state a text, with the unintended features removed where that is on.

Shapes: B or N texts, T tokens, D hidden size, U unintended features, W watched features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.prompt import PromptBatch, pool_hidden_states, select_tokens
from selfreg.activations.store import ActivationStore, pool_shard
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.penalty import feature_activations
from selfreg.sae.input_norm import InputNorm
from selfreg.utils.progress import progress


class FeatureRows(NamedTuple):
    """What is removed, and whose activations are noted.

    Attributes:
        encoder_directions (`[U, D]`), encoder_bias (`[U]`), decoder_directions (`[U, D]`): of the unintended features.
        input_norm: how their SAE normalises each state by itself.
        watched_directions (`[W, D]`), watched_bias (`[W]`), watched_norm: of the features whose largest activations
            are noted; None: those of the unintended ones.
    """

    encoder_directions: Tensor
    encoder_bias: Tensor
    decoder_directions: Tensor
    input_norm: InputNorm = "none"
    watched_directions: Tensor | None = None
    watched_bias: Tensor | None = None
    watched_norm: InputNorm = "none"

    def to(self, device: torch.device) -> "FeatureRows":
        moved: dict[str, Any] = {
            name: rows.to(device) for name, rows in self._asdict().items() if isinstance(rows, Tensor)
        }
        return self._replace(**moved)

    def activations(self, states: Tensor) -> Tensor:
        """Of the unintended features in raw states `[..., D]` -> `[..., U]`."""
        return feature_activations(states, self.encoder_directions, self.encoder_bias, self.input_norm)

    @property
    def num_watched(self) -> int:
        return len(self.encoder_bias if self.watched_bias is None else self.watched_bias)

    def watched(self, states: Tensor, activations: Tensor) -> Tensor:
        """Activations of the watched features in `states`, given those of the unintended ones."""
        if self.watched_directions is None or self.watched_bias is None:
            return activations
        return feature_activations(states, self.watched_directions, self.watched_bias, self.watched_norm)

    def remove(self, config: RegularizedSequenceClassifierConfig, pooled: Tensor, activations: Tensor) -> Tensor:
        """`pooled` without the unintended features, if the config says so."""
        return pooled - activations @ self.decoder_directions if config.remove_unintended else pooled


def pool_tokens(
    config: RegularizedSequenceClassifierConfig, hidden: Tensor, batch: PromptBatch, rows: FeatureRows
) -> tuple[Tensor, Tensor]:
    """Hidden states of a batch `[B, T, D]` -> pooled `[B, D]` and largest watched activations `[B, W]`."""
    device = rows.encoder_bias.device
    # A backbone spread over several devices may end on another one than it began.
    hidden, batch = hidden.to(device), PromptBatch(*(tensor.to(device) for tensor in batch))
    norm = config.reference_norm if config.reference_norm is not None else float("inf")
    selected, keep = select_tokens(hidden, batch, config.token_rule, norm)  # type: ignore[arg-type]
    activations = rows.activations(selected)
    maxima = rows.watched(selected, activations).masked_fill(~keep.unsqueeze(-1), 0.0).amax(dim=1)
    if config.pooling == "cls":
        pooled = hidden[:, 0]
        pooled_activations = rows.activations(pooled)
    else:
        pooled = pool_hidden_states(selected, keep, config.pooling)  # type: ignore[arg-type]
        pooled_activations = pool_hidden_states(activations, keep, config.pooling)  # type: ignore[arg-type]
    # Both poolings are linear in the tokens, so that removing from the pooled state is removing token by token.
    return rows.remove(config, pooled, pooled_activations), maxima


def pool_texts(
    config: RegularizedSequenceClassifierConfig, extractor: HiddenStateExtractor, texts: list[str], rows: FeatureRows
) -> tuple[Tensor, Tensor]:
    """Texts -> pooled `[N, D]` and largest watched activations `[N, W]`, on the CPU."""
    pooled = torch.empty(len(texts), config.hidden_size)
    maxima = torch.empty(len(texts), rows.num_watched)
    with progress("pooled states", len(texts), "texts") as advance:
        for index, batch, hidden in extractor.forward_batches(texts):
            states, largest = pool_tokens(config, hidden, batch, rows)
            pooled[index], maxima[index] = states.cpu(), largest.cpu()
            advance(len(index))
    return pooled, maxima


def pool_store(
    config: RegularizedSequenceClassifierConfig, store: ActivationStore, rows: FeatureRows
) -> tuple[Tensor, Tensor]:
    """The same from hidden states on disk.

    Raises:
        ValueError: the store holds states of another backbone, layer or other settings.
    """
    store.spec.check_same(config.hidden_state_spec(), f"the store {store.path}", "the classifier")
    rows = rows.to(torch.device("cpu"))
    pooling: Any = config.pooling
    pooled = torch.empty(store.num_texts, config.hidden_size)
    maxima = torch.zeros(store.num_texts, rows.num_watched)
    for shard in store.shards():
        states = shard.hidden_states.float()
        activations = rows.activations(states)
        part = slice(shard.first_text, shard.end_text)
        raw = pool_shard(shard, states, pooling)
        pooled_activations = rows.activations(raw) if pooling == "cls" else pool_shard(shard, activations, pooling)
        pooled[part] = rows.remove(config, raw, pooled_activations)
        watched = rows.watched(states, activations)
        index = (shard.text_ids.long() - shard.first_text).unsqueeze(1).expand_as(watched)
        maxima[part] = maxima[part].scatter_reduce(0, index, watched, "amax")
    return pooled, maxima
