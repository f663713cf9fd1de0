"""What the decoder directions of features are similar to: other features, and tokens of the backbone.

Shapes: F features, D hidden size, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from selfreg.features.records import Neighbour

# Rows of similarities in memory: 128 MiB at most.
_ENTRIES = 1 << 25


@torch.inference_mode()
def nearest_features(directions_FD: Tensor, features: Sequence[int], count: int = 5) -> dict[int, list[Neighbour]]:
    """The features among `features` whose decoder directions have the largest cosine to each one's, largest first."""
    count = min(count, len(features) - 1)
    if count < 1:
        return {feature: [] for feature in features}
    ids = torch.tensor(list(features))
    unit = normalize(directions_FD[ids.to(directions_FD.device)].float(), dim=1)
    out = {}
    step = max(1, _ENTRIES // len(ids))
    for start in range(0, len(ids), step):
        cosines = unit[start : start + step] @ unit.T
        rows = torch.arange(len(cosines), device=cosines.device)
        cosines[rows, rows + start] = -torch.inf
        values, places = cosines.topk(count, dim=1)
        for row, (cosine, place) in enumerate(zip(values.tolist(), places.cpu(), strict=True)):
            near = zip(ids[place].tolist(), cosine, strict=True)
            out[int(ids[start + row])] = [Neighbour(feature, round(value, 4)) for feature, value in near]
    return out


def unembedding_of(backbone: PreTrainedModel) -> Tensor | None:
    """The matrix `[V, D]` that a language model turns its last hidden states into logits with; None where it has none.

    A model with a head brings it; one that `AutoModel` loads has lost its head, but where the two are tied the
    embeddings are the same matrix. Masked language models put more than a matrix before their logits.
    """
    head = backbone.get_output_embeddings()
    if head is not None:
        return head.weight.detach()
    config = backbone.config.get_text_config()
    if not config.tie_word_embeddings or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return None
    return cast(Tensor, backbone.get_input_embeddings().weight).detach()


@torch.inference_mode()
def promoted_tokens(
    directions_FD: Tensor,
    features: Sequence[int],
    unembedding_VD: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 10,
) -> dict[int, list[str]]:
    """Tokens whose logits a feature raises most when it is active (logit lens): the largest W_U · d.

    The final norm, which would scale the dimensions, and the blocks between are left out.
    """
    weight_VD = unembedding_VD.float()
    ids = torch.tensor(list(features))
    out: dict[int, list[str]] = {}
    texts: dict[int, str] = {}
    step = max(1, _ENTRIES // len(weight_VD))
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        logits = directions_FD[some.to(directions_FD.device)].to(weight_VD) @ weight_VD.T
        for feature, tokens in zip(some.tolist(), logits.topk(count, dim=1).indices.tolist(), strict=True):
            for token in tokens:
                if token not in texts:
                    texts[token] = tokenizer.convert_tokens_to_string(list(tokenizer.convert_ids_to_tokens([token])))
            out[feature] = [texts[token] for token in tokens]
    return out
