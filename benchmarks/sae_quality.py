"""How good are the SAEs? selfreg and its peers trained on the same hidden states for the same steps.

    SELFREG_DATA=/path/to/data python benchmarks/sae_quality.py --tokens 1000000 --steps 1000

SmolLM2-135M-Instruct, layer 15, on the general text of SELFREG_DATA (`sae_text`); every library trains with its own
defaults, on states that were centred and scaled alike, with the same batches. Fraction of variance unexplained (FVU),
active features of a state (L0) and features that are active on none (dead), on texts that none was trained on. States
and finished rows are kept in --output.
"""

import argparse
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sae_peers import PEERS, QUALITY_PEERS, Method
from selfreg import ActivationStore, SAEConfig, SAEForFeatureExtraction, SAETrainer, SAETrainingArguments
from selfreg.sae.statistics import evaluate_sae
from selfreg.utils.files import read_json, write_json
from states import general_states

OURS: dict[str, dict[str, Any]] = {
    "selfreg topk": {"activation": "topk"},
    "selfreg batch_topk": {"activation": "batch_topk"},
    "selfreg jumprelu": {"activation": "jumprelu"},
    "selfreg relu": {"activation": "relu"},
    "selfreg topk, prefixes": {"activation": "topk", "prefixes": [16, 8, 4, 2, 1]},
    "selfreg batch_topk, prefixes": {"activation": "batch_topk", "prefixes": [16, 8, 4, 2, 1]},
}
"""Configurations; a prefix is given as what part of the features it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to train on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--output", type=Path, default=Path("runs/sae-quality"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    stores = general_states(options.tokens, options.output)
    train, test = stores["train"], stores["test"]
    mean = (sample := train.gather(range(0, len(train), 7)).double()).mean(dim=0)
    scale = float((sample - mean).pow(2).mean().sqrt())
    mean = mean.float()
    path = options.output / f"rows-{options.tokens}-{options.features}-{options.k}-{options.steps}.json"
    rows: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}
    peers = {**{f"{name} topk": maker for name, maker in PEERS.items()}, **QUALITY_PEERS}
    for name in (*OURS, *peers):
        if name in rows or (options.only and name not in options.only):
            continue
        started = time.perf_counter()
        try:
            if name in OURS:
                figures = ours(options, OURS[name], train, test)
            else:
                figures = theirs(options, peers[name], train, test, mean, scale)
        except Exception as error:
            print(f"{name}: not measured: {type(error).__name__}: {error}")
            continue
        rows[name] = {**figures, "seconds": time.perf_counter() - started}
        write_json(path, rows)
        print(name, rows[name], flush=True)
    table = Table(
        title=f"{options.features} features, k = {options.k}, {options.steps} steps of {options.batch} states, "
        f"{len(train):,} tokens; held out: {len(test):,}",
        title_justify="left",
    )
    for column in ("", "FVU", "L0", "dead features"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(name, f"{row['fvu']:.4f}", f"{row['l0']:.1f}", f"{row['dead_fraction']:.2%}")
    console = Console(width=120)
    console.print(table)
    console.print(f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}")


def ours(
    options: argparse.Namespace, settings: dict[str, Any], train: ActivationStore, test: ActivationStore
) -> dict[str, float]:
    torch.manual_seed(0)
    if "prefixes" in settings:
        settings = {**settings, "prefixes": [options.features // part for part in settings["prefixes"]]}
    config = SAEConfig(hidden_size=train.hidden_size, num_features=options.features, k=options.k, **settings)
    sae = SAEForFeatureExtraction(config)
    args = SAETrainingArguments(
        str(options.output / "selfreg"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=200,
    )
    SAETrainer(sae, args, train_dataset=train).train()
    return evaluate_sae(sae, test).to_dict()


def theirs(
    options: argparse.Namespace, make: Any, train: ActivationStore, test: ActivationStore, mean: Tensor, scale: float
) -> dict[str, float]:
    torch.manual_seed(0)
    method: Method = make(train.hidden_size, options.features, options.k, options.steps)
    generator = torch.Generator().manual_seed(0)
    done = 0
    while done < options.steps:
        order = torch.randperm(len(train), generator=generator)
        for rows in order.split(options.batch):
            if done == options.steps or len(rows) < options.batch:
                break
            method.step((train.gather(rows.tolist()) - mean) / scale)
            done += 1
    fired = torch.zeros(options.features, dtype=torch.bool)
    error = active = 0.0
    everything = (test.gather(range(len(test))) - mean) / scale
    with torch.inference_mode():
        for x in everything.split(2048):
            error += float((method.reconstruct(x) - x).pow(2).sum())
            positive = method.activations(x) > 0
            active += float(positive.sum())
            fired |= positive.any(dim=0)
    variance = float((everything - everything.mean(dim=0)).pow(2).sum())
    return {"fvu": error / variance, "l0": active / len(test), "dead_fraction": float(1 - fired.float().mean())}


if __name__ == "__main__":
    main()
