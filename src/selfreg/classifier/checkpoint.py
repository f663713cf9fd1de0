"""What lies in a classifier's folder beside its head: backbone, adapter, tokenizer."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from selfreg.activations.backbone import load_backbone, resolve_model, with_revision_there
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.lora import (
    ADAPTER_FOLDER,
    check_plain,
    load_adapter,
    save_adapter,
    sharing_copy,
    unsaved_parameters,
    without_adapter,
)
from selfreg.utils.sharding import check_whole

BACKBONE_FOLDER = "backbone"
BACKBONE_PREFIX = "backbone."

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
BACKBONE_OPTIONS = ("attn_implementation", "device_map", "max_memory", "offload_folder", "quantization_config")
"""Of `from_pretrained`, for the backbone alone: the head is small, and stays exact."""


def check_saved_whole(config: RegularizedSequenceClassifierConfig, backbone: Any, *, save_backbone: bool) -> None:
    """
    Raises:
        ValueError: a part of the classifier would not be in its folder, and not be found under a name either.
    """
    if config.adapter and backbone is None:
        raise ValueError(
            "the classifier was loaded without its backbone, and with it without its adapter, which would be lost: "
            "load it with load_backbone_weights=True"
        )
    if save_backbone:
        return
    if config.adapter_merged:
        raise ValueError(
            f"an adapter is merged into the backbone, which is no longer {config.base_model_name_or_path!r}, and only "
            "that name would be saved: save_backbone=True saves it too"
        )
    if unsaved_parameters(backbone):
        raise ValueError(
            "the backbone has trainable parameters, and only its name would be saved: save_backbone=True saves "
            "it too, model.backbone.requires_grad_(False) says that it is as it was"
        )


def save_parts(
    folder: Path,
    config: RegularizedSequenceClassifierConfig,
    backbone: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    save_backbone: bool,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Writes all but head and config.

    Args:
        state_dict: of the whole classifier, where a wrapper holds its weights in another form.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if config.adapter:
        of_backbone = None
        if state_dict is not None:
            of_backbone = {
                name.removeprefix(BACKBONE_PREFIX): tensor
                for name, tensor in state_dict.items()
                if name.startswith(BACKBONE_PREFIX)
            }
        save_adapter(backbone, folder / ADAPTER_FOLDER, state_dict=of_backbone, is_main_process=is_main_process)
    if save_backbone:
        check_whole(backbone, "save_backbone=True can't write it", "save it from a process that has loaded it whole")
        plain = without_adapter(backbone) if config.adapter else backbone
        plain.save_pretrained(folder / BACKBONE_FOLDER)


def load_whole_backbone(
    path: str | os.PathLike[str],
    config: RegularizedSequenceClassifierConfig,
    backbone: PreTrainedModel | None,
    *,
    dtype: str | torch.dtype | None,
    is_trainable: bool,
    hub: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """The backbone of the classifier at `path`, frozen, with the adapter where there is one.

    Args:
        backbone: the plain backbone, if it is in memory already; it stays as it is.
        dtype: of the backbone; None: the one that it was used in.
        is_trainable: whether the adapter can be trained on.
        hub: options of the Hub.
        options: what else `AutoModel.from_pretrained` gets.

    Raises:
        FileNotFoundError: the adapter is missing.
        ValueError: the config names no backbone.
    """
    given = backbone is not None
    if backbone is None:
        backbone = _load_backbone(path, config, dtype, hub, options)
    check_plain(backbone, str(path))
    if not config.adapter:
        return backbone
    if given:
        backbone = sharing_copy(backbone)
    return load_adapter(backbone, str(path), is_trainable=is_trainable, **hub)


def _load_backbone(
    path: str | os.PathLike[str],
    config: RegularizedSequenceClassifierConfig,
    dtype: str | torch.dtype | None,
    hub: dict[str, Any],
    options: dict[str, Any],
) -> PreTrainedModel:
    if dtype is None or dtype == "auto":
        dtype = config.backbone_dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if config.backbone_saved:
        backbone = AutoModel.from_pretrained(path, subfolder=BACKBONE_FOLDER, dtype=dtype, **hub, **options)
        backbone.requires_grad_(False)
        return backbone.eval()
    if config.base_model_name_or_path is None:
        raise ValueError("the config names no backbone (base_model_name_or_path): pass one with backbone=")
    source = resolve_model(
        config.base_model_name_or_path,
        revision=config.base_model_revision,
        gguf_file=config.base_model_gguf_file,
    )
    # `revision` is the classifier's own.
    options = {**options, **{name: value for name, value in hub.items() if name != "revision"}}
    return with_revision_there(
        str(path),
        source,
        lambda found: load_backbone(found, layer=config.layer, dtype=dtype, **options),  # type: ignore[arg-type]
        token=hub.get("token"),
        local_files_only=bool(hub.get("local_files_only")),
    )


def load_tokenizer_of(path: str | os.PathLike[str], hub: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a classifier's folder; None where there is none: a head alone is still good for cached states,
    and what needs a tokenizer says so."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **hub)
    except (OSError, ValueError):
        return None
    return tokenizer
