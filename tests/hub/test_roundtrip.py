"""Pushed from one process, loaded in another with an empty cache: the same bytes, the same logits."""

from pathlib import Path

import pytest

from hub_helpers import run_client
from loopback import LoopbackHub

# One push serves all.
pytestmark = pytest.mark.xdist_group("hub")


def card_of(hub: LoopbackHub, name: str, branch: str = "main") -> str:
    repo = hub.repo(name)
    return hub.blobs[repo.commits[repo.refs[branch]]["README.md"]].decode()


def test_what_lies_on_the_hub(hub: LoopbackHub, pushed: Path) -> None:
    assert hub.repo("me/sae").messages[:2] == ["initial commit", "the first one"]
    assert {"config.json", "model.safetensors"} <= set(hub.repo("me/sae").paths())
    assert hub.repo("me/unintended").private
    assert not hub.repo("me/sae").private
    assert {"features.parquet", "catalog.json", "README.md"} <= set(hub.repo("me/catalog", "datasets").paths())
    adapted = set(hub.repo("me/adapted").paths())
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "tokenizer.json"} <= adapted
    assert not any(path.startswith("backbone/") for path in adapted)
    assert "backbone/model.safetensors" in hub.repo("me/whole").paths()
    for name in ("me/adapted", "me/by-folder"):
        assert {"adapter/adapter_model.safetensors", "model.safetensors"} <= set(hub.repo(name).paths())
    assert "unintended_features.json" in adapted
    for branch in ("main", "dev"):
        assert card_of(hub, "me/by-hand", branch) == "by hand"
    assert '"me/by-folder")' in card_of(hub, "me/by-folder")
    assert card_of(hub, "me/by-folder-too") == "mine"
    left = hub.repo("me/once-adapted").paths()
    assert "model.safetensors" in left
    assert not any(path.startswith(("adapter/", "backbone/")) for path in left)
    shards = {path for path in hub.repo("me/in-shards").paths() if path.endswith(".safetensors")}
    assert len(shards) > 2
    assert "model.safetensors.index.json" in hub.repo("me/in-shards").paths()
    assert len(hub.repo("me/in-shards").commits) == 2
    in_one = [path for path in hub.repo("me/once-in-shards").paths() if path.startswith("model")]
    assert in_one == ["model.safetensors"]
    assert {"main", "dev", "refs/pr/1"} == set(hub.repo("me/classifier").refs)
    # Everything of one push is one commit.
    assert len(hub.repo("me/whole").commits) == 2
    # Saves are pushed in the background: of one that the next overtakes there is nothing left to commit.
    messages = hub.repo("me/trained").messages
    in_progress = [message for message in messages if message.startswith("Training in progress")]
    assert in_progress
    assert set(in_progress) <= {"Training in progress, epoch 1", "Training in progress, epoch 2"}
    assert messages[-1] == "End of training"
    for name in ("trained", "sae-trained"):
        repo = hub.repo(f"me/{name}")
        for sha, files in repo.commits.items():
            if len(files) > 1 and name == "trained":
                assert "adapter/adapter_model.safetensors" in files, sha


def test_another_process_with_an_empty_cache(hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
    run_client(hub, "load_all.py", pushed, cache=tmp_path)


def test_offline_from_the_cache(hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
    run_client(hub, "load_all.py", pushed, cache=tmp_path)
    asked = len(hub.requests)
    run_client(hub, "load_all.py", pushed, cache=tmp_path, offline=True)
    assert len(hub.requests) == asked
