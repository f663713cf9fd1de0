"""One training step and one encoding of a TopK SAE, selfreg beside the libraries that people use, on this machine.

    pip install -e '.[benchmarks]' matplotlib opencv-python-headless nnsight
    pip install --no-deps overcomplete dictionary-learning
    python benchmarks/sae_step.py --features 4608 16000

Every round runs each method for a few steps, one method after the other, so that all meet the same noise; the time of
a method is the smallest mean of a round. Times are given in products: one float32 product of the states with the
encoder, `x @ W.T`, measured in the same rounds. A peer that is not installed or fails is named.

selfreg's step has all that a real one has: dead-feature counters, the gradient kept off the decoder's lengths,
clipping, unit-norm decoder, Adam. The peers' have what their own trainers do in a step, which for overcomplete and for
the naive one is less. `selfreg, whole Trainer` is the same through `SAETrainer` on an `ActivationStore` on disk,
with logging and its dead-feature statistics.
"""

import argparse
import importlib.metadata
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sae_peers import PEERS, Step
from selfreg import ActivationStore, SAEConfig, SAEForFeatureExtraction, SAETrainer, SAETrainingArguments
from selfreg.activations.spec import HiddenStateSpec
from selfreg.activations.store import StoreShard
from selfreg.activations.writer import StoreWriter


def states(count: int, width: int, seed: int = 0) -> Tensor:
    """Like hidden states: sparse sums of directions, with noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * width, width, generator=generator)
    out = torch.empty(count, width)
    for start in range(0, count, 4096):
        rows = min(4096, count - start)
        weights = torch.rand(rows, 4 * width, generator=generator)
        active = torch.rand(rows, 4 * width, generator=generator) < 0.01
        out[start : start + rows] = (weights * active) @ directions
    return out + 0.1 * torch.randn(count, width, generator=generator)


def selfreg_step(width: int, features: int, k: int) -> tuple[Step, Step]:
    """What `SAETrainer` does at a step, without the Trainer."""
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=width, num_features=features, k=k))
    sae.set_normalization(torch.zeros(width), torch.tensor(1.0001))
    parameters = list(sae.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=6.25e-10, fused=True)

    def step(x: Tensor) -> float:
        dead = sae.tokens_since_fired >= 10_000_000
        output = sae(x, dead=dead, aux_coefficient=1 / 32)
        sae.count_fired(output.features)
        output.loss.backward()
        sae.project_decoder_gradient()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        sae.normalize_decoder()
        optimizer.zero_grad()
        return float(output.loss.detach())

    return step, sae.encode


def product(width: int, features: int, _k: int) -> Step:
    """The product with the encoder as one writes it."""
    weight = torch.randn(features, width)
    return lambda x: x @ weight.T


def naive_step(width: int, features: int, k: int, _steps: int) -> tuple[Step, Step]:
    """Dense, by autograd, with fused Adam: what one would write in ten lines."""
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(features, width), dim=1)
    shapes = (W_dec.clone(), torch.zeros(features), W_dec, torch.zeros(width))
    W_enc, b_enc, W_dec, b_dec = parameters = [torch.nn.Parameter(p) for p in shapes]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def encode(x: Tensor) -> Tensor:
        values, indices = ((x - b_dec) @ W_enc.T + b_enc).topk(k, dim=1)
        return torch.zeros(len(x), features).scatter(1, indices, values.relu())

    def step(x: Tensor) -> float:
        loss = (encode(x) @ W_dec + b_dec - x).pow(2).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
        return float(loss)

    return step, encode


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.ends.append(time.perf_counter())


def trainer_seconds(width: int, features: int, k: int, batch: int, steps: int, store: ActivationStore) -> float:
    """Seconds a step of `SAETrainer`, from the end of its third step on: what it sets up is paid once."""
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=width, num_features=features, k=k))
    sae.set_normalization(torch.zeros(width), torch.tensor(1.0001))
    with tempfile.TemporaryDirectory() as folder:
        args = SAETrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            k_start=k,
            # As in the bare step: nothing is dead, and there is no auxiliary loss.
            dead_after_tokens=10_000_000,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=10,
        )
        clock = Clock()
        trainer = SAETrainer(sae, args, train_dataset=store, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return (clock.ends[-1] - clock.ends[2]) / (len(clock.ends) - 3)


def write_store(folder: Path, x: Tensor, shard_tokens: int | None = None) -> ActivationStore:
    """A store of `x` as the extractor would have written it, each state a text."""
    spec = HiddenStateSpec("benchmark", None, None, 0, x.shape[1], "text", None, 1)
    size = shard_tokens or len(x)
    writer = StoreWriter(
        folder, spec, text_fingerprint="", num_texts=len(x), dtype=x.dtype, pooling="mean", shard_tokens=size
    )
    for number, states in enumerate(x.split(size)):
        ids = torch.arange(len(states)) + number * size
        nothing = torch.zeros_like(ids)
        writer.write(number, StoreShard(number * size, number * size + len(ids), states, ids, nothing, nothing))
    writer.finish()
    return ActivationStore(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[4608, 16000])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of methods")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console(width=120)
    for features in options.features:
        console.print(measure(options, features, console))
    names = ("torch", "sae-lens", "eai-sparsify", "dictionary-learning", "overcomplete")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    console.print(f"{datetime.now(UTC):%Y-%m-%d}, {_cpu()}, {torch.get_num_threads()} threads; {versions}")


def measure(options: argparse.Namespace, features: int, console: Console) -> Table:
    """The table of one width."""
    width, k, batch = options.width, options.k, options.batch
    x = states(16 * batch, width)
    batches = list(x.split(batch))
    methods: dict[str, tuple[Step, Step]] = {"selfreg": selfreg_step(width, features, k)}
    makers: dict[str, Callable[[int, int, int, int], tuple[Any, ...]]] = {
        "naive dense step, fused Adam": naive_step,
        **PEERS,
    }
    for name, make in makers.items():
        if options.only and name not in options.only:
            continue
        try:
            methods[name] = make(width, features, k, 2000)[:2]
            methods[name][0](batches[0])
            with torch.inference_mode():
                methods[name][1](batches[0])
        except Exception as error:
            methods.pop(name, None)
            console.print(f"{name}: not measured: {type(error).__name__}: {error}", soft_wrap=True)
    unit = product(width, features, k)
    best: dict[str, tuple[float, float]] = {name: (float("inf"), float("inf")) for name in ("product", *methods)}
    trainer = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", x)
        for number in range(options.rounds):
            for name in ("product", *methods):
                step, encode = (unit, unit) if name == "product" else methods[name]
                used = [batches[(number * options.steps + i) % len(batches)] for i in range(options.steps)]
                best[name] = (
                    min(best[name][0], _seconds(step, used)),
                    min(best[name][1], _seconds(encode, used, inference=True)),
                )
            trainer = min(trainer, trainer_seconds(width, features, k, batch, 4 * options.steps, store))
    one = best["product"][0]
    title = (
        f"{features} features, {width} inputs, k = {k}, batches of {batch} states; one product: {1000 * one:.1f} ms"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("training step", justify="right")
    table.add_column("encoding", justify="right")
    for name, (step, encode) in best.items():
        table.add_row(name, f"{step / one:.2f}", f"{encode / best['product'][1]:.2f}")
    table.add_row("selfreg, whole Trainer", f"{trainer / one:.2f}", "")
    return table


def _seconds(step: Step, batches: list[Tensor], *, inference: bool = False) -> float:
    with torch.inference_mode(inference):
        started = time.perf_counter()
        for x in batches:
            step(x)
    return (time.perf_counter() - started) / len(batches)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ", no AMX"
    return (model or platform.machine()) + amx


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
