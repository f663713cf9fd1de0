"""What a second process costs, and what 10^9 tokens would.

    python benchmarks/scaling.py --rounds 2
    python benchmarks/scaling.py --model-only --processes 64 --flops 1e14 --disk 2e9 --network 2e10

Measured: extraction and SAE training in two processes of one thread each, beside one process of two threads. The same
work, the same batch over all processes, one after the other in every round; the best round of each counts. The
backbone has random weights and SmolLM2-135M's shape, with fewer blocks.

On paper: bytes of the store, reads, what each process sends a step, and which of the four takes longest, from the
formulas of docs/scaling.md and the rates given.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from selfreg import HiddenStateExtractor, SAEConfig, SAEForFeatureExtraction, SAETrainer, SAETrainingArguments
from selfreg.utils.processes import processes

VOCABULARY, WIDTH = 8192, 576
LAYOUTS = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--batch", type=int, default=4096, help="states of a step, over all processes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model-only", action="store_true", help="no measurement, the paper only")
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--parameters", type=float, default=57e6, help="of the blocks that are run")
    parser.add_argument("--bytes", type=int, default=4, help="of a number in the store: 4, or 2 with dtype=bfloat16")
    parser.add_argument("--flops", type=float, default=1e14, help="of a process, a second")
    parser.add_argument("--disk", type=float, default=2e9, help="bytes a second of a node")
    parser.add_argument("--network", type=float, default=2e10, help="bytes a second of a process")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if not options.model_only:
        measure(options)
    paper(options)


def measure(options: argparse.Namespace) -> None:
    best = dict.fromkeys(LAYOUTS, (0.0, 0.0))
    for _ in range(options.rounds):
        for name, (count, threads) in LAYOUTS.items():
            extracted, trained = launch(options, count, threads)
            best[name] = (max(best[name][0], extracted), max(best[name][1], trained))
    for name, (extracted, trained) in best.items():
        print(f"{name:28} extraction {extracted:8,.0f} tokens/s   SAE training {trained:8,.0f} states/s")
    one, two = best.values()
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    print(f"two processes to one: extraction {ratios[0]:.2f}, SAE training {ratios[1]:.2f}")


def launch(options: argparse.Namespace, count: int, threads: int) -> tuple[float, float]:
    names = ("texts", "layers", "features", "batch", "steps")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += [__file__, *(f"--{name}={getattr(options, name)}" for name in names), "--worker", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        result = Path(folder) / "result.json"
        if not result.exists():
            raise RuntimeError(done.stderr[-3000:])
        extracted, trained = json.loads(result.read_text())
    return extracted, trained


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())


def work(options: argparse.Namespace) -> None:
    extractor, texts = backbone(options.layers), random_texts(options.texts)
    extractor.pool(texts[:8])
    state = processes()
    state.wait_for_everyone()
    started = time.perf_counter()
    store = extractor.extract(texts, options.worker / "store", shard_tokens=2048)
    extracted = store.num_tokens / (time.perf_counter() - started)
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=WIDTH, num_features=options.features, k=32))
    args = SAETrainingArguments(
        str(options.worker / "sae"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch // state.num_processes,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    clock = Clock()
    trainer = SAETrainer(sae, args, train_dataset=store, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # The first steps warm up.
    trained = options.batch * (len(clock.ends) - 3) / (clock.ends[-1] - clock.ends[2])
    if state.is_main_process:
        (options.worker / "result.json").write_text(json.dumps([extracted, trained]))
    state.wait_for_everyone()
    os._exit(0)


def backbone(layers: int) -> HiddenStateExtractor:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    vocabulary = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    model = LlamaModel(config).requires_grad_(False)
    return HiddenStateExtractor(model, fast, layer=layers - 1, max_length=128, token_rule="text", name="random")


def random_texts(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 128, (count,), generator=generator).tolist()
    return [
        " ".join(f"w{number}" for number in torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())
        for length in lengths
    ]


def paper(options: argparse.Namespace) -> None:
    tokens, width, features, count = options.tokens, WIDTH, options.features, options.processes
    nodes = -(-count // options.per_node)
    weights = 2 * features * width + features + width
    steps = options.epochs * tokens / options.batch
    ring = 2 * (count - 1) / count
    store = tokens * (width * options.bytes + 12)
    reads = options.epochs * tokens * width * options.bytes
    sent = ring * weights * 4 + ring * (features + 4 * (width + 4))
    sharded = 1.5 * ring * weights * 4
    print(f"\n{tokens:.0e} tokens of width {width}, {features:,} features, steps of {options.batch:,} states,")
    print(f"{count} processes on {nodes} nodes, {options.epochs:g} epochs\n")
    print(f"store                    {store / 1e12:9.2f} TB")
    print(f"reads, each node         {reads / 1e12:9.2f} TB")
    print(f"sent a step, DDP         {sent / 1e6:9.1f} MB by each process ({steps:,.0f} steps)")
    print(f"sent a step, FSDP        {sharded / 1e6:9.1f} MB by each process")
    print(f"weights, gradient, Adam  {4 * weights * 4 / 1e9:9.2f} GB each with DDP")
    print(f"                         {(2 + 4 / count) * weights * 4 / 1e9:9.2f} GB each with FSDP, at the peak")
    times = {
        "extraction": 2 * options.parameters * tokens / (options.flops * count),
        "SAE, arithmetic": options.epochs * 1.6 * 2 * features * width * tokens / (options.flops * count),
        "SAE, reads": reads / options.disk,
        "SAE, all-reduce": steps * sent / options.network if count > 1 else 0.0,
    }
    for name, seconds in times.items():
        print(f"{name:24} {seconds / 3600:9.2f} h")
    print(f"extraction writes        {store / nodes / options.disk / 3600:9.2f} h")
    trained = {name: seconds for name, seconds in times.items() if name.startswith("SAE")}
    print(f"the bound of SAE training: {max(trained, key=lambda name: trained[name])}")


if __name__ == "__main__":
    main()
