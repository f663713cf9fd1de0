import pytest
import torch

from selfreg.classifier.collator import ClassifierCollator
from selfreg.classifier.states import PooledBatch, PooledStates


@pytest.fixture(params=["texts", "pairs"])
def states(request: pytest.FixtureRequest) -> PooledStates:
    shape = (7, 4) if request.param == "texts" else (7, 2, 4)
    return PooledStates(
        torch.randn(shape),
        torch.zeros(*shape[:-1], 3),
        torch.arange(7) % 2,
        weights=torch.rand(7),
        margins=torch.rand(7) if request.param == "pairs" else None,
    )


def test_a_batch_taken_at_once_is_that_of_its_rows(states: PooledStates) -> None:
    collate = ClassifierCollator(None)
    chosen = [5, 0, 3]
    at_once = collate(states.__getitems__(chosen))
    row_by_row = collate([states[i] for i in chosen])
    assert at_once.keys() == row_by_row.keys() >= {"pooled", "labels", "weight"}
    for name, values in row_by_row.items():
        assert at_once[name].dtype == values.dtype
        assert torch.equal(at_once[name], values)


def test_a_batch_is_rows_for_any_other_collator(states: PooledStates) -> None:
    batch = states.__getitems__([5, 0, 3])
    assert len(batch) == 3
    assert torch.equal(batch[1]["pooled"], states[0]["pooled"])
    assert isinstance(batch[1:], PooledBatch)
    assert torch.equal(batch[1:][1]["pooled"], states[3]["pooled"])
    assert [int(row["labels"]) for row in batch] == [1, 0, 1]
