import io
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_helpers import States, make_args, make_sae
from selfreg import SAEForFeatureExtraction, SAETrainer
from selfreg.sae.interop import saelens
from selfreg.sae.statistics import evaluate_sae

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir())


def prepared(case: str, folder: Path) -> Path:
    """A copy of a fixture; state dicts become the pickles that the library writes."""
    copy = folder / case
    shutil.copytree(FIXTURES / case, copy)
    if (copy / "state.safetensors").exists():
        torch.save(load_file(copy / "state.safetensors"), copy / "ae.pt")
        (copy / "state.safetensors").unlink()
    return copy


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("case", CASES)
def test_gives_what_the_library_gives(case: str, tmp_path: Path) -> None:
    sae = SAEForFeatureExtraction.from_pretrained(prepared(case, tmp_path))
    expected = load_file(FIXTURES / case / "expected.safetensors")
    features = sae.encode(expected["states"])
    assert expected["features"].count_nonzero() > len(expected["features"])
    torch.testing.assert_close(features.to_dense(), expected["features"], rtol=1e-5, atol=1e-5)
    given = expected["states"] if sae.config.input_norm != "none" else None
    torch.testing.assert_close(sae.decode(features, given), expected["reconstruction"], rtol=1e-5, atol=1e-5)
    assert not sae.training
    torch.testing.assert_close(
        sae(expected["states"]).reconstruction, expected["reconstruction"], rtol=1e-5, atol=1e-5
    )
    # Saved in the project's own format it is still the same.
    sae.save_pretrained(tmp_path / "own")
    again = SAEForFeatureExtraction.from_pretrained(tmp_path / "own")
    assert torch.equal(again.encode(expected["states"]).to_dense(), features.to_dense())
    assert again.config.converted_from == sae.config.converted_from is not None


def test_provenance_is_kept(tmp_path: Path) -> None:
    sae = SAEForFeatureExtraction.from_pretrained(prepared("saelens-jumprelu", tmp_path))
    assert (sae.config.base_model_name_or_path, sae.config.layer) == ("openai-community/gpt2", 3)
    assert sae.config.converted_from == "SAELens jumprelu"
    sae = SAEForFeatureExtraction.from_pretrained(prepared("dictionary_learning-AutoEncoder", tmp_path))
    assert (sae.config.base_model_name_or_path, sae.config.layer) == ("EleutherAI/pythia-70m", 3)
    sae = SAEForFeatureExtraction.from_pretrained(prepared("dictionary_learning-MatryoshkaBatchTopKSAE", tmp_path))
    assert sae.config.prefixes == [4, 10, 20]
    folder = prepared("sparsify", tmp_path).rename(tmp_path / "layers.7")
    sae = SAEForFeatureExtraction.from_pretrained(folder, base_model_name_or_path="some/model", token_rule="text")
    assert (sae.config.base_model_name_or_path, sae.config.layer, sae.config.token_rule) == ("some/model", 7, "text")


@pytest.mark.parametrize("version", ["10.0.0", "6.0.0", None])
def test_any_version_of_the_configuration_is_read_with_its_options(version: str | None, tmp_path: Path) -> None:
    folder = prepared("saelens-topk-true", tmp_path)
    expected = load_file(FIXTURES / "saelens-topk-true" / "expected.safetensors")
    metadata = {} if version is None else {"sae_lens_version": version}
    edit(folder / "cfg.json", metadata=metadata)
    sae = SAEForFeatureExtraction.from_pretrained(folder)
    torch.testing.assert_close(sae.encode(expected["states"]).to_dense(), expected["features"])
    edit(folder / "cfg.json", twist=4)
    with pytest.raises(ValueError, match="twist=4"):
        SAEForFeatureExtraction.from_pretrained(folder)


def test_a_topk_sae_without_its_k_is_refused(tmp_path: Path) -> None:
    folder = prepared("saelens-topk", tmp_path)
    config = json.loads((folder / "cfg.json").read_text())
    del config["k"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say its k"):
        SAEForFeatureExtraction.from_pretrained(folder)


def test_what_from_pretrained_takes_elsewhere_it_takes_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = prepared("saelens-standard", tmp_path)
    _, info = SAEForFeatureExtraction.from_pretrained(folder, output_loading_info=True)  # type: ignore[misc]
    assert not info["missing_keys"]
    assert "MISSING" not in capfd.readouterr().err
    for name in ("dtype", "torch_dtype"):
        half = SAEForFeatureExtraction.from_pretrained(folder, **{name: torch.bfloat16})
        assert half.W_enc.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="k=99 is over num_features=20"):
        SAEForFeatureExtraction.from_pretrained(prepared("saelens-topk", tmp_path), k=99)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_a_converted_sae_is_finetuned_as_its_original(kind: str, tmp_path: Path) -> None:
    class Large(States):
        """States of an ordinary backbone: far from unit length."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.states = self.states * 30

    own = make_sae(activation=kind)
    SAETrainer(own, make_args(tmp_path, num_train_epochs=30, learning_rate=5e-3), train_dataset=Large()).train()
    saelens.write(own, tmp_path / "lens")
    other = SAEForFeatureExtraction.from_pretrained(tmp_path / "lens")
    before = evaluate_sae(other, Large(seed=1))
    args = make_args(tmp_path, objective="finetune", num_train_epochs=10, learning_rate=1e-3)
    SAETrainer(other, args, train_dataset=Large()).train()
    after = evaluate_sae(other, Large(seed=1))
    assert after.fvu < before.fvu + 0.01
    assert after.l0 == pytest.approx(before.l0, rel=0.2)


def test_files_that_are_cut_short_are_named(tmp_path: Path) -> None:
    folder = prepared("saelens-standard", tmp_path)
    for content in (b"", (folder / "sae_weights.safetensors").read_bytes()[:-40]):
        (folder / "sae_weights.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"sae_weights.safetensors could not be read"):
            SAEForFeatureExtraction.from_pretrained(folder)
    (folder / "cfg.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"cfg.json is not JSON"):
        SAEForFeatureExtraction.from_pretrained(folder)
    gemma(tmp_path / "scope")
    whole = (tmp_path / "scope" / "params.npz").read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        (tmp_path / "scope" / "params.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"params.npz could not be read"):
            SAEForFeatureExtraction.from_pretrained(tmp_path / "scope")


def test_transcoders_are_no_saes(tmp_path: Path) -> None:
    gemma(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3")
    with pytest.raises(ValueError, match="is a transcoder"):
        SAEForFeatureExtraction.from_pretrained(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3")


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.0.hook_resid_post", 0),
        ("blocks.8.hook_resid_pre", 7),
        ("blocks.0.hook_resid_pre", None),
        ("blocks.8.attn.hook_z", None),
        ("model.layers.12", 12),
        ("transformer.h.5", 5),
        ("model.layers.12.mlp", None),
    ],
)
def test_layers_are_counted_as_here(
    hook: str, layer: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prepared("saelens-standard", tmp_path)
    edit(folder / "cfg.json", metadata={"sae_lens_version": "6.1.0", "model_name": "m/m", "hook_name": hook})
    with caplog.at_level(logging.WARNING, logger="selfreg"):
        sae = SAEForFeatureExtraction.from_pretrained(folder)
    assert sae.config.layer == layer
    assert (hook in caplog.text) == (layer is None)


def test_an_sae_of_another_library_keeps_its_weights_when_trained_on(tmp_path: Path) -> None:
    sae = SAEForFeatureExtraction.from_pretrained(prepared("saelens-topk", tmp_path))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    args = make_args(tmp_path, max_steps=1, learning_rate=0.0)
    SAETrainer(sae, args, train_dataset=States(width=6)).train()
    for name in ("W_enc", "W_dec"):
        assert torch.equal(sae.state_dict()[name], before[name]), name
    # Centred and scaled for training, and still the same features, in units of the scale, and the same reconstruction.
    assert sae.is_normalized
    assert sae.scale != 1
    untouched = SAEForFeatureExtraction.from_pretrained(tmp_path / "saelens-topk")
    states = States(width=6).states
    with torch.no_grad():
        ours, theirs = sae.eval()(states), untouched(states)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.features.to_dense() * sae.scale, theirs.features.to_dense(), rtol=1e-4, atol=1e-4)


def test_old_saelens_configurations(tmp_path: Path) -> None:
    folder = prepared("saelens-standard", tmp_path)
    expected = load_file(FIXTURES / "saelens-standard" / "expected.safetensors")
    old = {"d_in": 6, "d_sae": 20, "dtype": "float32", "lr": 4e-4, "hook_point": "blocks.2.hook_resid_pre"}
    old |= {"model_name": "gpt2-small", "activation_fn_str": "relu", "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps(old))
    sae = SAEForFeatureExtraction.from_pretrained(folder)
    torch.testing.assert_close(sae.encode(expected["states"]).to_dense(), expected["features"])
    assert (sae.config.layer, sae.config.base_model_name_or_path) == (1, "openai-community/gpt2")
    edit(folder / "cfg.json", activation_fn_str="topk", activation_fn_kwargs={"k": 2})
    assert SAEForFeatureExtraction.from_pretrained(folder).encode(expected["states"]).values.shape[1] == 2
    edit(folder / "cfg.json", activation_fn_str="tanh-relu", activation_fn_kwargs={})
    with pytest.raises(ValueError, match="activation_fn_str='tanh-relu'"):
        SAEForFeatureExtraction.from_pretrained(folder)


def test_a_scale_that_was_not_folded_is_folded(tmp_path: Path) -> None:
    folder = prepared("saelens-jumprelu", tmp_path)
    expected = load_file(FIXTURES / "saelens-jumprelu" / "expected.safetensors")
    edit(folder / "cfg.json", normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match="normalize_activations='expected_average_only_in' means that"):
        SAEForFeatureExtraction.from_pretrained(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    sae = SAEForFeatureExtraction.from_pretrained(folder)
    features = sae.encode(expected["states"] / 0.25)
    torch.testing.assert_close(features.to_dense(), expected["features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(features), expected["reconstruction"] / 0.25, rtol=1e-5, atol=1e-5)


def gemma(folder: Path, **extra: Any) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    arrays = {
        "W_enc": generator.normal(size=(6, 20)),
        "W_dec": generator.normal(size=(20, 6)),
        "b_enc": generator.normal(size=20),
        "b_dec": generator.normal(size=6),
        "threshold": generator.uniform(0.5, 2, size=20),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays, **extra)
    return arrays


def test_gemma_scope(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    p = {name: torch.from_numpy(array) for name, array in gemma(folder).items()}
    sae = SAEForFeatureExtraction.from_pretrained(
        tmp_path / "gemma-scope-2b-pt-res", subfolder="layer_20/width_16k/average_l0_71"
    )
    h = torch.randn(9, 6) * 2
    pre = h @ p["W_enc"] + p["b_enc"]
    acts = (pre > p["threshold"]) * pre.relu()
    features = sae.encode(h)
    torch.testing.assert_close(features.to_dense(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(features), acts @ p["W_dec"] + p["b_dec"], rtol=1e-5, atol=1e-5)
    assert (sae.config.base_model_name_or_path, sae.config.layer) == ("google/gemma-2-2b", 20)


def authors(path: Path, k: int | None = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (6, 20), "b_enc": (20,), "b_dec": (6,)}
    weight = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = {"d_inp": 6, "d_hide": 20, **({} if k is None else {"topK": k})}
    torch.save({"weight": {**weight, "mask": torch.ones(20)}, "config": config}, path)
    return weight


@pytest.mark.parametrize("k", [3, None])
def test_the_papers_own_files(k: int | None, tmp_path: Path) -> None:
    path = tmp_path / "TopK7_l16_h65k_epoch5.pth"
    p = authors(path, k)
    h = torch.randn(9, 6)
    pre = (h - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    if k is not None:
        kept = pre.topk(k, dim=1)
        pre = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
    acts = pre.relu()
    for where in (path, tmp_path):
        sae = SAEForFeatureExtraction.from_pretrained(where)
        features = sae.encode(h)
        torch.testing.assert_close(features.to_dense(), acts)
        torch.testing.assert_close(sae.decode(features), acts @ p["W_enc"].T + p["b_dec"])
        assert sae.config.layer == 16
        assert sae.config.tied


@pytest.mark.parametrize(
    ("case", "file", "changes", "message"),
    [
        ("saelens-standard", "cfg.json", {"architecture": "transcoder"}, "architecture='transcoder' is not one of"),
        ("saelens-standard", "cfg.json", {"architecture": "temporal"}, "architecture='temporal'"),
        ("saelens-standard", "cfg.json", {"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ("saelens-standard", "cfg.json", {"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ("saelens-standard", "cfg.json", {"twist": 3}, "twist=3: not known here"),
        ("sparsify", "cfg.json", {"activation": "groupmax"}, "activation='groupmax'"),
        ("sparsify", "cfg.json", {"transcode": True}, "transcode=True"),
        ("sparsify", "cfg.json", {"skip_connection": True}, "skip_connection=True"),
        ("sparsify", "cfg.json", {"twist": 3}, "twist=3: not known here"),
        ("sentence-transformers-plain", "config.json", {"twist": 3}, "twist=3: not known here"),
        ("dictionary_learning-AutoEncoder", "config.json", {"trainer": {"dict_class": "CrossCoder"}}, "'CrossCoder'"),
        ("dictionary_learning-AutoEncoder", "config.json", {"trainer": None}, "does not name a dict_class"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    case: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = prepared(case, tmp_path)
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        SAEForFeatureExtraction.from_pretrained(folder)


def test_tensors_that_are_missing_or_not_known_are_named(tmp_path: Path) -> None:
    folder = prepared("saelens-standard", tmp_path)
    state = load_file(folder / "sae_weights.safetensors")
    save_file({**state, "W_skip": torch.ones(6)}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="W_skip, which is not known here"):
        SAEForFeatureExtraction.from_pretrained(folder)
    save_file({"W_enc": state["W_enc"]}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="lacks b_enc, W_dec, b_dec; it holds W_enc"):
        SAEForFeatureExtraction.from_pretrained(folder)
    save_file({**state, "b_enc": torch.ones(3)}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"b_enc is of shape \[3\], not \[20\]"):
        SAEForFeatureExtraction.from_pretrained(folder)


class _Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO()
    torch.save({"weight": _Harmful()}, stream)
    harmful = [stream.getvalue(), pickle.dumps(_Harmful()), b"", b"\x80"]
    folder = prepared("dictionary_learning-AutoEncoder", tmp_path)
    for content in harmful:
        for path in (folder / "ae.pt", tmp_path / "TopK7_l16.pth"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="could not be read with weights_only=True"):
                SAEForFeatureExtraction.from_pretrained(path if path.suffix == ".pth" else folder)
    assert not Path("harm").exists()
    np.savez(tmp_path / "params.npz", W_enc=np.array([_Harmful()], dtype=object))
    with pytest.raises(ValueError, match=r"params\.npz could not be read"):
        SAEForFeatureExtraction.from_pretrained(tmp_path / "params.npz")
    assert not Path("harm").exists()


def test_a_folder_of_many_lists_them(tmp_path: Path) -> None:
    for layer in (2, 10, 9):
        gemma(tmp_path / f"layer_{layer}" / "width_16k")
    # Such as the checkpoints of a training that was cut short.
    gemma(tmp_path / ".work" / "checkpoint-50")
    with pytest.raises(ValueError, match="holds 3 SAEs in folders below: choose one with subfolder") as error:
        SAEForFeatureExtraction.from_pretrained(tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [f"layer_{layer}/width_16k" for layer in (2, 9, 10)]
    with pytest.raises(ValueError, match=r"there is no 'layer_3'"):
        SAEForFeatureExtraction.from_pretrained(tmp_path, subfolder="layer_3")


def test_a_folder_without_any_names_the_formats(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"there is no SAE in .*SAELens \(cfg.json \+ sae_weights.safetensors\)"):
        SAEForFeatureExtraction.from_pretrained(tmp_path)


def test_a_name_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is no folder on this machine"):
        SAEForFeatureExtraction.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(OSError, match="no name of a repo on the Hub"):
        SAEForFeatureExtraction.from_pretrained("not/a/repo", cache_dir=tmp_path, local_files_only=True)


def test_models_that_are_no_sae_are_not_listed(tmp_path: Path) -> None:
    gemma(tmp_path / "layer_2")
    classifier = tmp_path / "checkpoint-5"
    classifier.mkdir()
    (classifier / "config.json").write_text('{"model_type": "regularized_sequence_classifier"}')
    (classifier / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 1 SAEs in folders below: [^\n]*\n  layer_2$"):
        SAEForFeatureExtraction.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no SAE: its config.json is that of .* 'regularized_sequence_classifier'"):
        SAEForFeatureExtraction.from_pretrained(classifier)
