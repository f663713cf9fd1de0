from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from sae_helpers import States, make_args, make_sae
from selfreg import SAEConfig, SAEForFeatureExtraction, SAETrainer
from selfreg.sae import kernels
from selfreg.sae.activation_fns import ACTIVATIONS, Weights
from selfreg.sae.activation_fns.jumprelu import BANDWIDTH
from selfreg.sae.configuration import ACTIVATION_NAMES
from selfreg.sae.kernels import select_above
from selfreg.sae.outputs import SparseFeatures
from selfreg.sae.prefixes import decode_prefixes
from selfreg.sae.statistics import evaluate_sae


def reference(x: Tensor, weights: Weights, k: int, name: str) -> tuple[Tensor, Tensor | None]:
    """x̂ and what is penalised: dense, by autograd, for JumpReLU with the straight-through estimate of its paper."""
    pre = (x - weights.b_dec) @ weights.W_enc.T + weights.b_enc
    penalty = None
    if name == "topk":
        values, indices = pre.topk(k, dim=1)
        active = torch.zeros_like(pre).scatter(1, indices, values.relu())
    elif name == "batch_topk":
        values, indices = pre.flatten().topk(k * len(x))
        active = torch.zeros_like(pre).flatten().scatter(0, indices, values.relu()).view_as(pre)
    elif name == "relu":
        active = pre.relu()
        penalty = (active * weights.W_dec.norm(dim=1)).sum(dim=1).mean() / x.shape[1]
    else:
        assert weights.threshold is not None
        gate = _Step.apply(pre, weights.threshold)
        # ∂a/∂θ = -θ/ε in the box, not -pre/ε.
        active = pre * gate.detach() + weights.threshold.detach() * (gate - gate.detach())
        penalty = gate.sum(dim=1).mean() / x.shape[1]
    return active @ weights.W_dec + weights.b_dec, penalty


class _Step(torch.autograd.Function):
    """H(pre - θ), with -1/ε 1[|pre - θ| < ε/2] as its derivative by θ, and none by pre."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        pre, threshold = ctx.saved_tensors
        box = ((pre - threshold).abs() < BANDWIDTH / 2).to(pre.dtype)
        return None, (-grads[0] * box / BANDWIDTH).sum(dim=0)


def inputs(states: int = 9, width: int = 6, features: int = 24, *, seed: int = 0) -> list[Tensor]:
    """x, W_enc, b_enc, W_dec, b_dec, threshold."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((states, width), (features, width), (features,), (features, width), (width,))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.double) for shape in shapes]
    # Above half of the bandwidth: below it the box would reach what is not above zero, which is never looked at.
    tensors.append(BANDWIDTH / 2 + torch.rand(features, generator=generator, dtype=torch.double))
    return [tensor.requires_grad_() for tensor in tensors]


def test_every_name_of_the_config_has_its_activation() -> None:
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_equals_the_dense_reference_with_gradients(name: str, k: int) -> None:
    (x, *fast), (y, *dense) = inputs(), inputs()
    out, active = ACTIVATIONS[name].autoencode(x, Weights(*fast), k)
    wanted, penalty = reference(y, Weights(*dense), k, name)
    torch.testing.assert_close(out, wanted)
    assert (active.values >= 0).all()
    # No feature twice in a state.
    for row, used in zip(active.indices.tolist(), (active.values > 0).tolist(), strict=True):
        chosen = [feature for feature, is_active in zip(row, used, strict=True) if is_active]
        assert len(chosen) == len(set(chosen))
    assert active.values.any()
    weight = torch.randn_like(out)
    losses = [(out * weight).sum(), (wanted * weight).sum()]
    assert (active.sparsity is None) == (penalty is None) == (ACTIVATIONS[name].penalty == "none")
    if active.sparsity is not None and penalty is not None:
        torch.testing.assert_close(active.sparsity, penalty)
        losses = [losses[0] + 3 * active.sparsity, losses[1] + 3 * penalty]
    for loss in losses:
        loss.backward()
    for a, b in zip([x, *fast], [y, *dense], strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    assert (fast[4].grad is not None) == (name == "jumprelu")


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_encoding_alone_is_the_same(name: str) -> None:
    x, *tensors = inputs()
    weights = Weights(*tensors)
    _, both = ACTIVATIONS[name].autoencode(x, weights, 3)
    alone = ACTIVATIONS[name].encode(x, weights, 3)
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_gradients_against_finite_differences(name: str) -> None:
    # Of the threshold the step has none, only an estimate: that is compared with the dense reference above.
    *tensors, threshold = inputs()
    threshold = threshold.detach()

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return ACTIVATIONS[name].autoencode(x, Weights(*tensors, threshold), 3)[0]

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_weights_of_some_features_alone(name: str) -> None:
    x, *tensors = inputs()
    ids = torch.tensor([3, 4, 9, 17, 20])
    weights = Weights(*tensors).of(ids)
    out, active = ACTIVATIONS[name].autoencode(x, weights, 2)
    wanted, _ = reference(x, weights, 2, name)
    torch.testing.assert_close(out, wanted)
    assert active.indices.max() < 5


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
def test_starts_where_k_features_are_active(name: str) -> None:
    x, *tensors = (tensor.detach() for tensor in inputs(states=200, features=64))
    tensors[1].zero_()
    weights = Weights(*tensors)
    ACTIVATIONS[name].start_from(x, weights, 5)
    values = ACTIVATIONS[name].encode(x, weights, 5).values
    assert (values > 0).sum(dim=1).double().mean() == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_prefixes_equal_the_dense_reference_with_gradients(name: str) -> None:
    (x, *fast), (y, *dense) = inputs(), inputs()
    ends = torch.tensor([2, 7, 8, 24])
    active = ACTIVATIONS[name].encode(x, Weights(*fast), 4)
    out = decode_prefixes(active.values, active.indices, fast[2], ends)
    features = SparseFeatures(*reversed(ACTIVATIONS[name].encode(y, Weights(*dense), 4)[:2]), 24).to_dense()
    wanted = torch.stack([features[:, :end] @ dense[2][:end] for end in ends], dim=1)
    torch.testing.assert_close(out, wanted)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip([x, *fast[:4]], [y, *dense[:4]], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_states_with_many_more_than_k_get_all_of_them() -> None:
    x, *tensors = (tensor.detach() for tensor in inputs(states=20, features=64))
    # One state so large that nearly all that is chosen of the batch is its own.
    x[7] *= 50
    out, active = ACTIVATIONS["batch_topk"].autoencode(x, Weights(*tensors), 1)
    torch.testing.assert_close(out, reference(x, Weights(*tensors), 1, "batch_topk")[0])
    counts = (active.values > 0).sum(dim=1)
    assert counts[7] > 8
    assert counts.sum() == 20


def test_above_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = (tensor.detach() for tensor in inputs(states=50)[:3])
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
    with pytest.raises(ValueError, match="activation='gelu' is not known; choose one of topk, batch_topk, jumprelu"):
        SAEConfig(**settings)


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
def test_the_penalty_is_led_to_where_k_features_are_active(name: str, tmp_path: Path) -> None:
    sae = make_sae(activation=name)
    args = make_args(tmp_path, num_train_epochs=60, learning_rate=5e-3)
    trainer = SAETrainer(sae, args, train_dataset=States())
    trainer.train()
    figures = evaluate_sae(sae, States(seed=1))
    assert figures.l0 == pytest.approx(4, rel=0.25)
    assert figures.fvu < 0.6
    logged = [log for log in trainer.state.log_history if "sparsity" in log]
    assert logged
    # Saved and resumed with the weights.
    sae.save_pretrained(tmp_path / "sae")
    again = SAEForFeatureExtraction.from_pretrained(tmp_path / "sae")
    if name == "relu":
        assert again.sparsity_coefficient == sae.sparsity_coefficient != 1
    states = States(seed=3).states
    torch.testing.assert_close(again.encode(states).to_dense(), sae.encode(states).to_dense())


def test_a_penalty_that_is_given_stays(tmp_path: Path) -> None:
    counts = []
    for coefficient in (0.0, 0.3, 3.0):
        sae = make_sae(activation="relu")
        args = make_args(tmp_path, num_train_epochs=20, learning_rate=5e-3, sparsity_coefficient=coefficient)
        SAETrainer(sae, args, train_dataset=States()).train()
        counts.append(evaluate_sae(sae, States(seed=1)).l0)
    assert counts[0] > counts[1] > counts[2]


def test_thresholds_stay_at_zero_or_above_and_lead_to_k(tmp_path: Path) -> None:
    for k in (4, 8, 12):
        torch.manual_seed(0)
        sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=48, k=k, activation="jumprelu"))
        SAETrainer(sae, make_args(tmp_path, num_train_epochs=60), train_dataset=States()).train()
        assert sae.threshold.min() >= 0
        assert evaluate_sae(sae, States(seed=1)).l0 == pytest.approx(k, rel=0.2)


def test_batch_topk_follows_its_threshold_in_finetuning(tmp_path: Path) -> None:
    sae = make_sae(activation="batch_topk")
    SAETrainer(sae, make_args(tmp_path, learning_rate=5e-3), train_dataset=States()).train()
    before = float(sae.threshold)
    args = make_args(tmp_path, objective="finetune", learning_rate=1e-3, num_train_epochs=40)
    SAETrainer(sae, args, train_dataset=States(dictionary=1)).train()
    assert float(sae.threshold) != before
    assert evaluate_sae(sae, States(seed=1, dictionary=1)).l0 == pytest.approx(4, rel=0.2)


def test_prefixes_are_kept_in_finetuning(tmp_path: Path) -> None:
    def first_error(sae: SAEForFeatureExtraction) -> float:
        states = States(seed=1).states
        with torch.no_grad():
            features = sae.encode(states)
            first = features._replace(values=features.values * (features.indices < 6))
            return float((sae.decode(first) - states).pow(2).sum())

    sae = make_sae(prefixes=[6, 48])
    SAETrainer(sae, make_args(tmp_path, num_train_epochs=30, learning_rate=5e-3), train_dataset=States()).train()
    before = first_error(sae)
    args = make_args(tmp_path, objective="finetune", learning_rate=1e-3, num_train_epochs=20)
    SAETrainer(sae, args, train_dataset=States()).train()
    assert first_error(sae) < before


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_no_states_have_no_features(name: str) -> None:
    sae = make_sae(activation=name)
    if name == "batch_topk":
        sae.threshold.fill_(1.0)
    assert sae.encode(torch.zeros(0, 16)).to_dense().shape == (0, 48)


@pytest.mark.parametrize("name", ["batch_topk", "jumprelu", "relu"])
def test_finetuning_takes_any_activation(name: str, tmp_path: Path) -> None:
    sae = make_sae(activation=name)
    SAETrainer(sae, make_args(tmp_path, learning_rate=5e-3), train_dataset=States()).train()
    before = evaluate_sae(sae, States(seed=1, dictionary=1))
    args = make_args(tmp_path, objective="finetune", learning_rate=1e-3, num_train_epochs=20)
    trainer = SAETrainer(sae, args, train_dataset=States(dictionary=1))
    trainer.train()
    after = evaluate_sae(sae, States(seed=1, dictionary=1))
    # With relu the error is bought with activation: what is minimised is both.
    losses = [log["live_loss"] for log in trainer.state.log_history if "live_loss" in log]
    assert losses[-1] < 0.9 * losses[0]
    assert name == "relu" or after.fvu < before.fvu


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_prefixes_make_the_first_features_the_general_ones(name: str, tmp_path: Path) -> None:
    errors = {}
    for prefixes in (None, [6, 16, 48]):
        sae = make_sae(activation=name, prefixes=prefixes)
        args = make_args(tmp_path, num_train_epochs=40, learning_rate=5e-3)
        SAETrainer(sae, args, train_dataset=States()).train()
        states = States(seed=1).states
        with torch.no_grad():
            features = sae.encode(states)
            first = features._replace(values=features.values * (features.indices < 6))
            errors[prefixes is not None] = float((sae.decode(first) - states).pow(2).sum())
    assert errors[True] < errors[False]
    sae.save_pretrained(tmp_path / "sae")
    assert AutoModel.from_pretrained(tmp_path / "sae").prefix_ends.tolist() == [6, 16, 48]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefixes": [8, 4, 48]}, r"prefixes=\[8, 4, 48\] must rise"),
        ({"prefixes": [8, 16]}, "to num_features=48"),
        ({"prefixes": []}, "to num_features=48"),
        ({"prefixes": [48], "activation": "relu"}, "prefixes are for topk and batch_topk, not for activation='relu'"),
        ({"input_norm": "batch"}, "input_norm"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        SAEConfig(**{"hidden_size": 16, "num_features": 48, "k": 4, **settings})


@pytest.mark.parametrize("norm", ["rms", "layer_norm"])
def test_states_that_are_normalised_one_by_one(norm: str, tmp_path: Path) -> None:
    sae = make_sae(input_norm=norm)
    SAETrainer(sae, make_args(tmp_path, num_train_epochs=30, learning_rate=5e-3), train_dataset=States()).train()
    states = States(seed=1).states
    with torch.no_grad():
        features = sae.encode(states)
    # Length (and for layer_norm the mean as well) is not the SAE's business.
    torch.testing.assert_close(sae.encode(states * 3).to_dense(), features.to_dense(), rtol=1e-3, atol=1e-3)
    figures = evaluate_sae(sae, States(seed=1))
    sae.eval()
    with torch.no_grad():
        output = sae(states)
    torch.testing.assert_close(sae.decode(features, states).detach(), output.reconstruction)
    fvu = (states - output.reconstruction).pow(2).sum() / (states - states.mean(dim=0)).pow(2).sum()
    assert figures.fvu == pytest.approx(float(fvu), rel=1e-3)
    assert float(output.fvu) == pytest.approx(float(fvu), rel=1e-3)
    assert figures.fvu < 0.5
    with pytest.raises(ValueError, match="give decode"):
        sae.decode(features)
