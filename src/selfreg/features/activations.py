"""How strongly texts activate features: the bridge from hidden states to the figures that features are chosen by.

Shapes: N tokens, K active features of a token, T texts, F features, P pairs of a text and a feature.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from selfreg.activations.store import ActivationStore, StoreShard
from selfreg.sae.modeling import SAEForFeatureExtraction

_CHUNK = 4096
# Of the dense maxima that a chunk is reduced in: 64 MiB at most.
_CHUNK_ENTRIES = 1 << 24


@dataclass(frozen=True)
class EncodedChunk:
    """The features of the tokens of a few whole texts, on the CPU.

    Attributes:
        first_text (`int`), num_texts (`int`): the texts are `first_text .. first_text + num_texts - 1`.
        rows (`slice`): where its tokens stand in their shard.
        texts_N (`[N]`, int64): the text of each token, counted from `first_text`.
        values_NK, indices_NK (`[N, K]`): active features of each token; a value of 0 is not active.
        num_features (`int`): F.
    """

    first_text: int
    num_texts: int
    rows: slice
    texts_N: Tensor
    values_NK: Tensor
    indices_NK: Tensor
    num_features: int

    @cached_property
    def keys(self) -> Tensor:
        """Where the feature of each entry stands in `[T, F]` when that is flat, `[N, K]`."""
        return self.texts_N.unsqueeze(1) * self.num_features + self.indices_NK

    def maxima(self) -> Tensor:
        """The largest activation of each feature in each text, `[T, F]`; 0 where it is silent."""
        out = torch.zeros(self.num_texts * self.num_features)
        out.scatter_reduce_(0, self.keys.flatten(), self.values_NK.flatten(), "amax")
        return out.view(self.num_texts, self.num_features)


def encoded_chunks(sae: SAEForFeatureExtraction, shard: StoreShard) -> Iterator[EncodedChunk]:
    """Encodes the tokens of a shard, some whole texts at a time."""
    counts_T = torch.bincount(shard.text_ids.long() - shard.first_text, minlength=shard.end_text - shard.first_text)
    ends = counts_T.cumsum(0).tolist()
    most_texts = max(1, _CHUNK_ENTRIES // sae.config.num_features)
    first = row = 0
    while first < len(ends):
        end = first + 1
        while end < len(ends) and end - first < most_texts and ends[end] - row <= _CHUNK:
            end += 1
        rows = slice(row, ends[end - 1])
        values, indices = _encode(sae, shard.hidden_states[rows])
        texts = shard.text_ids[rows].long() - (shard.first_text + first)
        yield EncodedChunk(
            shard.first_text + first, end - first, rows, texts, values, indices, sae.config.num_features
        )
        first, row = end, ends[end - 1]


@torch.inference_mode()
def _encode(sae: SAEForFeatureExtraction, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    features = sae.encode(hidden_states.float().to(sae.device))
    return features.values.float().cpu(), features.indices.cpu()


def largest_activations(sae: SAEForFeatureExtraction, store: ActivationStore) -> Tensor:
    """Largest activation of every feature in every text, `[num_texts, num_features]`, float32; 0 where silent."""
    sae_spec = sae.config.hidden_state_spec()
    if sae_spec is not None:
        sae_spec.check_features_fit(store.spec, "the SAE", f"the store {store.path}")
    out = torch.zeros(store.num_texts, sae.config.num_features)
    for shard in store.shards():
        for chunk in encoded_chunks(sae, shard):
            out[chunk.first_text : chunk.first_text + chunk.num_texts] = chunk.maxima()
    return out
