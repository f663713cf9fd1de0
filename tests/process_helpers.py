"""Starts a script of this folder in several processes, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(script: str, *arguments: object, processes: int = 2, accelerate: bool = False) -> None:
    """Runs `tests/<script>` in several processes over gloo; fails with the end of what they said."""
    if accelerate:
        # Not --cpu: with it, `accelerate launch` starts one process, whatever their number, and leaves more to mpirun.
        start = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", str(processes)]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        start += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    else:
        start = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, "-m", *start, str(TESTS / script), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
