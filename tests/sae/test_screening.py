import pytest
import torch
from torch import Tensor

from selfreg.sae import kernels, screening
from selfreg.sae.kernels import select_active


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AMX; the products are the same on any other, only slower."""
    monkeypatch.setattr(screening, "screening_pays", lambda: True)


def inputs(features: int = 1536, states: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(features, 48, generator=generator), dim=1)
    # States that are sums of a few directions, as an SAE sees them.
    weights = torch.zeros(states, features).scatter_(
        1, torch.randint(features, (states, 12), generator=generator), 2.0
    )
    x = weights @ W + 0.05 * torch.randn(states, 48, generator=generator)
    return x, W, 0.1 * torch.randn(features, generator=generator)


def exact(x: Tensor, W: Tensor, b: Tensor, k: int) -> Tensor:
    pre = x @ W.T + b
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.usefixtures("screened")
def test_the_same_features_with_the_same_values(seed: int) -> None:
    x, W, b = inputs(seed=seed)
    assert screening.can_screen(x, len(W), 8)
    values, indices = select_active(x, W, b, 8)
    dense = torch.zeros(len(x), len(W)).scatter_add(1, indices, values)
    torch.testing.assert_close(dense, exact(x, W, b, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("screened")
def test_a_row_that_is_not_certain_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = inputs()
    # All features alike but for less than bfloat16 can tell: the proposals are arbitrary.
    W = W[:1] + 3e-4 * W
    wanted = exact(x, W, b.zero_(), 8)
    values, indices = select_active(x, W, b, 8)
    torch.testing.assert_close(torch.zeros_like(wanted).scatter_add(1, indices, values), wanted, rtol=1e-5, atol=1e-5)
    # Without the second pass the choice would be another one.
    monkeypatch.setattr(screening, "_MARGIN", -1e9)
    values, indices = select_active(x, W, b, 8)
    assert not torch.allclose(torch.zeros_like(wanted).scatter_add(1, indices, values), wanted, atol=1e-6)


@pytest.mark.usefixtures("screened")
def test_fewer_positive_than_k() -> None:
    x, W, b = inputs()
    b = b - 5.0
    wanted = exact(x, W, b, 32)
    assert ((wanted > 0).sum(dim=1) < 32).all()
    values, indices = select_active(x, W, b, 32)
    torch.testing.assert_close(torch.zeros_like(wanted).scatter_add(1, indices, values), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("screened")
def test_gradients_are_those_of_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = inputs()
    grads = []
    for pays in (True, False):
        monkeypatch.setattr(screening, "screening_pays", lambda pays=pays: pays)
        leaves = [W.clone().requires_grad_(), b.clone().requires_grad_(), W.clone().requires_grad_()]
        out, _, _ = kernels.sparse_autoencode(x, leaves[0], leaves[1], leaves[2], torch.zeros(48), 8)
        (out - x).pow(2).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


def test_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, _ = inputs()
    monkeypatch.setattr(screening, "screening_pays", lambda: False)
    assert not screening.can_screen(x, len(W), 8)
    monkeypatch.setattr(screening, "screening_pays", lambda: True)
    assert not screening.can_screen(x.double(), len(W), 8)
    assert not screening.can_screen(x, 512, 8)
    assert not screening.can_screen(x, len(W), 500)
