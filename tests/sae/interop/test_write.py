from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_helpers import States, make_args, make_sae
from selfreg import SAEForFeatureExtraction, SAETrainer
from selfreg.sae.interop import saelens

KINDS: list[dict[str, Any]] = [
    {"activation": "topk"},
    {"activation": "topk", "tied": True},
    {"activation": "topk", "input_norm": "layer_norm"},
    {"activation": "batch_topk"},
    {"activation": "batch_topk", "prefixes": [8, 48]},
    {"activation": "jumprelu", "input_norm": "rms"},
    {"activation": "relu"},
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> SAEForFeatureExtraction:
    sae = make_sae(**request.param)
    SAETrainer(sae, make_args(tmp_path, learning_rate=5e-3), train_dataset=States()).train()
    sae.config.base_model_name_or_path, sae.config.layer = "some/model", 5
    return sae.eval()


def test_written_and_read_again(trained: SAEForFeatureExtraction, tmp_path: Path) -> None:
    saelens.write(trained, tmp_path / "lens")
    assert {path.name for path in (tmp_path / "lens").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    again = SAEForFeatureExtraction.from_pretrained(tmp_path / "lens")
    states = States(seed=1).states
    with torch.no_grad():
        torch.testing.assert_close(again(states).reconstruction, trained(states).reconstruction, rtol=1e-4, atol=1e-4)
    assert (again.config.base_model_name_or_path, again.config.layer) == ("some/model", 5)


def test_saelens_itself_reads_it(trained: SAEForFeatureExtraction, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed: make test-interop installs it")
    saelens.write(trained, tmp_path / "lens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "lens")
    states = States(seed=1).states
    with torch.no_grad():
        features = trained.encode(states)
        found = theirs.encode(states)
        torch.testing.assert_close(found, features.to_dense(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.decode(found), trained(states).reconstruction, rtol=1e-4, atol=1e-4)


def test_without_a_threshold_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no threshold yet"):
        saelens.write(make_sae(activation="batch_topk"), tmp_path / "lens")
    assert not (tmp_path / "lens").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saelens, "save_file", full)
    with pytest.raises(OSError, match="could not write .*lens: No space left"):
        saelens.write(make_sae(), tmp_path / "lens")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_an_untouched_tied_sae_are_whole(tmp_path: Path) -> None:
    saelens.write(make_sae(tied=True), tmp_path / "lens")
    state = load_file(tmp_path / "lens" / "sae_weights.safetensors")
    assert torch.equal(state["W_enc"].T, state["W_dec"])
