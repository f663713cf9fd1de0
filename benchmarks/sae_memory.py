"""Memory that a training step of a wide SAE takes on top of weights, gradients and the moments of Adam.

    python benchmarks/sae_memory.py --features 65536

Peak resident memory of this process over three steps, sampled every millisecond, less what it had between steps
(weights and moments) and less the gradients. All pre-activations of a batch would be batch · features · 4 bytes.

    python benchmarks/sae_memory.py --store 100000 --features 1024

Peak resident memory (VmHWM) of a process that trains an SAE for an epoch from a store of so many tokens, and from
one of ten times as many.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from sae_step import selfreg_step, write_store
from selfreg import ActivationStore, SAEConfig, SAEForFeatureExtraction, SAETrainer, SAETrainingArguments

MEBIBYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--store", type=int, help="tokens of the smaller store")
    parser.add_argument("--train-from", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_from:
        train(options)
        return
    if options.store:
        compare_stores(options)
        return
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


def compare_stores(options: argparse.Namespace) -> None:
    peaks = []
    for tokens in (options.store, 10 * options.store):
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder), torch.randn(tokens, options.width), 16_384)
            given = [f"--{name}={getattr(options, name)}" for name in ("features", "width", "k", "batch")]
            command = [sys.executable, __file__, *given, "--train-from", folder]
            peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
        print(f"{tokens:>12,} tokens, {tokens * options.width * 4 / MEBIBYTE:6.0f} MiB on disk: {peaks[-1]:.0f} MiB")
    print(f"ten times the tokens: {peaks[1] / peaks[0]:.3f} of the memory")


def train(options: argparse.Namespace) -> None:
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=options.width, num_features=options.features, k=options.k))
    with tempfile.TemporaryDirectory() as folder:
        args = SAETrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=options.batch, save_strategy="no", report_to="none"
        )
        SAETrainer(sae, args, train_dataset=ActivationStore(options.train_from)).train()
    # Not ru_maxrss, which a process inherits from the one that started it.
    print(resident("VmHWM"))


def resident(which: str = "VmRSS") -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


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
