"""The order in which the states of a store are trained on."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from selfreg.activations.store import ActivationStore

_WINDOW = 1 << 20
_AT_ONCE = 1 << 14


class WindowSampler(Sampler[int]):
    """The rows of a store in random order, shards that were drawn together mixed with one another only.

    A permutation of all rows of a large store would take many times the memory of everything else, and each row would
    be a seek of its own on the disk. A store of no more than a window is permuted as a whole, in the very order that
    the Trainer's own sampler has.

    Args:
        store: whose rows.
        seed: with the epoch, of the order.
        window: rows that are mixed, about: whole shards, drawn at random, until there are as many.
    """

    def __init__(self, store: ActivationStore, seed: int, window: int = _WINDOW) -> None:
        self.store, self.seed, self.window = store, seed, window
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if len(self.store) <= self.window:
            yield from _integers(torch.randperm(len(self.store), generator=generator))
            return
        shards = self.store.shard_rows()
        drawn: list[int] = []
        rows = 0
        for place, shard in enumerate(torch.randperm(len(shards), generator=generator).tolist()):
            drawn.append(shard)
            rows += len(shards[shard])
            if rows >= self.window or place == len(shards) - 1:
                for number in drawn:
                    self.store.expect(number)
                members = torch.cat([torch.arange(shards[number].start, shards[number].stop) for number in drawn])
                yield from _integers(members[torch.randperm(rows, generator=generator)])
                drawn, rows = [], 0


def _integers(rows: torch.Tensor) -> Iterator[int]:
    # Python's own integers take four times the memory of the tensor.
    for part in rows.split(_AT_ONCE):
        yield from part.tolist()
