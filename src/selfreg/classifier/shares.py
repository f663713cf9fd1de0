"""The states of a data set from several processes, each of which runs the backbone over its share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selfreg.classifier.states import PooledStates
from selfreg.utils.processes import gather_all, processes


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
