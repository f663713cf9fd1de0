from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.nn.utils.stateless import _reparametrize_module
from transformers import AutoConfig, AutoModel

from selfreg import SAEConfig, SAEForFeatureExtraction
from selfreg.sae.modeling import normalized_error
from selfreg.sae.statistics import evaluate_sae


def make_sae(**kwargs: object) -> SAEForFeatureExtraction:
    torch.manual_seed(0)
    config = {"hidden_size": 8, "num_features": 32, "k": 4, **kwargs}
    sae = SAEForFeatureExtraction(SAEConfig(**config))
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.1)
    sae.set_normalization(torch.randn(8), torch.tensor(2.5))
    return sae


@pytest.fixture
def sae() -> SAEForFeatureExtraction:
    return make_sae()


@pytest.mark.parametrize("tied", [False, True])
def test_directions_are_in_raw_space(tied: bool) -> None:
    sae = make_sae(tied=tied)
    h = torch.randn(5, 8) * 3
    features = sae.encode(h)
    pre = h @ sae.encoder_directions.T + sae.encoder_bias
    torch.testing.assert_close(pre.gather(1, features.indices).relu(), features.values, rtol=1e-4, atol=1e-5)
    reconstruction = features.to_dense() @ sae.decoder_directions + sae.decoder_bias
    torch.testing.assert_close(sae.decode(features), reconstruction, rtol=1e-4, atol=1e-5)


def test_any_leading_shape(sae: SAEForFeatureExtraction) -> None:
    h = torch.randn(2, 3, 8)
    features = sae.encode(h)
    assert features.indices.shape == features.values.shape == (2, 3, 4)
    assert features.to_dense().shape == (2, 3, 32)
    flat = sae.encode(h.view(6, 8))
    assert torch.equal(features.to_dense().view(6, 32), flat.to_dense())
    torch.testing.assert_close(sae.decode(features), sae(h).reconstruction)


def test_output_figures_by_hand(sae: SAEForFeatureExtraction) -> None:
    h = torch.randn(50, 8) * 2
    out = sae(h)
    error = (h - out.reconstruction).pow(2).sum()
    torch.testing.assert_close(out.fvu, error / (h - h.mean(0)).pow(2).sum())
    torch.testing.assert_close(out.loss, (error / 2.5**2) / sae.normalize(h).pow(2).sum())
    torch.testing.assert_close(out.l0, (out.features.values > 0).float().sum(1).mean())
    assert out.aux_loss is None
    figures = evaluate_sae(sae, [{"hidden_states": row} for row in h])
    assert figures.fvu == pytest.approx(out.fvu.item(), rel=1e-4)
    assert figures.l0 == pytest.approx(out.l0.item())
    fired = out.features.to_dense().gt(0).any(0)
    assert figures.dead_fraction == pytest.approx(1 - fired.float().mean().item())


@pytest.mark.parametrize("tied", [False, True])
def test_losses_against_finite_differences(tied: bool) -> None:
    sae = make_sae(tied=tied).double()
    h = torch.randn(6, 8, dtype=torch.double)
    names, values = zip(*sae.named_parameters(), strict=True)
    # What the loss detaches has to stay the same while finite differences move the parameters.
    x, x_hat, ids = sae.normalize(h), torch.randn(6, 8, dtype=torch.double), torch.arange(0, 32, 3)

    def reconstruction(*parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(sae, dict(zip(names, parameters, strict=True)), (h,)).loss

    def residual(*parameters: torch.Tensor) -> torch.Tensor:
        with _reparametrize_module(sae, dict(zip(names, parameters, strict=True))):
            return sae.residual_loss(x, x_hat, ids, 3)

    assert torch.autograd.gradcheck(reconstruction, values)
    assert torch.autograd.gradcheck(residual, values)


def test_residual_loss_sends_no_gradient_to_the_live_reconstruction(sae: SAEForFeatureExtraction) -> None:
    h = torch.randn(6, 8)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[:10] = True
    parts = sae.task_loss(h, dead, 0.1)
    live_grad = torch.autograd.grad(parts.live_loss, sae.W_dec, retain_graph=True)[0]
    dead_grad = torch.autograd.grad(parts.aux_loss, sae.W_dec)[0]
    assert live_grad[dead].abs().max() == 0
    never = torch.zeros(32, dtype=torch.bool)
    never[0] = True
    with torch.no_grad():
        sae.b_enc[0] = -1000.0
    grad = torch.autograd.grad(sae.task_loss(h, never, 0.1).aux_loss, sae.W_enc)[0]
    assert grad[0].abs().max() > 0, "a feature below zero on every token gets no gradient"
    del grad
    assert dead_grad[~dead].abs().max() == 0
    assert dead_grad[dead].abs().max() > 0


def test_task_loss_by_hand(sae: SAEForFeatureExtraction) -> None:
    h = torch.randn(6, 8)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[:10] = True
    x = sae.normalize(h)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc

    def top(allowed: torch.Tensor) -> torch.Tensor:
        values, indices = pre.masked_fill(~allowed, -torch.inf).topk(4, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values)

    y1 = top(~dead).relu() @ sae.W_dec + sae.b_dec
    # Not rectified: a dead feature is below zero on every token, and would never learn through a ReLU.
    wanted_live, wanted_dead = normalized_error(x, y1), normalized_error(x - y1, top(dead) @ sae.W_dec)
    parts = sae.task_loss(h, dead, 0.1)
    torch.testing.assert_close(parts.live_loss, wanted_live)
    torch.testing.assert_close(parts.aux_loss, wanted_dead)
    torch.testing.assert_close(parts.loss, wanted_live + 0.1 * wanted_dead)


def test_nothing_dead_and_nothing_live(sae: SAEForFeatureExtraction) -> None:
    h = torch.randn(6, 8)
    none = torch.zeros(32, dtype=torch.bool)
    assert sae.task_loss(h, none, 0.1).aux_loss == 0
    assert sae(h, dead=none, aux_coefficient=1.0).aux_loss is None
    one_live = ~none
    one_live[0] = False
    assert torch.isfinite(sae.task_loss(h, one_live, 0.1).loss)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_with_auto_classes(tied: bool, tmp_path: Path) -> None:
    sae = make_sae(tied=tied)
    sae.tokens_since_fired += 7
    sae.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SAEConfig)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, SAEForFeatureExtraction)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_bad_configuration_is_named() -> None:
    with pytest.raises(ValueError, match="k=33 is over num_features=32"):
        SAEConfig(hidden_size=8, num_features=32, k=33)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        SAEConfig(hidden_size=8, num_features=32, k=0)
    with pytest.raises(ValueError, match="activation='gelu' is not known"):
        SAEConfig(hidden_size=8, num_features=32, k=2, activation="gelu")


def test_states_of_another_width_are_refused(sae: SAEForFeatureExtraction) -> None:
    with pytest.raises(ValueError, match="width 8, these have 9"):
        sae.encode(torch.randn(2, 9))
    with pytest.raises(ValueError, match="can't normalise"):
        sae.set_normalization(torch.zeros(8), torch.tensor(0.0))


def without(folder: Path, *names: str) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in names}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_missing_counters_change_no_weight(sae: SAEForFeatureExtraction, tmp_path: Path) -> None:
    sae.save_pretrained(tmp_path)
    again = SAEForFeatureExtraction.from_pretrained(without(tmp_path, "dead_on_task", "tokens_since_fired"))
    for name, tensor in sae.state_dict().items():
        if name not in ("dead_on_task", "tokens_since_fired"):
            assert torch.equal(again.state_dict()[name], tensor), name
    assert not again.dead_on_task.any()
    assert not again.tokens_since_fired.any()


@pytest.mark.parametrize("name", ["mean", "scale", "W_dec", "b_enc"])
def test_missing_weight_is_an_error(sae: SAEForFeatureExtraction, name: str, tmp_path: Path) -> None:
    sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"lacks {name}: it is not a whole sparse autoencoder"):
        SAEForFeatureExtraction.from_pretrained(without(tmp_path, name))


def test_weights_are_loaded_as_float32(sae: SAEForFeatureExtraction, tmp_path: Path) -> None:
    sae.to(torch.bfloat16).save_pretrained(tmp_path)
    assert SAEForFeatureExtraction.from_pretrained(tmp_path).dtype == torch.float32
    assert SAEForFeatureExtraction.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
