"""SAELens folders: cfg.json + sae_weights.safetensors."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

from selfreg.sae.interop.base import (
    Foreign,
    gated,
    hub_id,
    load_safetensors,
    logger,
    read_config,
    refuse,
    refuse_unknown,
    residual_layer,
    take,
)
from selfreg.utils.files import atomic_folder

if TYPE_CHECKING:
    from selfreg.sae.modeling import SAEForFeatureExtraction

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SCALER = "activation_scaler.json"
_OURS = "selfreg"
_KEPT = (
    *("base_model_name_or_path", "base_model_revision", "base_model_gguf_file"),
    *("layer", "token_rule", "template", "max_length", "k"),
)
"""How the states were made, for which SAELens has no place of its own: kept in its metadata."""


_MODEL_OPTIONS = frozenset(
    [
        "architecture",
        "d_in",
        "d_sae",
        "dtype",
        "device",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
        "metadata",
        "k",
        "rescale_acts_by_decoder_norm",
        "matryoshka_widths",
    ]
)
_TRAINING_OPTIONS = frozenset(
    [
        "decoder_init_norm",
        "l1_coefficient",
        "lp_norm",
        "l1_warm_up_steps",
        "use_sparse_activations",
        "aux_loss_coefficient",
        "jumprelu_init_threshold",
        "jumprelu_bandwidth",
        "jumprelu_sparsity_loss_mode",
        "l0_coefficient",
        "l0_warm_up_steps",
        "pre_act_loss_coefficient",
        "jumprelu_tanh_scale",
        "jumprelu_ste_to_input",
        "target_l0",
        "topk_threshold_lr",
        "use_matryoshka_aux_loss",
    ]
)
# Beside those of the model, in configurations before SAELens 6.
_OLD_OPTIONS = frozenset({"model_name", "hook_name", "hook_point", "activation_fn_str", "activation_fn"})
_NORMS = {"none": "none", "constant_norm_rescale": "rms", "layer_norm": "layer_norm"}
_ARCHITECTURES = ("standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")


def read(folder: Path, _name: str) -> Foreign:
    """An SAE of SAELens 3 to 6, saved for inference or in the middle of training.

    Raises:
        ValueError: an architecture or option that is not known, by name.
    """
    path = folder / CONFIG
    config = _modern(read_config(path), path)
    architecture = config.get("architecture", "standard")
    if architecture not in _ARCHITECTURES:
        refuse(path, "architecture", architecture, f"is not one of {', '.join(_ARCHITECTURES)}")
    if config.get("reshape_activations", "none") != "none":
        refuse(path, "reshape_activations", config["reshape_activations"], "asks for states that are not read here")
    state = load_safetensors(folder / WEIGHTS)
    foreign = _weights(state, architecture, folder / WEIGHTS)
    foreign.subtract_b_dec = bool(config.get("apply_b_dec_to_input", True))
    if "k" in config and config["k"] is not None:
        foreign.k = max(1, round(config["k"]))
    if architecture == "matryoshka_batchtopk":
        widths, num_features = config.get("matryoshka_widths") or [], len(foreign.W_enc)
        foreign.settings["prefixes"] = [*[width for width in widths if width < num_features], num_features]
    _normalisation(foreign, config, folder)
    if config.get("rescale_acts_by_decoder_norm"):
        foreign.fold_decoder_norm()
    _provenance(foreign, config.get("metadata") or {})
    return foreign


def _modern(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A configuration as SAELens 6 writes it, from one of any version."""
    metadata = config.get("metadata") or {}
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    is_old = Version(version) < Version("6.0.0rc0") if version else bool(_OLD_OPTIONS & set(config))
    if not is_old:
        refuse_unknown(config, _MODEL_OPTIONS | _TRAINING_OPTIONS | {"sae_lens_version"}, path)
        return config
    # Before 6 the options of the whole training lie beside those of the model. Those of the model:
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    architecture = config.get("architecture", "standard")
    options = config.get("activation_fn_kwargs") or {}
    if activation == "topk":
        architecture = "topk"
        refuse_unknown(options, {"k"}, path)
    elif activation != "relu" or options:
        refuse(path, "activation_fn_str", activation if not options else (activation, options))
    normalisation = config.get("normalize_activations") or "none"
    hook = config.get("hook_name", config.get("hook_point"))
    return {
        "architecture": architecture,
        "apply_b_dec_to_input": config.get("apply_b_dec_to_input", True),
        "normalize_activations": "expected_average_only_in" if normalisation is True else normalisation,
        "reshape_activations": config.get("reshape_activations") or ("hook_z" if "hook_z" in (hook or "") else "none"),
        "metadata": {
            "model_name": config.get("model_name"),
            "hook_name": hook,
            "model_from_pretrained_kwargs": config.get("model_from_pretrained_kwargs"),
        },
        "rescale_acts_by_decoder_norm": config.get("rescale_acts_by_decoder_norm", False),
        **({"k": options.get("k", config.get("k"))} if architecture == "topk" else {}),
    }


def _weights(state: dict[str, Tensor], architecture: str, path: Path) -> Foreign:
    source = f"SAELens {architecture}"
    # Old versions wrote a scale that fine-tuning learned; all ones means none.
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in state and not torch.allclose(state[name].float(), torch.ones(())):
            refuse(path, name, "not all ones", "would have to scale the activations, and is not supported")
    ignored = ("scaling_factor", "finetuning_scaling_factor")
    if architecture == "gated":
        W_enc, W_dec, b_dec, r_mag, b_gate, b_mag = take(
            state, ("W_enc", "W_dec", "b_dec", "r_mag", "b_gate", "b_mag"), path, ignored
        )
        W_enc, b_enc, threshold = gated(W_enc.T, r_mag, b_gate, b_mag)
        return Foreign(source, W_enc, b_enc, W_dec, b_dec, "jumprelu", threshold=threshold)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    if architecture in ("standard", "topk"):
        W_enc, b_enc, W_dec, b_dec = take(state, names, path, ignored)
        activation = {"standard": "relu", "topk": "topk"}[architecture]
        return Foreign(source, W_enc.T, b_enc, W_dec, b_dec, activation)
    if architecture == "jumprelu":
        if "log_threshold" in state:
            state["threshold"] = state.pop("log_threshold").double().exp()
        W_enc, b_enc, W_dec, b_dec, threshold = take(state, (*names, "threshold"), path, ignored)
        return Foreign(source, W_enc.T, b_enc, W_dec, b_dec, "jumprelu", threshold=threshold)
    # In the middle of training; for inference SAELens saves these as jumprelu.
    W_enc, b_enc, W_dec, b_dec, threshold = take(state, (*names, "topk_threshold"), path, ignored)
    return Foreign(source, W_enc.T, b_enc, W_dec, b_dec, "batch_topk", threshold=threshold)


def _normalisation(foreign: Foreign, config: dict[str, Any], folder: Path) -> None:
    kind = config.get("normalize_activations", "none")
    if kind in _NORMS:
        foreign.settings["input_norm"] = _NORMS[kind]
        return
    if kind != "expected_average_only_in":
        refuse(folder / CONFIG, "normalize_activations", kind)
    if not (folder / _SCALER).exists():
        refuse(
            folder / CONFIG,
            "normalize_activations",
            kind,
            f"means that the states were scaled in training, and there is no {_SCALER} that says by how much: fold "
            "the factor into the weights with SAELens first (sae.fold_activation_norm_scaling_factor)",
        )
    factor = read_config(folder / _SCALER).get("scaling_factor")
    # None: SAELens has folded it into the weights.
    if factor is not None:
        foreign.fold_scale(float(factor))
        if foreign.threshold is not None and config.get("rescale_acts_by_decoder_norm"):
            # In units of activation times the length of the decoder direction, which the fold has changed.
            foreign.threshold = foreign.threshold / float(factor)


def _provenance(foreign: Foreign, metadata: dict[str, Any]) -> None:
    name = metadata.get("model_name")
    hook = metadata.get("hf_hook_name") or metadata.get("hook_name")
    foreign.settings["base_model_name_or_path"] = hub_id(name)
    foreign.settings["layer"] = residual_layer(hook)
    if hook is not None and foreign.settings["layer"] is None:
        logger.warning("%s is not the residual stream after a block: the SAE's layer is left open", hook)
    # What `write` below has noted of our own.
    ours = metadata.get(_OURS) or {}
    foreign.settings |= {name: ours[name] for name in _KEPT if ours.get(name) is not None}
    if options := metadata.get("model_from_pretrained_kwargs"):
        logger.warning("the SAE was trained on states of a model that was loaded with %s", options)


def write(sae: "SAEForFeatureExtraction", folder: Path) -> None:
    """Writes what `SAE.load_from_disk` of SAELens reads, which gives the same features and reconstructions.

    A batch_topk SAE becomes the jumprelu SAE that it is in inference, as SAELens itself saves its own; prefixes, which
    only training knows, have no place there.

    Raises:
        ValueError: SAELens has nothing like it.
    """
    config = sae.config
    architecture = {"topk": "topk", "relu": "standard"}.get(config.activation, "jumprelu")
    norms = {ours: theirs for theirs, ours in _NORMS.items()}
    # pre = W_enc/scale (h - (b_dec scale + mean)) + b_enc: what SAELens takes off first is ĥ of no feature, as here.
    state = {
        "W_enc": sae.encoder_directions.T,
        "b_enc": sae.b_enc,
        "W_dec": sae.decoder_directions,
        "b_dec": sae.decoder_bias,
    }
    if architecture == "jumprelu":
        if config.activation == "batch_topk" and sae.threshold <= 0:
            raise ValueError("this batch_topk SAE has no threshold yet: train it first")
        state["threshold"] = sae.threshold.clamp_min(0).expand(config.num_features)
    layer = config.layer
    described: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.hidden_size,
        "d_sae": config.num_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": norms[config.input_norm],
        "reshape_activations": "none",
        "metadata": {
            # Of the format: without it SAELens takes the configuration for one from before 6.
            "sae_lens_version": "6.0.0",
            "model_name": config.base_model_name_or_path,
            "hook_name": f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else None,
            _OURS: {name: getattr(config, name) for name in _KEPT},
        },
    }
    if architecture == "topk":
        described |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    tensors = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf8")
