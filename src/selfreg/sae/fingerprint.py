"""Tells one SAE from another."""

import torch

from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.files import fingerprint_strings


def sae_fingerprint(sae: SAEForFeatureExtraction) -> str:
    """Tells one set of SAE weights from another: a hash over sums, which any training step changes."""
    with torch.no_grad():
        tensors = [sae.W_enc, sae.b_enc, sae.decoder_weight, sae.b_dec, sae.mean, sae.scale]
        if sae.activation.threshold != "none":
            tensors.append(sae.threshold)
        # Sums over slices rather than all bytes: the weights of a wide SAE are gigabytes.
        parts = [f"{float(t.double().sum()):.6e} {float(t.double().pow(2).sum()):.6e}" for t in tensors]
    config = sae.config
    return fingerprint_strings(
        [f"{config.num_features} {config.hidden_size} {config.k} {config.activation} {config.input_norm}", *parts]
    )
