import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants

from sae_helpers import make_sae
from selfreg import SAEForFeatureExtraction
from selfreg.sae.interop import formats, locate

FIXTURES = Path(__file__).parent / "fixtures"
_COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Hub cache with one repo that holds three SAEs, laid out as huggingface_hub does."""
    repo = tmp_path / "cache" / "models--team--saes"
    snapshot = repo / "snapshots" / _COMMIT
    for name in ("saelens-jumprelu", "sparsify"):
        shutil.copytree(FIXTURES / name, snapshot / "layer_2" / name)
    make_sae().save_pretrained(snapshot / "own")
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(_COMMIT)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("subfolder", "kind"),
    [("layer_2/saelens-jumprelu", "SAELens jumprelu"), ("layer_2/sparsify", "sparsify"), ("own", None)],
)
def test_a_cached_repo_needs_no_network(subfolder: str, kind: str | None, cache: Path) -> None:
    sae = SAEForFeatureExtraction.from_pretrained("team/saes", subfolder=subfolder, cache_dir=cache)
    assert sae.config.converted_from == kind
    assert torch.isfinite(sae.W_enc).all()


def test_a_cached_repo_of_many_lists_them(cache: Path) -> None:
    with pytest.raises(ValueError, match="team.saes.* holds 3 SAEs") as error:
        SAEForFeatureExtraction.from_pretrained("team/saes", cache_dir=cache)
    for folder in ("layer_2/saelens-jumprelu", "layer_2/sparsify", "own"):
        assert folder in str(error.value)
    with pytest.raises(OSError, match=r"team/saes/layer_9 is not in the Hub's cache"):
        SAEForFeatureExtraction.from_pretrained("team/saes", subfolder="layer_9", cache_dir=cache)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Hub as far as listing goes; what is asked for is noted, and nothing can be downloaded."""
    asked: dict[str, Any] = {}

    def files(self: HfApi, repo_id: str, **kwargs: Any) -> list[str]:
        asked.update(kwargs, repo_id=repo_id)
        names = [f"layer_{layer}/width_{width}k/params.npz" for layer in range(26) for width in (16, 65)]
        return ["README.md", *names, "embedding/params.npz", "x/TopK7_l16.pth"]

    def download(repo_id: str, **kwargs: Any) -> str:
        asked["downloaded"] = kwargs
        raise AssertionError("nothing should be downloaded")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(HfApi, "list_repo_files", files)
    monkeypatch.setattr(locate, "snapshot_download", download)
    return asked


def test_a_repo_of_many_lists_them_before_any_download(online: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="google/scope holds 54 SAEs") as error:
        SAEForFeatureExtraction.from_pretrained("google/scope", revision="v1")
    assert "layer_0/width_16k" in str(error.value)
    assert "and 42 more" in str(error.value)
    assert online["revision"] == "v1"
    with pytest.raises(ValueError, match="google/scope/layer_7 holds 2 SAEs") as error:
        SAEForFeatureExtraction.from_pretrained("google/scope", subfolder="layer_7")
    assert str(error.value).splitlines()[1:] == ["  layer_7/width_16k", "  layer_7/width_65k"]
    assert "downloaded" not in online


def test_only_the_files_of_that_sae_are_downloaded(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    patterns: list[str] = []

    def download(repo_id: str, *, allow_patterns: list[str], **kwargs: Any) -> str:
        patterns.extend(allow_patterns)
        (tmp_path / "layer_3" / "width_16k").mkdir(parents=True)
        return str(tmp_path)

    monkeypatch.setattr(locate, "snapshot_download", download)
    place = locate.locate("google/scope", subfolder="layer_3/width_16k")
    assert place.path == tmp_path / "layer_3" / "width_16k"
    assert place.name == "google/scope/layer_3/width_16k"
    # No globs: a star would match in folders below as well.
    assert patterns == ["layer_3/width_16k/params.npz"]


def test_a_repo_whose_root_is_another_model_lists_what_is_below(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    files = ["config.json", "model.safetensors", "2_SparseAutoEncoder/config.json"]
    files.append("2_SparseAutoEncoder/model.safetensors")
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *args, **kwargs: files)
    monkeypatch.setattr(locate, "hf_hub_download", lambda *args, **kwargs: str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match=r"subfolder \(--subfolder\)\n  2_SparseAutoEncoder"):
        SAEForFeatureExtraction.from_pretrained("team/csr")
    assert "downloaded" not in online


def test_weights_in_shards_are_found(online: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_sae().save_pretrained(tmp_path, max_shard_size="5KB")
    files = [path.name for path in tmp_path.iterdir()]
    assert "model.safetensors.index.json" in files
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *args, **kwargs: [*files, "README.md"])
    monkeypatch.setattr(locate, "hf_hub_download", lambda *args, **kwargs: str(tmp_path / "config.json"))
    asked: list[str] = []

    def download(repo_id: str, *, allow_patterns: list[str], **kwargs: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(locate, "snapshot_download", download)
    assert locate.locate("team/own").is_own
    assert sorted(asked) == sorted(files)


def test_which_folders_hold_an_sae() -> None:
    files = ["a/cfg.json", "a/sae_weights.safetensors", "b/cfg.json", "c/d/ae.pt", "c/d/config.json", "x.pth", "ae.pt"]
    assert formats.list_saes(files) == [".", "a", "c/d"]
    assert formats.list_saes(["s/a_l1.pth", "s/a_l2.pth"]) == ["s/a_l1.pth", "s/a_l2.pth"]
    assert formats.list_saes(["cfg.json", "sae.safetensors"]) == ["."]
