"""A peft adapter (LoRA and its kin) in the backbone under a classifier's head."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from selfreg.activations.backbone import truncate_backbone
from selfreg.activations.spec import HiddenStateSpec
from selfreg.utils.hub import local_folder

# peft is imported where it is used: most classifiers have no adapter, and it takes a while.
PeftModel: TypeAlias = Any
PeftConfig: TypeAlias = Any
Lora: TypeAlias = Mapping[str, Any] | PeftConfig
"""Settings of an adapter: fields of `peft.LoraConfig`, or any `peft.PeftConfig` that adapts modules."""

ADAPTER_FOLDER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ADAPTER = "default"
_SAFE_INITS = (True, False, "gaussian", "orthogonal")
_UNUSED = "pooler"
"""What transformers calls the layer of an encoder that makes one state a text, which selfreg does by itself."""


def adapter_config(lora: Lora) -> PeftConfig:
    """Settings of an adapter as peft's configuration; a mapping without `target_modules` adapts all linear layers.

    Raises:
        ValueError: an unknown field, a method that adds tokens to the prompt, or a start that changes the backbone's
            own weights.
    """
    import peft

    if isinstance(lora, Mapping):
        known = [field.name for field in fields(peft.LoraConfig)]
        for name in lora:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f": did you mean {near[0]!r}?" if near else ", such as r, lora_alpha, target_modules"
                raise ValueError(f"lora: {name!r} is no field of peft.LoraConfig{hint}")
        # As peft advises: adapting attention alone falls behind, and every architecture has linear layers.
        config: Any = peft.LoraConfig(**{"target_modules": "all-linear", **lora})
    elif isinstance(lora, peft.PeftConfig):
        config = copy.deepcopy(lora)
    else:
        raise ValueError(f"lora must be a mapping, such as {{'r': 8}}, or a peft.PeftConfig, not {lora!r}")
    if config.is_prompt_learning:
        raise ValueError(
            f"{type(config).__name__} adds tokens to the prompt, which no SAE has seen; take a method that adapts "
            "layers, such as LoraConfig"
        )
    start = config.to_dict().get("init_lora_weights", True)
    if start not in _SAFE_INITS:
        raise ValueError(
            f"init_lora_weights={start!r} changes the backbone's own weights, of which only the name is saved; choose "
            f"one of {', '.join(map(repr, _SAFE_INITS))}"
        )
    # Other task types would add a head of their own.
    config.task_type = "FEATURE_EXTRACTION"
    return config


def add_adapter(backbone: PreTrainedModel, lora: Lora, spec: HiddenStateSpec) -> PeftModel:
    """A fresh adapter over a backbone, in its blocks up to `spec.layer`: those after it are never run.

    The modules are a copy that shares its weights with `backbone`, which itself stays as it is. The random start of
    the adapter is drawn from torch's global generator.

    Raises:
        ValueError: as `adapter_config`; or there is no module of the names that it asks for.
    """
    from peft import get_peft_model

    config = adapter_config(lora)
    own = truncate_backbone(sharing_copy(backbone), spec.layer)
    own.requires_grad_(False)
    try:
        with _quiet():
            # Once on the meta device, to see which modules the names stand for.
            probe = get_peft_model(sharing_copy(own), copy.deepcopy(config), low_cpu_mem_usage=True)
            targets = [name for name in probe.base_model.targeted_module_names if name.split(".")[0] != _UNUSED]
            if targets:
                _name_targets(config, targets)
            model = get_peft_model(own, config)
    except ValueError as error:
        linear = {name.split(".")[-1] for name, m in own.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        raise ValueError(
            f"the adapter does not fit {type(backbone).__name__}: {error} Its linear layers: "
            f"{', '.join(sorted(linear))}"
        ) from error
    if targets:
        # peft shortens the names to what is unambiguous in this model; a whole one has more blocks.
        config.target_modules = targets
    config.base_model_name_or_path, config.revision = spec.model, spec.revision
    theirs = {parameter.data_ptr() for parameter in backbone.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.data_ptr() in theirs:
            # With `bias="all"` peft trains biases in place.
            parameter.data = parameter.data.clone()
    return model


def _name_targets(config: PeftConfig, targets: list[str]) -> None:
    """Names modules in full, so that the adapter fits the whole backbone as it does the truncated one."""
    if config.peft_type == "IA3":
        within = config.feedforward_modules or []
        if not isinstance(within, str):
            config.feedforward_modules = [
                name for name in targets if any(name == own or name.endswith(f".{own}") for own in within)
            ]
    config.target_modules = targets


def sharing_copy(model: nn.Module) -> Any:
    """A copy of a model's modules that shares the storage of its weights: an adapter put into it leaves `model` as it
    was, and takes no memory for a second backbone."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        # Quantised ones carry more than their data: they are shared as objects.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = (
            nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad) if plain else parameter
        )
    return copy.deepcopy(model, memo)


def check_plain(backbone: Any, name: str) -> None:
    """Raises ValueError where `backbone`, of `name`, holds an adapter already."""
    if not isinstance(backbone, PreTrainedModel):
        raise ValueError(
            f"the backbone of {name} is a {type(backbone).__name__}, not a plain model of transformers: give that, "
            "and a peft adapter as lora=; one of a saved classifier is loaded from its folder"
        )


def unsaved_parameters(backbone: Any) -> list[str]:
    """Names of trainable parameters that are in no adapter, so that saving the adapter alone would lose them."""
    if backbone is None:
        return []
    saved: set[int] = set()
    if not isinstance(backbone, PreTrainedModel):
        saved = {tensor.data_ptr() for tensor in _adapter_state(backbone, None).values()}
    return [name for name, p in backbone.named_parameters() if p.requires_grad and p.data_ptr() not in saved]


def _adapter_state(backbone: PeftModel, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    # Embeddings that are adapted are in it; "auto" would ask the Hub whether others have grown.
    state: dict[str, Tensor] = get_peft_model_state_dict(
        backbone, state_dict, adapter_name=_ADAPTER, save_embedding_layers=False
    )
    return state


def save_adapter(
    backbone: PeftModel, folder: Path, *, state_dict: dict[str, Tensor] | None = None, is_main_process: bool = True
) -> None:
    """Writes the adapter in peft's own format: `PeftModel.from_pretrained(backbone, folder)` reads it."""
    card = folder / "README.md"
    is_new = not card.exists()
    backbone.save_pretrained(
        str(folder),
        selected_adapters=[_ADAPTER],
        save_embedding_layers=False,
        state_dict=state_dict,
        is_main_process=is_main_process,
    )
    if is_new and is_main_process:
        # peft's form of a model card, not filled in but for the backbone's path on this machine.
        card.unlink()


def load_adapter(
    backbone: PreTrainedModel, path: str, *, is_trainable: bool = False, subfolder: str = ADAPTER_FOLDER, **hub: Any
) -> PeftModel:
    """Puts a saved adapter into a backbone, in place.

    Args:
        backbone: the model that it was trained on.
        path: folder or Hub id of the classifier.
        is_trainable: train it on; False: it is frozen.
        subfolder: where it lies there.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: it is not there.
    """
    from peft import PeftModel

    # peft itself does not find on the Hub's cache what it may not ask the Hub for.
    folder = local_folder(path, [f"{subfolder}/*"], **hub) / subfolder
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"the classifier in {path} was trained with an adapter, but {folder / name} is missing: copy the "
                "whole folder, or save the classifier again"
            )
    with _quiet():
        model = PeftModel.from_pretrained(backbone, str(folder), is_trainable=is_trainable)
    return model.eval()


def restore_adapter(backbone: PeftModel, folder: Path) -> None:
    """Puts the weights of a checkpoint's adapter into one of the same settings."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(backbone, load_peft_weights(str(folder), device="cpu"), adapter_name=_ADAPTER)


def without_adapter(backbone: PeftModel) -> PreTrainedModel:
    """The plain backbone under an adapter, as it was before; shares its weights."""
    plain: PreTrainedModel = sharing_copy(backbone).unload()
    return plain


@contextmanager
def adapter_off(backbone: PeftModel) -> Iterator[None]:
    """The backbone as it was before the adapter."""
    trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    try:
        with backbone.disable_adapter():
            yield
    finally:
        # peft makes an adapter trainable when it is switched on again.
        backbone.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def merge(backbone: PeftModel) -> PreTrainedModel:
    """A plain backbone with the adapter worked into its weights, which are its own wherever that changes them.

    Raises:
        ValueError: peft can't merge this kind of adapter, or its weights are not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = sharing_copy(backbone)
    for module in own.modules():
        if isinstance(module, BaseTunerLayer):
            for parameter in module.get_base_layer().parameters():
                parameter.data = parameter.data.clone()
    merged: PreTrainedModel = own.merge_and_unload(safe_merge=True)
    merged.requires_grad_(False)
    return merged.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what peft says of its own doing: it sets `fan_in_fan_out` itself where the layers ask for it (GPT-2's);
    peft 0.21 asks a model for `is_gradient_checkpointing`, which transformers 5.24 calls by another name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield
