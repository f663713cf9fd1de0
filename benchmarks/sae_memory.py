"""Memory that a training step of a wide SAE takes on top of weights, gradients and the moments of Adam.

    python benchmarks/sae_memory.py --features 65536

Peak resident memory of this process over three steps, sampled every millisecond, less what it had before them (weights
and moments) and less the gradients. All pre-activations of a batch at once would be batch · features · 4 bytes.
"""

import argparse
import threading
import time
from pathlib import Path

import torch

from selfreg import SAEConfig, SAEForFeatureExtraction

MEBIBYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    options = parser.parse_args()
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=options.width, num_features=options.features, k=options.k))
    sae.set_normalization(torch.zeros(options.width), torch.tensor(1.0001))
    parameters = list(sae.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    for parameter in parameters:
        # Not zeros: of memory that was never written to nothing is resident.
        moments = {name: torch.full_like(parameter, 1e-9) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    x = torch.randn(options.batch, options.width)
    before = resident()
    with Peak() as peak:
        for _ in range(3):
            output = sae(x, dead=sae.tokens_since_fired >= 10_000_000, aux_coefficient=1 / 32)
            sae.count_fired(output.features)
            output.loss.backward()
            sae.project_decoder_gradient()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            sae.normalize_decoder()
            optimizer.zero_grad()
    gradients = sum(parameter.numel() * 4 for parameter in parameters) / MEBIBYTE
    over = peak.value - before
    print(f"{options.features:,} features, width {options.width}, batches of {options.batch:,} states")
    print(f"weights and moments   {3 * gradients:6.0f} MiB")
    print(f"gradients             {gradients:6.0f} MiB")
    print(f"all else at the peak  {over - gradients:6.0f} MiB")
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
