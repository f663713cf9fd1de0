"""The linear head of anybody's classifier: where it is, and what it reads.

Shapes: B texts, T tokens, D hidden size, L logits.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from selfreg.utils.quantized import keep_unpacked

HEADS = ("score", "classifier", "classifier.out_proj")
"""Where transformers' sequence classifiers have the linear layer that gives the logits."""

_TOLERANCE = 0.05


def find_head(model: nn.Module, name: str | None = None) -> nn.Linear:
    """The one linear layer that gives the logits: `score`, `classifier` or `classifier.out_proj`.

    It looks inside the wrappers of torch (`DistributedDataParallel`, `torch.compile`) and of peft; of a module in
    peft's `modules_to_save` it gives the copy that is trained.

    Args:
        model: the model.
        name: of the layer, where the model calls it otherwise.

    Raises:
        ValueError: there is none, or more than one; names the modules that were looked at.
    """
    inner = unwrapped(model)
    names = HEADS if name is None else (name,)
    looked = {path: module for path in names if (module := _module_at(inner, path)) is not None}
    found = {path: module for path, module in looked.items() if isinstance(module, nn.Linear)}
    kind = type(inner).__name__
    if len(found) > 1:
        raise ValueError(
            f"{kind} has {len(found)} linear layers that may be its head, {', '.join(found)}: name one with head="
        )
    if not found:
        children = ", ".join(f"{path} ({type(module).__name__})" for path, module in inner.named_children())
        seen = ", ".join(f"{path} is a {_kind(module)}" for path, module in looked.items()) or "none of them is there"
        raise ValueError(
            f"can't find the linear head of {kind}: looked for {', '.join(names)}: {seen}; the model has {children}. "
            "Name its layer with head="
        )
    ((path, head),) = found.items()
    if not head.weight.is_floating_point():
        raise ValueError(f"the head {path} of {kind} is quantised ({head.weight.dtype}): leave it out of quantisation")
    return head


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    if type(module).__module__.startswith("peft."):
        return f"{name} of peft, whose weights are in two parts: put the head into modules_to_save instead"
    return name


def _module_at(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        children = dict(module.named_children())
        if name not in children:
            return None
        module = _trained_copy(children[name])
    return module


def _trained_copy(module: nn.Module) -> nn.Module:
    if is_peft_available():
        from peft.utils import ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            return module.modules_to_save[active[0]] if active else module.original_module
    return module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch, accelerate and peft."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    if is_peft_available():
        from peft import PeftModel

        if isinstance(inner, PeftModel):
            inner = inner.get_base_model()
    return inner


@contextmanager
def reading(module: nn.Module) -> Iterator[list[Tensor]]:
    """Keeps what `module` is given, call by call, without a gradient, while the context is open."""
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: read.append(args[0].detach()))
    try:
        yield read
    finally:
        handle.remove()


def text_states(read: Tensor, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """One state a text of what a head read.

    Args:
        read (`[B, D]`, or `[B, T, D]`): of a head that is run on every token the state is that of the last one that is
            no padding, as in transformers' decoders.
        model: unwrapped.
        inputs: what the model was given.

    Returns:
        `[B, D]`.
    """
    if read.ndim == 2:
        return read
    pad = model.config.get_text_config().pad_token_id if isinstance(model, PreTrainedModel) else None
    input_ids = inputs.get("input_ids")
    if pad is None or input_ids is None:
        return read[:, -1]
    positions = torch.arange(read.shape[1], device=read.device, dtype=torch.int32)
    last = (positions * (input_ids != pad).to(positions)).argmax(dim=-1)
    return read[torch.arange(len(read), device=read.device), last]


class HeadRead(NamedTuple):
    """What a head read of a batch.

    Attributes:
        states (`[B, D]`): one a text.
        are_final (`bool`): they are states of `last_hidden_state`, with nothing between that and the head.
    """

    states: Tensor
    are_final: bool


@torch.no_grad()
def read_batch(model: nn.Module, inputs: Mapping[str, Any], name: str | None = None) -> HeadRead:
    """Runs a batch through a model in evaluation mode, for what its head reads.

    Args:
        model: a sequence classifier.
        inputs: a batch as a collator gives it; what the model's forward does not take is left out, and `labels`.
        name: of the head, see `find_head`.

    Raises:
        ValueError: the logits are not the head's of one state a text.
    """
    inner, head = unwrapped(model), find_head(model, name)
    accepted = inspect.signature(inner.forward).parameters
    given = {key: value for key, value in inputs.items() if key in accepted and key != "labels"}
    with evaluating(model), reading(head) as read, _final_states(inner) as final:
        logits = model(**given).logits
    states = text_states(read[-1], inner, inputs) if read else logits[:0]
    expected = F.linear(states, head.weight, head.bias)
    if expected.shape != logits.shape or (expected - logits).abs().max() > _TOLERANCE * logits.abs().max():
        raise ValueError(
            f"the logits of {type(inner).__name__} are not those of its head on one state a text "
            f"(the head ran {len(read)} times, on {tuple(read[-1].shape) if read else 'nothing'}): "
            "selfreg can't tell what this head reads"
        )
    return HeadRead(states, _are_among(states, final))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then every module's own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _final_states(model: nn.Module) -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        yield kept
        return
    handle = model.base_model.register_forward_hook(lambda _module, _args, output: kept.append(output[0]))
    try:
        yield kept
    finally:
        handle.remove()


def _are_among(states: Tensor, final: list[Tensor]) -> bool:
    if len(final) != 1 or final[0].ndim != 3 or final[0].shape[::2] != states.shape:
        return False
    nearest = (final[0] - states.unsqueeze(1)).abs().amax(dim=-1).amin(dim=-1)
    return bool((nearest <= 1e-3 * states.abs().amax(dim=-1)).all())


def head_inputs(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, head: str | None = None) -> Tensor:
    """What the head of a sequence classifier reads of each text: the states to find features on.

    The head of a decoder (Llama, Qwen) reads final states, those of `HiddenStateExtractor(layer="final")`. That of
    BERT reads its pooler's output, that of RoBERTa or ModernBERT a dense layer's: other spaces of the same width,
    where features of `layer="final"` mean nothing. For these, train an SAE on what comes from here:

        states = head_inputs(model, DataLoader(tokenized, batch_size=32, collate_fn=collator))
        sae = SAEForFeatureExtraction(SAEConfig(hidden_size=states.shape[1], num_features=4096))
        SAETrainer(sae, args, train_dataset=[{"hidden_states": state} for state in states]).train()
        unintended = UnintendedFeatures.from_ids(sae, ids)

    Args:
        model: the classifier. Where what stands between backbone and head was never trained (the pooler of a bare
            BERT often was, the dense layer of ModernBERT's head never), train the classifier first.
        batches: of tokenised texts, as a DataLoader gives them.
        head: name of the head's layer, where it can't be found.

    Returns:
        `[N, D]`, float32, on the CPU.

    Raises:
        ValueError: no head is found, or the logits are not the head's of one state a text; or see `keep_unpacked`.
    """
    keep_unpacked(model)
    device = next(model.parameters()).device
    states = []
    for batch in batches:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        states.append(read_batch(model, moved, head).states.float().cpu())
    return torch.cat(states)
