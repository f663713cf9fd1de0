import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfreg import similarity_penalty
from selfreg.classifier.penalty import (
    dependence_directions,
    dependence_term,
    orthonormal_basis,
    remove_features,
    subspace_share,
)
from selfreg.classifier.tasks import held_constant, residuals

SIMILARITIES = ("encoder", "dot", "cosine", "subspace")


def _double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradients_against_finite_differences(similarity: str) -> None:
    directions = _double(4, 6, seed=1)
    weight = _double(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: similarity_penalty(w, directions, similarity), (weight,))  # type: ignore[arg-type]


def test_gradient_of_the_dependence_term_against_finite_differences() -> None:
    directions = _double(4, 6, seed=1)
    assert torch.autograd.gradcheck(lambda w: dependence_term(w, directions), (_double(3, 6).requires_grad_(),))


@pytest.mark.parametrize("similarity", ["encoder", "dot"])
def test_absolute_products_with_unit_rows(similarity: str) -> None:
    weight, directions = _double(3, 6), 7 * _double(4, 6, seed=1)
    wanted = sum(abs(w @ (u / u.norm())) for w in weight for u in directions) / 12
    torch.testing.assert_close(similarity_penalty(weight, directions, similarity), wanted)  # type: ignore[arg-type]


def test_cosine_does_not_change_with_the_size_of_the_weights() -> None:
    weight, directions = _double(3, 6), _double(4, 6, seed=1)
    wanted = sum(abs(F.cosine_similarity(w, u, dim=0)) for w in weight for u in directions) / 12
    torch.testing.assert_close(similarity_penalty(weight, directions, "cosine"), wanted)
    torch.testing.assert_close(similarity_penalty(9 * weight, directions, "cosine"), wanted)


def test_subspace_is_the_projected_share_whatever_the_basis() -> None:
    weight, directions = _double(3, 6), _double(2, 6, seed=1)
    basis = torch.linalg.qr(directions.T).Q.T
    wanted = ((weight @ basis.T).norm(dim=1) ** 2 / weight.norm(dim=1) ** 2).mean()
    torch.testing.assert_close(similarity_penalty(weight, directions, "subspace"), wanted)
    mixed = torch.tensor([[1.0, 2], [0.5, -3], [4, 4]], dtype=torch.double) @ directions * 5
    torch.testing.assert_close(similarity_penalty(weight, mixed, "subspace"), wanted)
    inside = _double(3, 2, seed=2) @ directions
    torch.testing.assert_close(similarity_penalty(inside, directions, "subspace"), torch.ones((), dtype=torch.double))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_zero_weights_and_no_features(similarity: str) -> None:
    weight = torch.zeros(3, 6, requires_grad=True)
    value = similarity_penalty(weight, torch.randn(4, 6), similarity)  # type: ignore[arg-type]
    value.backward()
    assert value == 0
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    assert similarity_penalty(torch.randn(3, 6), torch.zeros(0, 6), similarity) == 0  # type: ignore[arg-type]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="similarity='angle' is not known"):
        similarity_penalty(torch.zeros(2, 3), torch.zeros(1, 3), "angle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width 3, the features 4"):
        similarity_penalty(torch.zeros(2, 3), torch.zeros(1, 4))


def test_basis_leaves_out_repeated_and_zero_rows() -> None:
    rows = torch.randn(2, 5)
    basis = orthonormal_basis(torch.cat([rows, 3 * rows, torch.zeros(1, 5)]))
    assert basis.shape == (2, 5)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2))
    torch.testing.assert_close(subspace_share(rows, basis), torch.tensor(1.0))


def test_removal_is_its_definition() -> None:
    h, encoder, bias, decoder = torch.randn(2, 3, 6), torch.randn(4, 6), torch.randn(4), torch.randn(4, 6)
    out = remove_features(h, encoder, bias, decoder)
    for b in range(2):
        for t in range(3):
            wanted = h[b, t].clone()
            for c in range(4):
                wanted -= max(0.0, float(encoder[c] @ h[b, t] + bias[c])) * decoder[c]
            torch.testing.assert_close(out[b, t], wanted)


def test_dependence_directions_are_within_label_covariances() -> None:
    h, z, y = _double(40, 5), _double(40, 3, seed=1).relu(), torch.arange(40) % 3
    constant = held_constant("single_label", y)
    got = dependence_directions(h, z, constant)
    hc, zc = h.clone(), z.clone()
    for label in range(3):
        hc[y == label] -= hc[y == label].mean(0)
        zc[y == label] -= zc[y == label].mean(0)
    for c in range(3):
        wanted = (hc * zc[:, c : c + 1]).mean(0) / zc[:, c].pow(2).mean().sqrt()
        torch.testing.assert_close(got[c], wanted.float())
    torch.testing.assert_close(dependence_directions(h, 7 * z, constant), got)


def test_what_follows_the_label_alone_is_no_dependence() -> None:
    y = torch.arange(300) % 3
    z = y.double().unsqueeze(1) * 5
    assert dependence_directions(_double(300, 4), z, held_constant("single_label", y)).abs().max() == 0


def test_dependence_sees_what_the_penalty_cannot() -> None:
    # The weights are orthogonal to the feature's direction, but what they read moves with the feature.
    z = _double(500, 1)
    h = torch.cat([z, z, _double(500, 1, seed=2)], dim=1)
    direction = torch.tensor([[1.0, 0, 0]])
    weight = torch.tensor([[0.0, 1, 0]])
    assert similarity_penalty(weight, direction, "dot") == 0
    C = dependence_directions(h, z, torch.ones(500, 1))
    assert dependence_term(weight, C) == pytest.approx(float(z.var(correction=0)), rel=1e-4)
    assert dependence_term(torch.tensor([[0.0, 0, 1.0]]), C) < 0.02


def test_residuals_within_labels() -> None:
    values = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    left = residuals(values, held_constant("single_label", torch.tensor([5, 5, 2, 2])))
    torch.testing.assert_close(left.flatten(), torch.tensor([-1.0, 1, -5, 5], dtype=torch.double))
