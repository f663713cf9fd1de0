"""What the decoder directions of features are similar to: other features, and tokens of the backbone.

Shapes: F features, D hidden size, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import normalize
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from selfreg.features.records import Neighbour
from selfreg.utils.files import read_json

# Of similarities in memory: 64 MiB.
_ENTRIES = 1 << 24


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


def unembedding_of(backbone: PreTrainedModel, hidden_size: int, revision: str | None = None) -> Tensor | None:
    """The matrix `[V, D]` that a language model turns its last hidden states into logits with; None where it has none.

    A model with a head brings it. One that `AutoModel` loads has lost its head: where the two are tied, the embeddings
    are the same matrix, and where not, it is read from the checkpoint that the model was loaded from, if it lies on
    this machine as safetensors. Masked language models put more than a matrix before their logits, and so do models
    whose embeddings have another width than their hidden states.
    """
    found = _unembedding(backbone, revision)
    return found if found is not None and found.shape[1] == hidden_size else None


def _unembedding(backbone: PreTrainedModel, revision: str | None) -> Tensor | None:
    head = backbone.get_output_embeddings()
    if head is not None:
        return head.weight.detach()
    config = backbone.config.get_text_config()
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return None
    # Not every model has the setting.
    if config.to_dict().get("tie_word_embeddings", False):
        return cast(Tensor, backbone.get_input_embeddings().weight).detach()
    return _stored_head(str(backbone.config.name_or_path or ""), revision)


_HEADS = ("lm_head.weight", "embed_out.weight")


def _stored_head(name_or_path: str, revision: str | None) -> Tensor | None:
    index = _stored(name_or_path, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is not None:
        files = read_json(index)["weight_map"]
        names = {key: files[key] for key in _HEADS if key in files}
    else:
        names = dict.fromkeys(_HEADS, SAFE_WEIGHTS_NAME)
    for key, name in names.items():
        path = _stored(name_or_path, name, revision)
        if path is None:
            continue
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118 - not a dict
                return file.get_tensor(key)
    return None


def _stored(name_or_path: str, file: str, revision: str | None) -> Path | None:
    """A file of a model on this machine: in its folder, or in the Hub's cache."""
    if not name_or_path:
        return None
    local = Path(name_or_path, file)
    if local.is_file():
        return local
    try:
        found = try_to_load_from_cache(name_or_path, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


@torch.inference_mode()
def promoted_tokens(
    directions_FD: Tensor,
    features: Sequence[int],
    unembedding_VD: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 10,
) -> dict[int, list[str]]:
    """Tokens whose logits a feature raises most when it is active (logit lens): the largest W_U · d.

    The final norm, which would scale the dimensions, and the blocks between are left out; so are rows of the matrix
    that stand for no token, with which many vocabularies are padded.
    """
    weight_VD = unembedding_VD[: len(tokenizer)].float()
    count = min(count, len(weight_VD))
    ids = torch.tensor(list(features))
    out: dict[int, list[str]] = {}
    texts: dict[int, str] = {}
    step = max(1, _ENTRIES // len(weight_VD))
    # One buffer for all: fresh memory costs more in page faults than what is written to it.
    buffer = weight_VD.new_empty(step, len(weight_VD))
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        logits = buffer[: len(some)]
        torch.mm(directions_FD[some.to(directions_FD.device)].to(weight_VD), weight_VD.T, out=logits)
        for feature, tokens in zip(some.tolist(), logits.topk(count, dim=1).indices.tolist(), strict=True):
            for token in tokens:
                if token not in texts:
                    texts[token] = tokenizer.convert_tokens_to_string(list(tokenizer.convert_ids_to_tokens([token])))
            out[feature] = [texts[token] for token in tokens]
    return out
