from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from sae_helpers import States, make_args, make_sae
from selfreg import SAEConfig, SAEForFeatureExtraction, SAETrainer
from selfreg.sae import kernels
from selfreg.sae.activation_fns import ACTIVATIONS
from selfreg.sae.configuration import ACTIVATION_NAMES
from selfreg.sae.kernels import select_above, sparse_autoencode
from selfreg.sae.statistics import evaluate_sae


def reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, name: str) -> Tensor:
    """x̂, dense and by autograd."""
    pre = ((x - b_dec) @ W_enc.T + b_enc).relu()
    if name == "topk":
        values, indices = pre.topk(k, dim=1)
        active = torch.zeros_like(pre).scatter(1, indices, values)
    else:
        flat = pre.flatten()
        values, indices = flat.topk(k * len(x))
        active = torch.zeros_like(flat).scatter(0, indices, values).view_as(pre)
    return active @ W_dec + b_dec


def inputs(states: int = 9, width: int = 6, features: int = 24, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((states, width), (features, width), (features,), (features, width), (width,))
    return [torch.randn(shape, generator=generator, dtype=torch.double).requires_grad_() for shape in shapes]


def test_every_name_of_the_config_has_its_activation() -> None:
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_equals_the_dense_reference_with_gradients(name: str, k: int) -> None:
    fast, dense = inputs(), inputs()
    out, values, indices = sparse_autoencode(*fast, k, ACTIVATIONS[name].select)  # type: ignore[arg-type]
    wanted = reference(*dense, k, name)
    torch.testing.assert_close(out, wanted)
    assert (values >= 0).all()
    # No feature twice in a state.
    for row, active in zip(indices.tolist(), (values > 0).tolist(), strict=True):
        used = [feature for feature, is_active in zip(row, active, strict=True) if is_active]
        assert len(used) == len(set(used))
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip(fast, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_gradients_against_finite_differences(name: str) -> None:
    def run(*tensors: Tensor) -> Tensor:
        return sparse_autoencode(*tensors, 3, ACTIVATIONS[name].select)[0]  # type: ignore[call-arg]

    assert torch.autograd.gradcheck(run, inputs())


def test_states_with_many_more_than_k_get_all_of_them() -> None:
    x, W_enc, b_enc, W_dec, b_dec = (tensor.detach() for tensor in inputs(states=20, features=64))
    # One state so large that nearly all that is chosen of the batch is its own.
    x[7] *= 50
    out, values, _ = sparse_autoencode(x, W_enc, b_enc, W_dec, b_dec, 1, ACTIVATIONS["batch_topk"].select)
    torch.testing.assert_close(out, reference(x, W_enc, b_enc, W_dec, b_dec, 1, "batch_topk"))
    counts = (values > 0).sum(dim=1)
    assert counts[7] > 8
    assert counts.sum() == 20


def test_above_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b, *_ = (tensor.detach() for tensor in inputs(states=50))
    pre = x @ W.T + b
    for threshold in (torch.tensor(0.7, dtype=torch.double), torch.rand(24, dtype=torch.double)):
        wanted = pre * (pre > threshold)
        for elements in (1 << 24, 24 * 7):
            monkeypatch.setattr(kernels, "_CHUNK_ELEMENTS", elements)
            values, indices = select_above(x, W, b, threshold)
            assert values.shape[1] == (wanted > 0).sum(dim=1).max()
            torch.testing.assert_close(torch.zeros_like(pre).scatter_add(1, indices, values), wanted)
    values, _ = select_above(x, W, b, torch.tensor(1e9, dtype=torch.double))
    assert values.shape == (50, 1)
    assert not values.any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SAEForFeatureExtraction:
    sae = make_sae(activation="batch_topk")
    args = make_args(tmp_path_factory.mktemp("batch"), num_train_epochs=60, learning_rate=5e-3)
    SAETrainer(sae, args, train_dataset=States()).train()
    return sae


def test_batch_topk_learns_a_threshold_that_keeps_k_on_average(
    trained: SAEForFeatureExtraction, tmp_path: Path
) -> None:
    assert trained.threshold > 0
    figures = evaluate_sae(trained, States(seed=1))
    assert figures.l0 == pytest.approx(4, rel=0.15)
    counts = (trained.encode(States(seed=1).states).values > 0).sum(dim=1)
    assert counts.min() < 4 < counts.max()
    # States differ in how many features they need: with the same mean, better than the same number for each.
    fixed = make_sae()
    args = make_args(tmp_path, num_train_epochs=60, learning_rate=5e-3)
    SAETrainer(fixed, args, train_dataset=States()).train()
    assert figures.fvu < evaluate_sae(fixed, States(seed=1)).fvu


def test_evaluation_chooses_as_encode_does_whatever_the_batch(trained: SAEForFeatureExtraction) -> None:
    states = States(seed=2).states
    trained.eval()
    whole = trained(states).reconstruction
    parts = torch.cat([trained(part).reconstruction for part in states.split(7)])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trained.decode(trained.encode(states)), whole, rtol=1e-4, atol=1e-4)


def test_threshold_is_saved(trained: SAEForFeatureExtraction, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again.threshold, trained.threshold)
    states = States(seed=3).states
    torch.testing.assert_close(again.encode(states).to_dense(), trained.encode(states).to_dense())


def test_before_any_training_the_k_largest_are_taken() -> None:
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=48, k=4, activation="batch_topk")).eval()
    assert sae.encode(torch.randn(5, 16)).values.shape == (5, 4)


def test_unknown_activation_is_named() -> None:
    settings: dict[str, Any] = {"hidden_size": 16, "activation": "gelu"}
    with pytest.raises(ValueError, match="activation='gelu' is not known; choose one of topk, batch_topk"):
        SAEConfig(**settings)
