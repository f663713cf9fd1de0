from collections.abc import Iterator

import pytest

from loopback import LoopbackHub, serve


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with serve() as server:
        yield server
