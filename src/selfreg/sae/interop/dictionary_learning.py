"""dictionary_learning: config.json + ae.pt."""

from pathlib import Path
from typing import Any

from torch import Tensor

from selfreg.sae.interop.base import Foreign, gated, hub_id, load_torch, logger, read_config, refuse, take, tensors_of

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def read(folder: Path, _name: str) -> Foreign:
    """Features are those of the stored weights; `load_dictionary` there multiplies those of an `AutoEncoder` by the
    length of its decoder directions, where they are not of unit length.

    Raises:
        ValueError: a class of dictionary that does not fit, by name.
    """
    path = folder / CONFIG
    trainer = read_config(path).get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        refuse(path, "trainer", trainer, "does not name a dict_class")
        raise AssertionError
    name = trainer["dict_class"]
    if name not in _CLASSES:
        refuse(path, "dict_class", name, f"is not one of {', '.join(_CLASSES)}")
    weights = folder / WEIGHTS
    foreign = _weights(name, tensors_of(load_torch(weights), weights), weights)
    foreign.settings |= _provenance(trainer)
    return foreign


def _weights(name: str, state: dict[str, Tensor], path: Path) -> Foreign:
    source = f"dictionary_learning {name}"
    if name == "AutoEncoder":
        W_enc, b_enc, W_dec, b_dec = take(state, (*_LINEAR, "bias"), path)
        return Foreign(source, W_enc, b_enc, W_dec.T, b_dec, "relu")
    if name == "AutoEncoderNew":
        W_enc, b_enc, W_dec, b_dec = take(state, (*_LINEAR, "decoder.bias"), path)
        return Foreign(source, W_enc, b_enc, W_dec.T, b_dec, "relu", subtract_b_dec=False)
    if name == "GatedAutoEncoder":
        names = ("encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight", "decoder_bias")
        W_enc, r_mag, gate_bias, mag_bias, W_dec, b_dec = take(state, names, path)
        W_enc, b_enc, threshold = gated(W_enc, r_mag, gate_bias, mag_bias)
        return Foreign(source, W_enc, b_enc, W_dec.T, b_dec, "jumprelu", threshold=threshold)
    matrices = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    if name == "JumpReluAutoEncoder":
        W_enc, b_enc, W_dec, b_dec, threshold = take(state, matrices, path)
        return Foreign(source, W_enc.T, b_enc, W_dec, b_dec, "jumprelu", subtract_b_dec=False, threshold=threshold)
    if name == "MatryoshkaBatchTopKSAE":
        W_enc, b_enc, W_dec, b_dec, threshold, k, sizes = take(state, (*matrices, "k", "group_sizes"), path)
        foreign = Foreign(source, W_enc.T, b_enc, W_dec, b_dec, "batch_topk", k=int(k), threshold=threshold)
        foreign.settings["prefixes"] = sizes.cumsum(0).tolist()
    else:
        W_enc, b_enc, W_dec, b_dec, k = take(state, (*_LINEAR, "b_dec", "k"), path, ignored=("threshold",))
        foreign = Foreign(source, W_enc, b_enc, W_dec.T, b_dec, "topk", k=int(k))
        if name == "BatchTopKSAE":
            foreign.activation, foreign.threshold = "batch_topk", state.get("threshold")
    if foreign.activation == "batch_topk" and foreign.threshold is not None and foreign.threshold <= 0:
        logger.warning("the threshold of this %s was never set: as there, all that is above zero is active", name)
        foreign.activation, foreign.threshold = "relu", None
        foreign.settings.pop("prefixes", None)
    return foreign


def _provenance(trainer: dict[str, Any]) -> dict[str, Any]:
    name, layer, module = trainer.get("lm_name"), trainer.get("layer"), trainer.get("submodule_name")
    is_residual = module is None or str(module).startswith("resid_post")
    return {
        "base_model_name_or_path": hub_id(name) if isinstance(name, str) and name else None,
        "layer": layer if isinstance(layer, int) and layer >= 0 and is_residual else None,
    }
