import pytest
import torch
from torch import Tensor

from selfreg.classifier.penalty import dependence_directions
from selfreg.classifier.running import RunningDependence, batch_constant
from selfreg.classifier.tasks import Task, held_constant

N, D, U, L = 600, 5, 3, 4


def _data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """States and activations that hang together, and both with the label; far from 0 as final states are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, L, (N,), generator=generator)
    z = (torch.randn(N, U, generator=generator) + 0.7 * labels.unsqueeze(1)).relu()
    h = z @ torch.randn(U, D, generator=generator) + 0.3 * torch.randn(N, D, generator=generator)
    return h + 20 + 2 * labels.unsqueeze(1), z, labels


def _labels_of(task: Task, labels: Tensor) -> Tensor:
    if task == "multi_label":
        return torch.stack([labels % 2, labels // 2, labels % 2], dim=1).float()
    return 1000 + 0.5 * labels.float() if task == "regression" else labels


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression", "preference"])
@pytest.mark.parametrize("batch_size", [3, 64, N])
def test_one_pass_that_forgets_nothing_is_the_closed_form(task: Task, batch_size: int) -> None:
    h, z, labels = _data()
    targets = _labels_of(task, labels)
    number = L if task == "single_label" else 3
    constant = batch_constant(task, targets, number)
    running = RunningDependence(U, D, constant.shape[1], momentum=1.0)
    for rows in torch.arange(N).split(batch_size):
        # Of three texts at most three labels are there: most batches lack some.
        running.update(h[rows], z[rows], batch_constant(task, targets[rows], number))
    wanted = dependence_directions(h, z, held_constant(task, targets))
    assert wanted.abs().max() > 0.3
    torch.testing.assert_close(running.directions, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_batches_smaller_than_the_labels_are_right_on_average(batch_size: int) -> None:
    h, z, labels = _data()
    generator = torch.Generator().manual_seed(1)
    running = RunningDependence(U, D, L)
    seen = []
    for step in range(6000):
        rows = torch.randint(0, N, (batch_size,), generator=generator)
        running.update(h[rows], z[rows], batch_constant("single_label", labels[rows], L))
        if step >= 1000 and step % 50 == 0:
            seen.append(running.directions)
    wanted = dependence_directions(h, z, held_constant("single_label", labels))
    error = torch.stack(seen).mean(dim=0) - wanted
    assert error.abs().max() < 0.05 * wanted.abs().max()


def test_it_follows_states_that_change() -> None:
    h, z, labels = _data()
    running = RunningDependence(U, D, L, momentum=0.9)
    for states in (h, -3 * h):
        for rows in torch.arange(N).repeat(3).split(30):
            running.update(states[rows], z[rows], batch_constant("single_label", labels[rows], L))
    wanted = dependence_directions(-3 * h, z, held_constant("single_label", labels))
    assert (running.directions - wanted).norm() < 0.2 * wanted.norm()


def test_nothing_is_said_too_early_nor_of_what_does_not_vary() -> None:
    h, z, labels = _data()
    # Follows the label alone, and is never active.
    z = torch.cat([z, 5.0 * labels.unsqueeze(1), torch.zeros(N, 1)], dim=1)
    running = RunningDependence(U + 2, D, L)
    assert running.directions.shape == (U + 2, D)
    assert running.directions.abs().max() == 0
    for rows in torch.arange(N).split(8):
        early = running.state_dict()["seen"] < 32
        running.update(h[rows], z[rows], batch_constant("single_label", labels[rows], L))
        early = early and running.state_dict()["seen"] < 32
        assert (running.directions.abs().max() == 0) == bool(early)
    assert running.directions[U:].abs().max() == 0
    assert (running.directions[:U].abs().amax(dim=1) > 0).all()


def test_short_memories_say_something_too() -> None:
    h, z, labels = _data()
    running = RunningDependence(U, D, L, momentum=0.5)
    for rows in torch.arange(64).split(2):
        running.update(h[rows], z[rows], batch_constant("single_label", labels[rows], L))
    assert running.state_dict()["count"] < 5
    assert running.directions.abs().max() > 0


def test_state_is_saved_and_no_gradient_flows() -> None:
    h, z, labels = _data()
    h = h.requires_grad_()
    constant = batch_constant("single_label", labels, L)
    first, second = RunningDependence(U, D, L), RunningDependence(U, D, L)
    first.update(h[:100], z[:100], constant[:100])
    second.load_state_dict({name: total.clone() for name, total in first.state_dict().items()})
    for running in (first, second):
        running.update(h[100:], z[100:], constant[100:])
    assert not first.directions.requires_grad
    torch.testing.assert_close(second.directions, first.directions, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the running dependence saved has shapes"):
        RunningDependence(U, D, L + 1).load_state_dict(first.state_dict())


def test_processes_sum_up() -> None:
    h, z, labels = _data()
    constant = batch_constant("single_label", labels, L)
    whole, doubled = RunningDependence(U, D, L), RunningDependence(U, D, L)
    whole.update(h, z, constant)
    # Two processes with the same batch.
    doubled.update(h, z, constant, reduce=lambda sums: {name: 2 * total for name, total in sums.items()})
    assert doubled.state_dict()["count"] == 2 * N
    torch.testing.assert_close(doubled.directions, whole.directions)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"momentum=1\.5 must be from 0 to 1"):
        RunningDependence(U, D, 1, momentum=1.5)
    with pytest.raises(ValueError, match=r"widths must be \(5, 3, 1\)"):
        RunningDependence(U, D, 1).update(torch.zeros(4, D + 1), torch.zeros(4, U), torch.ones(4, 1))
