"""The real Hub client in processes of its own, against the server of loopback.py."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from loopback import LoopbackHub

_TESTS = Path(__file__).parent
_SCRIPTS = _TESTS / "hub" / "scripts"


def popen_client(
    hub: LoopbackHub,
    script: str,
    *args: str | Path,
    cache: Path,
    offline: bool = False,
) -> "subprocess.Popen[str]":
    """Starts one of tests/hub/scripts against the server, with a cache of its own."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HOME")
    }
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_TESTS), environment.get("PYTHONPATH", "")]),
        "HF_TOKEN": "hf_owner",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", str(_SCRIPTS / script), *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_client(hub: LoopbackHub, script: str, *args: str | Path, **options: Any) -> None:
    """Runs one to its end."""
    client = popen_client(hub, script, *args, **options)
    out, err = client.communicate(timeout=280)
    assert client.returncode == 0, out[-2000:] + err[-4000:]
