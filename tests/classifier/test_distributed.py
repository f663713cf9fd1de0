"""Two processes against one, at the same global batch."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from selfreg.classifier.shares import share_of
from selfreg.utils.files import read_json

# One training serves all.
pytestmark = pytest.mark.xdist_group("classifier processes")

_SCRIPT = Path(__file__).with_name("train_in_processes.py")


def start(output: Path, *launcher: str, arguments: Sequence[str] = ()) -> None:
    done = subprocess.run(
        [sys.executable, *launcher, str(_SCRIPT), str(output), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    start(folder)
    start(folder, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    start(folder, *torchrun, arguments=["fsdp"])
    return folder


def test_shares_in_order_are_all_rows() -> None:
    for num_rows, world in ((64, 2), (33, 2), (7, 4), (1, 3)):
        rows = [row for rank in range(world) for row in share_of(num_rows, rank, world)]
        assert rows[:num_rows] == list(range(num_rows))
        assert len(rows) % world == 0
        assert set(rows) == set(range(num_rows))


@pytest.mark.parametrize("other", ["2", "fsdp"])
def test_weights_agree(output: Path, other: str) -> None:
    one, two = (load_file(output / f"weights-{name}.safetensors") for name in ("1", other))
    # What is done to a model that was trained before is done with DDP alone.
    assert {name for name in one if not (other == "fsdp" and name.startswith("again."))} == two.keys()
    for name in two:
        expected = one[name]
        difference = float((two[name] - expected).norm() / expected.norm())
        assert difference < 1e-4, name


@pytest.mark.parametrize("other", ["2", "fsdp"])
def test_logs_agree(output: Path, other: str) -> None:
    one, two = (read_json(output / f"logs-{name}.json") for name in ("1", other))
    for name in ("cached", "live", "ids", "lora", "plugged"):
        assert [row["step"] for row in one[name]] == list(range(1, 13))
        for figure in ("loss", "task_loss", "similarity", "dependence"):
            expected = [row[figure] for row in one[name]]
            assert [row[figure] for row in two[name]] == pytest.approx(expected, rel=1e-3, abs=1e-6), (name, figure)
    for name in ("cached eval", "live eval", "ids eval", "lora eval"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
