"""The SparseAutoEncoder module of sentence-transformers: config.json + model.safetensors, a tied TopK SAE."""

from pathlib import Path
from typing import Any

from torch import Tensor

from selfreg.sae.interop.base import (
    Foreign,
    load_safetensors,
    load_torch,
    read_config,
    refuse_unknown,
    take,
    tensors_of,
)

CONFIG, WEIGHTS, OLD_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"

_OPTIONS = frozenset(["input_dim", "hidden_dim", "k", "k_aux", "normalize", "dead_threshold"])


def is_config(config: dict[str, Any]) -> bool:
    return {"input_dim", "hidden_dim", "k"} <= set(config)


def read(folder: Path, _name: str) -> Foreign:
    """
    Raises:
        ValueError: an option that is not known.
    """
    path = folder / CONFIG
    config = read_config(path)
    refuse_unknown(config, _OPTIONS, path)
    weights = folder / WEIGHTS
    state: dict[str, Tensor]
    if weights.exists():
        state = load_safetensors(weights)
    else:
        weights = folder / OLD_WEIGHTS
        state = tensors_of(load_torch(weights), weights)
    # The decoder is the encoder's transpose: one tensor with two names, of which safetensors keeps either.
    if "encoder.weight" not in state and "decoder.linear.weight" in state:
        state["encoder.weight"] = state["decoder.linear.weight"]
    names = ("encoder.weight", "latent_bias", "pre_bias")
    W_enc, b_enc, b_dec = take(state, names, weights, ignored=("decoder.linear.weight", "stats_last_nonzero"))
    norm = "layer_norm" if config.get("normalize") else "none"
    return Foreign(
        "sentence-transformers", W_enc, b_enc, None, b_dec, "topk", k=config["k"], settings={"input_norm": norm}
    )
