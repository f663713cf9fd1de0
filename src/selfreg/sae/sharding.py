"""An SAE whose weights FSDP2 has dealt out to the processes by rows: by features, so that what is done to a decoder
direction by itself is done where it lies.

torch's own modules for it take a second to import, and are so where they are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def own_rows(weight: Tensor) -> Tensor:
    """The rows of a weight, or of its gradient, that lie on this process: all, unless FSDP has dealt them out."""
    from torch.distributed.tensor import DTensor

    return weight.to_local() if isinstance(weight, DTensor) else weight


@contextmanager
def whole_weights(sae: nn.Module) -> Iterator[None]:
    """Within it, the methods of an SAE see all weights, as its forward pass does; every process has to enter it."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(sae, FSDPModule):
        yield
        return
    sae.unshard()
    try:
        yield
    finally:
        sae.reshard()
