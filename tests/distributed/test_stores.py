import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from process_helpers import launch
from selfreg import ActivationStore
from selfreg.sae.statistics import evaluate_sae
from store_cases import SHARD_TOKENS, build_catalogues, make_extractor, make_texts, train_from_store

pytestmark = pytest.mark.xdist_group("store processes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written, after extractions in which one of them was killed."""
    folder = tmp_path_factory.mktemp("written")
    for which in (0, 1):
        with pytest.raises(AssertionError, match="SIGKILL"):
            launch("store_cases.py", "killed", folder, which)
        with pytest.raises(ValueError, match="is not whole: [1-9] shards"):
            ActivationStore(folder / f"killed-{which}")
    launch("store_cases.py", "write", folder, accelerate=True)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_write_the_store_of_one(folder: Path, tmp_path: Path) -> None:
    one = make_extractor().extract(make_texts(), tmp_path / "one", shard_tokens=SHARD_TOKENS)
    assert len(one.manifest["shards"]) > 8
    assert _files(folder / "store") == _files(tmp_path / "one")


@pytest.mark.parametrize("layer", [1, "final"])
def test_a_sharded_backbone_writes_the_same_store(folder: Path, tmp_path: Path, layer: Any) -> None:
    one = make_extractor(layer).extract(make_texts(), tmp_path / "one", shard_tokens=SHARD_TOKENS)
    two = ActivationStore(folder / f"sharded-{layer}")
    assert (two.text_fingerprint, two.num_tokens, two.spec) == (one.text_fingerprint, one.num_tokens, one.spec)
    for shard, other in zip(one.shards(), two.shards(), strict=True):
        assert torch.equal(shard.text_ids, other.text_ids)
        torch.testing.assert_close(shard.hidden_states, other.hidden_states)


def test_an_extraction_goes_on_after_a_kill_in_any_number_of_processes(folder: Path) -> None:
    # What two processes went on with; and one, after the kill of the other of them.
    assert _files(folder / "killed-1") == _files(folder / "store")
    first = min((folder / "killed-0").glob("*.safetensors"))
    written = first.stat().st_mtime_ns
    make_extractor().extract(make_texts(), folder / "killed-0", shard_tokens=SHARD_TOKENS)
    assert first.stat().st_mtime_ns == written
    assert _files(folder / "killed-0") == _files(folder / "store")


@pytest.mark.parametrize("source", ["from-store", "from-texts"])
def test_the_catalogue_of_two_processes_is_that_of_one(folder: Path, tmp_path: Path, source: str) -> None:
    catalog = build_catalogues(ActivationStore(folder / "store") if source == "from-store" else None)
    catalog.save_pretrained(tmp_path / "one")
    assert sum(bool(record.spans) for record in catalog) > 20
    assert _files(folder / source) == _files(tmp_path / "one")


def test_three_processes_read_what_two_have_written(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    launch("store_cases.py", "read", tmp_path, processes=3)
    state = load_file(tmp_path / "read.safetensors")
    store = ActivationStore(tmp_path / "store")
    trainer = train_from_store(tmp_path / "one", store, 60)
    torch.testing.assert_close(state.pop("fvu"), torch.tensor(evaluate_sae(trainer.model, store).fvu).double())
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)
