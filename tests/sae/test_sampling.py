import itertools
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from selfreg import ActivationStore, HiddenStateExtractor
from selfreg.sae.sampling import WindowSampler


@pytest.fixture
def store(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> ActivationStore:
    return extractor.extract(texts, tmp_path / "s", shard_tokens=40)


def test_a_small_store_is_in_the_order_of_the_trainers_own_sampler(store: ActivationStore) -> None:
    sampler, own = WindowSampler(store, 5), SeedableRandomSampler(store, data_seed=5)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        own.set_epoch(epoch)
        assert list(sampler) == list(own)


def test_a_large_store_is_mixed_within_windows_of_drawn_shards(store: ActivationStore) -> None:
    shards = store.shard_rows()
    assert len(shards) > 10
    sampler = WindowSampler(store, 5, window=150)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(store))), "each row once"
    assert orders[0] != orders[1]
    # The first window is of a few shards, which lie apart.
    first = {next(n for n, shard in enumerate(shards) if row in shard) for row in orders[0][:150]}
    assert 2 <= len(first) < len(shards) / 2
    assert max(first) - min(first) >= len(first)
    steps = torch.tensor([b - a for a, b in itertools.pairwise(orders[0])])
    assert (steps == 1).float().mean() < 0.2


def test_reading_a_store_leaves_nothing_in_memory(store: ActivationStore) -> None:
    store.gather(range(len(store)))
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("what a process maps is not told on this system")
    assert str(store.path) not in mapped.read_text()
