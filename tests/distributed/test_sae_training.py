import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from process_helpers import launch
from sae_cases import CASES, SHARDED, result, train

pytestmark = pytest.mark.xdist_group("sae processes")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch("sae_cases.py", folder)
    return folder


def _compare(case: str, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(two)
    for name, tensor in one.items():
        if tensor.is_floating_point():
            difference = (tensor - two[name]).norm() / tensor.norm().clamp_min(1e-6)
            # A threshold learns from the pre-activations within a window around it: one that rounding moves over the
            # window's border counts as a whole.
            by_window = case == "jumprelu" and name in ("threshold", "log.grad_norm")
            assert difference < (5e-3 if by_window else 1e-4), f"{name}: {difference:.1e}"
        else:
            assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two_processes: Path, tmp_path: Path, name: str) -> None:
    one = result(train(name, tmp_path))
    assert one["log.loss"].shape == (20,)
    if name != "finetune":
        assert {"log.fvu", "log.l0", "log.aux_loss", "log.dead_fraction", "log.eval_fvu"} <= set(one)
        assert one["log.dead_fraction"].max() > 0, "no feature was dead: nothing to compare"
    _compare(name, one, load_file(two_processes / f"{name}.safetensors"))


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp_trains_as_one_process_and_its_checkpoint_loads(two_processes: Path, tmp_path: Path, name: str) -> None:
    _compare(name, result(train(name, tmp_path)), load_file(two_processes / f"fsdp-{name}.safetensors"))
    shutil.rmtree(tmp_path)
