"""How strongly texts activate features: the bridge from hidden states to the figures that features are chosen by."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from selfreg.activations.store import ActivationStore, StoreShard
from selfreg.sae.modeling import SAEForFeatureExtraction

_CHUNK = 4096


def text_maxima(shard: StoreShard, values: Tensor, indices: Tensor, num_features: int) -> tuple[Tensor, ...]:
    """The largest activation of each active feature in each text of a shard.

    Args:
        shard: whose tokens the features belong to.
        values, indices (`[tokens, k]`): active features of its tokens.
        num_features: width of the SAE.

    Returns:
        text ids, feature ids, largest activation, and the row in the shard where it stands; each `[pairs]`, one for
        every (text, feature) with an activation above zero, sorted by text and feature.
    """
    rows = torch.arange(len(values)).unsqueeze(1).expand_as(values)
    active = values > 0
    flat_values, flat_rows = values[active], rows[active]
    keys = shard.text_ids.long()[flat_rows] * num_features + indices[active]
    # By key, the strongest first, the earliest first among equals: then the first of each key is the peak.
    order = torch.argsort(flat_values, descending=True, stable=True)
    order = order[torch.argsort(keys[order], stable=True)]
    keys = keys[order]
    first = torch.ones(len(keys), dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    chosen = order[first]
    keys = keys[first]
    return keys // num_features, keys % num_features, flat_values[chosen], flat_rows[chosen]


@torch.inference_mode()
def encode_shard(sae: SAEForFeatureExtraction, shard: StoreShard) -> tuple[Tensor, Tensor]:
    """Active features of a shard's tokens: values and indices `[tokens, k]`, on the CPU."""
    parts = [
        sae.encode(shard.hidden_states[start : start + _CHUNK].float().to(sae.device))
        for start in range(0, len(shard.hidden_states), _CHUNK)
    ]
    # Chunks differ in how many features their fullest state has.
    widest = max((part.values.shape[1] for part in parts), default=1)
    values, indices = (
        torch.cat([pad(tensor, (0, widest - tensor.shape[1])) for tensor in tensors]).cpu()
        for tensors in ([part.values for part in parts], [part.indices for part in parts])
    )
    return values, indices


def largest_activations(sae: SAEForFeatureExtraction, store: ActivationStore) -> Tensor:
    """Largest TopK activation of every feature in every text, `[num_texts, num_features]`, float32; 0 where silent."""
    sae_spec = sae.config.hidden_state_spec()
    if sae_spec is not None:
        sae_spec.check_features_fit(store.spec, "the SAE", f"the store {store.path}")
    out = torch.zeros(store.num_texts, sae.config.num_features)
    for shard in store.shards():
        values, indices = encode_shard(sae, shard)
        texts, features, maxima, _ = text_maxima(shard, values, indices, sae.config.num_features)
        out[texts, features] = maxima
    return out
