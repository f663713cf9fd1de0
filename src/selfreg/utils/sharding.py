"""FSDP2: weights that are dealt out to the processes, which gather those of a layer when it runs.

torch's own modules for it take a second to import, and are so where they are used.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from selfreg.utils.processes import processes

AFTER_FSDP = ("its weights lie in pieces", "trainer.save_model(folder), and from_pretrained(folder) in one process")
"""For `check_whole`, of what a Trainer has sharded."""


def is_sharded(module: nn.Module | None, *, within: bool = True) -> bool:
    """Whether FSDP has dealt out weights of a module, or (`within`) of one in it; None has none."""
    # Nothing is sharded where nobody has imported what does it.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or module is None:
        return False
    return any(isinstance(own, fsdp.FSDPModule) for own in (module.modules() if within else (module,)))


def whole_tensor(weight: Tensor) -> Tensor:
    """All rows of a weight, gathered where FSDP has dealt them out; a gradient finds its way back to them."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def own_rows(weight: Tensor) -> Tensor:
    """The rows of a weight, or of its gradient, that lie on this process: all, unless FSDP has dealt them out."""
    from torch.distributed.tensor import DTensor

    return weight.to_local() if isinstance(weight, DTensor) else weight


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Within it, the methods of a module see all weights, as its forward pass does; every process has to enter it."""
    if not is_sharded(module, within=False):
        yield
        return
    sharded: Any = module
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


def shard(module: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Deals a frozen module's weights out to the processes, block by block, in place; every process has to call it.

    Args:
        module: whole, and the same in all processes.
        blocks: modules within it that are gathered one at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    state = processes()
    if state.num_processes == 1 or is_sharded(module):
        return
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # Left to itself the outermost one keeps what it has gathered, the embeddings among it.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def check_whole(module: nn.Module, what: str, mend: str, *, within: bool = True) -> None:
    """
    Raises:
        ValueError: FSDP has dealt out the weights of `module`, or (`within`) of one in it; says what can't be done.
    """
    if is_sharded(module, within=within):
        raise ValueError(f"{type(module).__name__} is sharded by FSDP, so that {what}: {mend}")


def without_gradient(module: nn.Module | None) -> AbstractContextManager[Any]:
    """`inference_mode`; of a sharded module `no_grad`: what is gathered in inference mode could not be trained on."""
    return torch.no_grad() if is_sharded(module) else torch.inference_mode()


class InStep:
    """Forward passes of a sharded module, for which all processes have to come together, however many each has.

    Within `together` a process with nothing left to run takes part with an idle pass, until none has anything left.

    Args:
        module: the module.
        idle: runs it on next to nothing.
    """

    def __init__(self, module: nn.Module, idle: Callable[[], Any]) -> None:
        self.module, self.idle = module, idle
        self._open = False

    def announce(self) -> None:
        """To be called before a pass."""
        if self._open:
            _any_has(True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every process has to enter it, and to leave it."""
        if self._open or not is_sharded(self.module):
            yield
            return
        self._open = True
        try:
            yield
            while _any_has(False):
                self.idle()
        finally:
            self._open = False


def _any_has(work: bool) -> bool:
    flag = torch.tensor(int(work), device=processes().device)
    distributed.all_reduce(flag)
    return bool(flag)


def fsdp_asked(args: Any) -> bool:
    """Whether training arguments ask for FSDP, or `accelerate launch` does."""
    # Not ACCELERATE_USE_FSDP alone, which a Trainer sets and leaves set.
    launched = "FSDP_VERSION" in os.environ and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return args.fsdp_plugin_args is not None or launched


def shard_on_cpu(accelerator: Any, args: Any) -> bool:
    """Turns FSDP on where it was asked for and the processes have no accelerator.

    accelerate knows it for accelerators only, and would train with DDP without a word. torch has it over gloo, too.

    Returns:
        Whether it did.
    """
    from accelerate import PartialState  # type: ignore[import-untyped]
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]

    if not fsdp_asked(args) or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    # What AcceleratorState does for accelerators: in PartialState too, which it takes its own from.
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    # The rest of it the plugin reads from what the launcher has set.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    return True
