"""What does fine-tuning an SAE on a narrow task give, beside simply training it on?

    SELFREG_DATA=/path/to/data python benchmarks/sae_finetune.py --tokens 1000000

An SAE is pre-trained on general text (SmolLM2-135M-Instruct, layer 15), then goes on, for the same steps on the same
task texts (symptoms of 24 diseases), with the two-part loss of `objective="finetune"`, with plain pre-training at the
same rate, and with plain pre-training at the rate of pre-training. Before and after, on texts of both kinds that no
training saw: features that are active on the task, and the fraction of variance unexplained (FVU) on the task and on
general text.
"""

import argparse
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from selfreg import SAEConfig, SAEForFeatureExtraction, SAETrainer, SAETrainingArguments
from selfreg.sae.statistics import evaluate_sae
from states import general_states, task_states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of general text")
    parser.add_argument("--steps", type=int, default=1000, help="of pre-training")
    parser.add_argument("--epochs", type=int, default=40, help="over the task's texts, as in the paper for diagnosis")
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/sae-quality"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    general, task = general_states(options.tokens, options.output), task_states(options.output)
    folder = options.output / f"general-{options.tokens}-{options.features}-{options.k}-{options.steps}"
    if not folder.exists():
        torch.manual_seed(0)
        config = SAEConfig(hidden_size=general["train"].hidden_size, num_features=options.features, k=options.k)
        sae = SAEForFeatureExtraction(config)
        train(sae, general["train"], options.output, max_steps=options.steps)
        sae.save_pretrained(folder)
    plain = {"objective": "pretrain", "k_start": options.k, "num_train_epochs": options.epochs}
    ways: dict[str, dict[str, Any] | None] = {
        "before": None,
        "fine-tuned, two-part loss": {"objective": "finetune", "num_train_epochs": options.epochs},
        "trained on, same rate": {**plain, "learning_rate": 5e-5},
        "trained on, rate of pre-training": plain,
    }
    table = Table(title=f"{len(task['train']):,} tokens of the task, {options.epochs} epochs", title_justify="left")
    for column in ("", "active on the task", "FVU, task", "FVU, general"):
        table.add_column(column, justify="right" if column else "left")
    for name, settings in ways.items():
        sae = SAEForFeatureExtraction.from_pretrained(folder)
        if settings is not None:
            torch.manual_seed(0)
            train(sae, task["train"], options.output, **settings)
        on_task, on_general = (evaluate_sae(sae, part["test"]) for part in (task, general))
        alive = 1 - on_task.dead_fraction
        table.add_row(name, f"{alive:.1%}", f"{on_task.fvu:.4f}", f"{on_general.fvu:.4f}")
        print(name, f"{alive:.4f} {on_task.fvu:.4f} {on_general.fvu:.4f}", flush=True)
    console = Console(width=120)
    console.print(table)
    console.print(f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}")


def train(sae: SAEForFeatureExtraction, states: Any, output: Path, **settings: Any) -> None:
    args = SAETrainingArguments(
        str(output / "training"),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        **settings,
    )
    SAETrainer(sae, args, train_dataset=states).train()


if __name__ == "__main__":
    main()
