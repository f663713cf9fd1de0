"""A data set in several processes: states of which each computes its share, and the last batch of an epoch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selfreg.classifier.states import PooledStates
from selfreg.utils.processes import gather_all, processes

COUNTS = "counts"
"""Column of a batch: what each of its rows counts, where some are there only to fill it up."""


def counts_of_last(size: int, num_left: int, rank: int, world_size: int) -> Tensor:
    """What the rows of this process' last batch of an epoch count, `[size]`.

    accelerate gives every process as many rows, and fills up with rows from the start of the epoch. With those at 0
    and the others at more than 1, the mean of the processes' mean losses is the mean over the rows that are left.

    Args:
        size: rows of this process.
        num_left: rows that all processes together had left.
        rank, world_size: which process, of how many.
    """
    left = torch.arange(rank * size, (rank + 1) * size) < num_left
    return left * (size * world_size / num_left)


def share_of(num_rows: int, rank: int, world_size: int) -> list[int]:
    """Rows of a process: as many for each, in order, the first rows again where they don't divide evenly."""
    size = -(-num_rows // world_size)
    return [row % num_rows for row in range(rank * size, (rank + 1) * size)]


def pooled_in_shares(make: Callable[[Sequence[Any]], PooledStates], dataset: Any) -> PooledStates:
    """`make(dataset)`, by all processes together; each gets the whole.

    Args:
        make: gives the states of rows.
        dataset: rows; the same in all processes.
    """
    state = processes()
    if state.num_processes == 1:
        return make(dataset)
    own = make([dataset[row] for row in share_of(len(dataset), state.process_index, state.num_processes)])

    def whole(values: Tensor) -> Tensor:
        return torch.cat(gather_all(values))[: len(dataset)]

    return replace(
        own,
        pooled=whole(own.pooled),
        activations=whole(own.activations),
        labels=whole(own.labels),
        weights=None if own.weights is None else whole(own.weights),
        margins=None if own.margins is None else whole(own.margins),
    )
