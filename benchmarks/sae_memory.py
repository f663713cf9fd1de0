"""Memory that a training step of a wide SAE takes on top of weights, gradients and the moments of Adam.

    python benchmarks/sae_memory.py --features 65536

Peak resident memory of this process over three steps, sampled every millisecond, less what it had between steps
(weights and moments) and less the gradients. All pre-activations of a batch would be batch · features · 4 bytes.
"""

import argparse
import threading
import time
from pathlib import Path

import torch

from sae_step import selfreg_step

MEBIBYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    options = parser.parse_args()
    step, _ = selfreg_step(options.width, options.features, options.k)
    x = torch.randn(options.batch, options.width)
    # Adam makes its moments at the first.
    step(x)
    before = resident()
    with Peak() as peak:
        for _ in range(3):
            step(x)
    weights = 2 * options.features * options.width + options.features + options.width
    gradients = weights * 4 / MEBIBYTE
    print(f"{options.features:,} features, width {options.width}, batches of {options.batch:,} states")
    print(f"weights and moments   {3 * gradients:6.0f} MiB")
    print(f"gradients             {gradients:6.0f} MiB")
    print(f"all else at the peak  {peak.value - before - gradients:6.0f} MiB over what stays between steps")
    print(f"(all pre-activations of a batch would be {options.batch * options.features * 4 / MEBIBYTE:.0f} MiB)")


def resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Peak:
    """The most resident memory while it is entered."""

    def __enter__(self) -> "Peak":
        self.value, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.value = max(self.value, resident())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
