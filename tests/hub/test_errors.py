"""What a user gets wrong, and pushes that are cut short."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hub_helpers import popen_client, run_client
from loopback import LoopbackHub, serve
from selfreg.cli import app

# One push serves all.
pytestmark = pytest.mark.xdist_group("hub")


@pytest.fixture
def alone() -> Iterator[LoopbackHub]:
    with serve() as server:
        yield server


def test_bad_input(hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
    run_client(hub, "bad_input.py", pushed, cache=tmp_path)


def test_offline_without_a_cache(hub: LoopbackHub, tmp_path: Path) -> None:
    asked = len(hub.requests)
    run_client(hub, "offline.py", cache=tmp_path, offline=True)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("step", ["lfs", "commit"])
def test_a_push_that_is_cut_short_shows_nothing(step: str, tmp_path: Path, alone: LoopbackHub) -> None:
    hub = alone
    uploads = 0

    def breaks_at(method: str, path: str) -> bool:
        nonlocal uploads
        if step == "commit":
            return "/commit/" in path
        uploads += method == "PUT" and path.startswith("/lfs/")
        # Killed at its second file: here the process itself.
        if uploads == 2:
            client.kill()
        return uploads >= 2

    hub.breaks_at = breaks_at
    try:
        client = popen_client(hub, "push_one.py", tmp_path, cache=tmp_path / "cache")
        # The client asks again for a minute where a commit gets no answer.
        deadline = time.monotonic() + 30
        while client.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        client.kill()
        client.communicate()
    finally:
        hub.breaks_at = lambda method, path: False
    assert hub.repo("me/cut").paths() == [".gitattributes"]
    assert len(hub.blobs) > 1
    (tmp_path / "error").unlink(missing_ok=True)
    before = len(hub.requests)
    run_client(hub, "push_one.py", tmp_path, cache=tmp_path / "cache")
    assert not (tmp_path / "error").exists()
    assert {"adapter/adapter_model.safetensors", "backbone/model.safetensors", "model.safetensors"} <= set(
        hub.repo("me/cut").paths()
    )
    # What had arrived was not sent again.
    sent = [path for method, path in hub.requests[before:] if method == "PUT"]
    assert len(sent) == (2 if step == "lfs" else 0)


def test_what_can_not_be_pushed_from_the_command_line(tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        result = CliRunner().invoke(app, ["push", str(folder), "me/x"])
        assert result.exit_code == 1
        return " ".join(result.stderr.split())

    assert "there is no folder" in told(tmp_path / "none")
    assert "holds neither a sparse autoencoder, a classifier" in told(tmp_path)
    for name in ("classifier", "sae"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert f"push one of {tmp_path}/run/classifier, {tmp_path}/run/sae" in told(tmp_path / "run")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is a model of type 'llama', not one of selfreg's" in told(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "sparse_autoencoder"}')
    assert str(tmp_path) in told(tmp_path)
