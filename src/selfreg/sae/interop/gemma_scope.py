"""Gemma Scope: params.npz, a JumpReLU SAE."""

import re
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from selfreg.sae.interop.base import Foreign, logger, take

WEIGHTS = "params.npz"

_MODELS = {
    "gemma-scope-2b-pt": "google/gemma-2-2b",
    "gemma-scope-9b-pt": "google/gemma-2-9b",
    "gemma-scope-9b-it": "google/gemma-2-9b-it",
    "gemma-scope-27b-pt": "google/gemma-2-27b",
}


def read(folder: Path, name: str) -> Foreign:
    """
    Args:
        folder: holds params.npz.
        name: where it comes from, such as `google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`.

    Raises:
        ValueError: other arrays than those of a JumpReLU SAE.
    """
    path = folder / WEIGHTS
    if "transcoder" in name:
        raise ValueError(f"{name} is a transcoder, from one place of the backbone to another: no SAE")
    try:
        # Opened here: numpy leaves a file open that it can't read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            state = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} could not be read: {error}") from error
    W_enc, b_enc, W_dec, b_dec, threshold = take(state, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), path)
    l0 = re.search(r"average_l0_(\d+)", name)
    layer = re.search(r"layer_(\d+)", name)
    model = next((model for repo, model in _MODELS.items() if repo in name), None)
    # Of the repos only those on the residual stream hold states that an extractor gives.
    is_residual = "-res" in name
    if not is_residual:
        logger.warning("%s does not say that it is of the residual stream: the SAE's layer is left open", name)
    return Foreign(
        "Gemma Scope",
        W_enc.T,
        b_enc,
        W_dec,
        b_dec,
        "jumprelu",
        subtract_b_dec=False,
        k=int(l0[1]) if l0 else None,
        threshold=threshold,
        settings={
            "base_model_name_or_path": model,
            "layer": int(layer[1]) if layer and is_residual else None,
        },
    )
