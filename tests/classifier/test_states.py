import pytest
import torch

from selfreg.classifier.collator import ClassifierCollator
from selfreg.classifier.states import PooledStates


@pytest.mark.parametrize("shape", [(7, 4), (7, 2, 4)], ids=["texts", "pairs"])
def test_a_batch_taken_at_once_is_that_of_its_rows(shape: tuple[int, ...]) -> None:
    states = PooledStates(
        torch.randn(shape),
        torch.zeros(*shape[:-1], 3),
        torch.arange(7) % 2,
        weights=torch.rand(7),
        margins=torch.rand(7),
    )
    collate = ClassifierCollator(None)
    chosen = [5, 0, 3]
    at_once = collate(states.__getitems__(chosen))
    row_by_row = collate([states[i] for i in chosen])
    assert at_once.keys() == row_by_row.keys() == {"pooled", "labels", "weight", "margin"}
    for name, values in row_by_row.items():
        assert at_once[name].dtype == values.dtype
        assert torch.equal(at_once[name], values)
