"""EleutherAI's sparsify: cfg.json + sae.safetensors, a TopK SAE."""

from pathlib import Path

from selfreg.sae.interop.base import (
    Foreign,
    load_safetensors,
    read_config,
    refuse,
    refuse_unknown,
    residual_layer,
    take,
)

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_OPTIONS = frozenset(
    [
        "activation",
        "expansion_factor",
        "normalize_decoder",
        "num_latents",
        "k",
        "multi_topk",
        "skip_connection",
        "transcode",
        "d_in",
        "signed",
    ]
)


def read(folder: Path, name: str) -> Foreign:
    """
    Args:
        folder: holds the two files.
        name: where it comes from; its last part names the module, such as `layers.10`.

    Raises:
        ValueError: a transcoder, a skip connection, another activation, or an option that is not known.
    """
    path = folder / CONFIG
    config = read_config(path)
    refuse_unknown(config, _OPTIONS, path)
    if config.get("activation", "topk") != "topk":
        refuse(path, "activation", config["activation"])
    for option in ("skip_connection", "transcode", "signed"):
        if config.get(option):
            refuse(path, option, config[option])
    W_enc, b_enc, W_dec, b_dec = take(
        load_safetensors(folder / WEIGHTS), ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), folder / WEIGHTS
    )
    return Foreign(
        "sparsify",
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        "topk",
        k=config.get("k", 32),
        settings={"layer": residual_layer(Path(name).name)},
    )
