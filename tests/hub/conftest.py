from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_helpers import run_client
from loopback import LoopbackHub, serve


@pytest.fixture(scope="session")
def hub() -> Iterator[LoopbackHub]:
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def pushed(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind is on the server; what must come back lies in the folder."""
    folder = tmp_path_factory.mktemp("pushed")
    run_client(hub, "push_all.py", folder, cache=folder / "cache")
    return folder
