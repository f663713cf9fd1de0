"""The states of a data set from several processes, each of which runs the backbone over its share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import TrainingArguments

from selfreg.classifier.states import PooledStates


def share_of(num_rows: int, rank: int, world_size: int) -> list[int]:
    """Rows of a process: as many for each, in order, the first rows again where they don't divide evenly."""
    size = -(-num_rows // world_size)
    return [row % num_rows for row in range(rank * size, (rank + 1) * size)]


def pooled_in_shares(
    make: Callable[[Sequence[Any]], PooledStates], dataset: Any, args: TrainingArguments
) -> PooledStates:
    """`make(dataset)`, by all processes together; each gets the whole.

    Args:
        make: gives the states of rows.
        dataset: rows; the same in all processes.
        args: know of the processes.
    """
    if args.world_size == 1:
        return make(dataset)
    from accelerate.utils import gather  # type: ignore[import-untyped]

    own = make([dataset[row] for row in share_of(len(dataset), args.process_index, args.world_size)])

    def whole(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        # NCCL takes tensors of its device only.
        gathered: Tensor = gather(values.to(args.device))
        return gathered[: len(dataset)].cpu()

    pooled, activations, labels = whole(own.pooled), whole(own.activations), whole(own.labels)
    assert pooled is not None
    assert activations is not None
    assert labels is not None
    return replace(
        own,
        pooled=pooled,
        activations=activations,
        labels=labels,
        weights=whole(own.weights),
        margins=whole(own.margins),
    )
