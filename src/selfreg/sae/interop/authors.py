"""The `.pth` files of the paper's authors (Wu et al. 2025): tied weights, TopK or ReLU."""

import re
from pathlib import Path

from selfreg.sae.interop.base import Foreign, load_torch, refuse_unknown, take, tensors_of

SUFFIX = ".pth"


def read(path: Path, _name: str) -> Foreign:
    """
    Args:
        path: the file, or a folder with it alone.

    Raises:
        ValueError: it is not such a file.
    """
    if path.is_dir():
        path = next(path.glob(f"*{SUFFIX}"))
    found = load_torch(path)
    if not isinstance(found, dict) or set(found) != {"weight", "config"} or not isinstance(found["config"], dict):
        raise ValueError(f"{path} is not one of the paper's SAEs, which hold 'weight' and 'config'")
    config = found["config"]
    refuse_unknown(config, {"d_inp", "d_hide", "topK"}, path)
    # `mask` takes part only where features are edited by hand, which is not saved.
    W_enc, b_enc, b_dec = take(tensors_of(found["weight"], path), ("W_enc", "b_enc", "b_dec"), path, ignored=("mask",))
    # TopK7_l16_h65k_epoch5.pth
    layer = re.search(r"_l(\d+)(?:_|\.|$)", path.name)
    k = config.get("topK")
    return Foreign(
        "selfreg paper",
        W_enc.T,
        b_enc,
        None,
        b_dec,
        "relu" if k is None else "topk",
        k=k,
        settings={"layer": int(layer[1]) if layer else None},
    )
