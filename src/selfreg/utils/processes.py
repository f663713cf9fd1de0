"""Several processes at one piece of work, as `accelerate launch` and `torchrun` start them.

Two kinds of help: `processes` and `gather_all` for work that is dealt out (extraction, a catalogue), and `one_batch`
for training, within which sums go over the batches of all processes. Outside of it they are those of this process
alone, so that a model which one process uses by itself never waits for others.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.distributed import ReduceOp

if TYPE_CHECKING:
    from accelerate import PartialState  # type: ignore[import-untyped]

_together = 1


def processes() -> "PartialState":
    """Which process this is, and of how many. The first call joins the others, so every process has to make it."""
    from accelerate import PartialState

    # Left to itself it joins no others on a CPU: it takes several processes without an accelerator for strangers.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return PartialState() if alone else PartialState(cpu=not torch.accelerator.is_available() or _forced_to_cpu())


def _forced_to_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")


def is_main_process() -> bool:
    """Whether this is the process that speaks for all; one that has not joined others speaks for itself."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def gather_all(value: Any) -> list[Any]:
    """What every process has, in the order of the processes; every process gets the list."""
    if processes().num_processes == 1:
        return [value]
    from accelerate.utils import gather_object  # type: ignore[import-untyped]

    gathered: list[Any] = gather_object([value])
    return gathered


@contextmanager
def one_batch() -> Iterator[None]:
    """Within it, the states that each process has at hand count as one batch.

    Every process has to enter it and to come by the same sums, with as many states as the others.
    """
    global _together
    before = _together
    _together = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    try:
        yield
    finally:
        _together = before


def together() -> int:
    """How many processes share the batch: 1 outside of `one_batch`."""
    return _together


def own_part() -> slice:
    """Which of a list of equal pieces of work are this process's: every n-th, n being `together()`."""
    return slice(distributed.get_rank() if _together > 1 else 0, None, _together)


def sum_over(tensor: Tensor) -> Tensor:
    """The sum over the processes that share the batch; without gradient where there are several."""
    return _reduced(tensor, ReduceOp.SUM)


def mean_over(tensor: Tensor) -> Tensor:
    """The mean over the processes that share the batch; without gradient where there are several.

    Gradients of the processes are averaged, not added up: a loss with a denominator over all states takes this one.
    """
    return sum_over(tensor) / _together if _together > 1 else tensor


def largest_over(tensor: Tensor) -> Tensor:
    """The elementwise maximum over the processes that share the batch."""
    if tensor.dtype == torch.bool:
        return _reduced(tensor.to(torch.uint8), ReduceOp.MAX).bool()
    return _reduced(tensor, ReduceOp.MAX)


def gather_over(tensor: Tensor) -> Tensor:
    """The tensors of all processes that share the batch, of one shape, one behind the other."""
    if _together == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_together)]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    if _together == 1:
        return tensor
    # NCCL takes tensors of its own device only.
    reduced = tensor.detach().to(processes().device, copy=True)
    distributed.all_reduce(reduced, op=operation)
    return reduced.to(tensor.device)
