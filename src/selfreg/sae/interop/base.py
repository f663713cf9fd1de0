"""What every converter gives: a configuration and weights in the project's own form."""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfreg.sae.configuration import SAEConfig

logger = logging.getLogger(__name__)

_UNIT_NORM_TOLERANCE = 1e-3


@dataclass
class Foreign:
    """An SAE in the terms that all libraries share. F features, D hidden size.

    a(h) = σ(W_enc x + b_enc), x = norm(h) - b_dec if `subtract_b_dec` else norm(h); ĥ = norm⁻¹(a W_dec + b_dec).

    Attributes:
        source: which library, for errors and the configuration.
        W_enc, W_dec: `[F, D]`; W_dec is None where the weights are tied.
        b_enc: `[F]`.
        b_dec: `[D]`.
        activation: as in `SAEConfig`.
        k: features that are active, where it is known. Where it is not, `SAEConfig` has its default, and training on
            takes the number that is active (`SAETrainer`).
        threshold: `[]` (batch_topk) or `[F]` (jumprelu).
        settings: further entries of the configuration.
    """

    source: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor | None
    b_dec: Tensor
    activation: str
    subtract_b_dec: bool = True
    k: int | None = None
    threshold: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def convert(self) -> tuple[SAEConfig, dict[str, Tensor]]:
        """The configuration and the state dict of an `SAEForFeatureExtraction`."""
        if self.W_enc.ndim != 2:
            raise ValueError(f"{self.source}: W_enc has the shape {list(self.W_enc.shape)}, not two dimensions")
        if self.activation == "topk" and self.k is None:
            raise ValueError(f"{self.source}: a topk SAE that does not say its k")
        num_features, hidden_size = self.W_enc.shape
        tied = self.W_dec is None
        wanted: dict[str, tuple[int, ...]] = {"b_enc": (num_features,), "b_dec": (hidden_size,)}
        if self.activation == "jumprelu":
            wanted["threshold"] = (num_features,)
        elif self.activation == "batch_topk":
            wanted["threshold"] = ()
        if not tied:
            wanted["W_dec"] = (num_features, hidden_size)
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None or tensor.shape != shape:
                found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise ValueError(f"{self.source}: {name} is {found}, not {list(shape)} as W_enc asks for")
        b_enc = self.b_enc.double()
        if not self.subtract_b_dec:
            # Ours always takes b_dec off first: W_enc (x - b_dec) + (b_enc + W_enc b_dec) = W_enc x + b_enc.
            b_enc = b_enc + self.W_enc.double() @ self.b_dec.double()
        decoder = self.W_enc if self.W_dec is None else self.W_dec
        lengths = torch.linalg.vector_norm(decoder.float(), dim=1)
        config = SAEConfig(
            **{
                "hidden_size": hidden_size,
                "num_features": num_features,
                "activation": self.activation,
                "k": min(self.k if self.k is not None else 32, num_features),
                "tied": tied,
                "normalize_decoder": bool(((lengths - 1).abs() < _UNIT_NORM_TOLERANCE).all()),
                "converted_from": self.source,
                **self.settings,
            }
        )
        state = {
            "W_enc": self.W_enc,
            "b_enc": b_enc,
            "b_dec": self.b_dec,
            "mean": torch.zeros(hidden_size),
            "scale": torch.ones(()),
            **({} if self.W_dec is None else {"W_dec": self.W_dec}),
            # Below zero there is nothing to let through: pre > 0 has to hold as well.
            **({} if self.threshold is None else {"threshold": self.threshold.clamp_min(0)}),
        }
        converted = {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in state.items()}
        converted["tokens_since_fired"] = torch.zeros(num_features, dtype=torch.long)
        converted["dead_on_task"] = torch.zeros(num_features, dtype=torch.bool)
        if self.activation == "relu":
            converted["sparsity_coefficient"] = torch.ones(())
        return config, converted

    def fold_decoder_norm(self) -> None:
        """Decoder directions to unit length, what that takes away into the activations; the reconstruction stays."""
        assert self.W_dec is not None
        lengths = torch.linalg.vector_norm(self.W_dec.double(), dim=1).clamp_min(1e-8)
        self.W_dec = self.W_dec.double() / lengths.unsqueeze(1)
        self.W_enc = self.W_enc.double() * lengths.unsqueeze(1)
        self.b_enc = self.b_enc.double() * lengths

    def fold_scale(self, factor: float) -> None:
        """For an SAE that was trained on states times `factor`: so that it takes the raw ones."""
        assert self.W_dec is not None
        self.W_enc = self.W_enc.double() * factor
        self.W_dec = self.W_dec.double() / factor
        self.b_dec = self.b_dec.double() / factor


def gated(W_enc: Tensor, r_mag: Tensor, gate_bias: Tensor, mag_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gated SAE is a JumpReLU SAE (Rajamanoharan et al. 2024): W_enc, b_enc and threshold of it.

    With π = W_enc x, a feature is active where π + gate_bias > 0, with the value ReLU(e^r π + mag_bias); the former is
    e^r π + mag_bias > mag_bias - e^r gate_bias.
    """
    factor = r_mag.double().exp()
    threshold = mag_bias.double() - factor * gate_bias.double()
    return W_enc.double() * factor.unsqueeze(1), mag_bias, threshold


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none.
    """
    try:
        config = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not an object")
    return config


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote, tensors and plain values only: nothing in the file is run.

    Raises:
        ValueError: it holds anything else, or is cut short.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises UnpicklingError, RuntimeError, EOFError or ValueError, whatever it trips over first.
        raise ValueError(
            f"{path} could not be read with weights_only=True, and is not read otherwise (a pickle may run code): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        ValueError: it is cut short, or no such file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} could not be read: {error}; is it whole?") from error


def tensors_of(state: Any, path: Path) -> dict[str, Tensor]:
    """A state dict.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return dict(state)


def take(state: dict[str, Tensor], names: Iterable[str], path: Path, ignored: Iterable[str] = ()) -> list[Tensor]:
    """The tensors `names`, all that there are beside `ignored`.

    Raises:
        ValueError: one is missing, or there is one that is not known.
    """
    names = list(names)
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(state))}")
    unknown = sorted(set(state) - set(names) - set(ignored))
    if unknown:
        raise ValueError(f"{path} holds {', '.join(unknown)}, which is not known here: it would be left out unnoticed")
    return [state[name] for name in names]


def refuse_unknown(config: Mapping[str, Any], known: Iterable[str], path: Path) -> None:
    """Raises ValueError where a configuration has an option that could change the result and is not known."""
    unknown = sorted(set(config) - set(known))
    if unknown:
        named = ", ".join(f"{name}={config[name]!r}" for name in unknown)
        raise ValueError(f"{path} has {named}: not known here, so that the SAE could give wrong numbers")


def refuse(path: Path, name: str, value: Any, why: str = "is not supported") -> None:
    raise ValueError(f"{path}: {name}={value!r} {why}")


# TransformerLens' names of backbones that many SAEs were trained on.
_HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}


def hub_id(name: str | None) -> str | None:
    """The Hub id of a backbone; None, with a warning, where a name is neither an id nor known."""
    # package:<import name> is how this project names a backbone in a wheel.
    if name is None or "/" in name or ":" in name:
        return name
    if re.fullmatch(r"pythia-[\w.]+(-deduped)?(-v0)?", name):
        return f"EleutherAI/{name}"
    if name not in _HUB_IDS:
        logger.warning("the backbone %r has no known Hub id: give base_model_name_or_path=", name)
    return _HUB_IDS.get(name)


def residual_layer(hook: str | None) -> int | None:
    """The layer, counted as here, of a hook on the residual stream; None for any other."""
    if hook is None:
        return None
    # TransformerLens: before block n is after block n - 1.
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook):
        layer = int(found[1]) - (found[2] == "pre")
        return layer if layer >= 0 else None
    # The module of a block, as transformers or sparsify name it.
    if found := re.fullmatch(r"(?:.*\.)?(?:layers|h|layer|blocks)\.(\d+)", hook):
        return int(found[1])
    return None
