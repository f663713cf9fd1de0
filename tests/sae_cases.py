"""SAE trainings that one process and several have to agree on; as a script, those of this process among others.

The last argument is the folder for the results.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sae_helpers import States, make_args, make_sae
from selfreg import SAEForFeatureExtraction, SAETrainer

GLOBAL_BATCH = 100
STEPS = 20
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": ({}, {}),
    "batch_topk": ({"activation": "batch_topk"}, {}),
    "jumprelu": ({"activation": "jumprelu"}, {}),
    "relu": ({"activation": "relu"}, {}),
    "prefixes": ({"prefixes": [8, 48]}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 50}),
    "finetune": ({}, {"objective": "finetune"}),
    "uneven": ({}, {}),
}
UNEVEN = 1030
"""States that the last batch of an epoch is short of."""
SHARDED = ("topk", "jumprelu", "finetune")
"""With FSDP as well."""


def train(name: str, folder: Path, processes: int = 1, **extra: Any) -> SAETrainer:
    """The trainer of a case after training, evaluated."""
    config, settings = CASES[name]
    settings = {"per_device_train_batch_size": GLOBAL_BATCH, **settings, **extra}
    settings["per_device_train_batch_size"] //= processes
    sae = make_sae(**config)
    with torch.no_grad():
        # Some features hardly fire: the auxiliary loss and the counters have something to do.
        sae.b_enc[30:] = -3.0
    args = make_args(
        folder, max_steps=STEPS, learning_rate=5e-3, dead_after_tokens=300, logging_steps=1, use_cpu=True, **settings
    )
    states = States(UNEVEN) if name == "uneven" else States()
    trainer = SAETrainer(sae, args, train_dataset=states, eval_dataset=States(seed=1, count=900))
    trainer.train()
    trainer.evaluate()
    return trainer


def result(trainer: SAETrainer, *, with_weights: bool = True) -> dict[str, torch.Tensor]:
    """Weights and buffers, and the log as columns `log.<name>`."""
    weights = trainer.model.state_dict() if with_weights else {}
    state = {name: tensor.detach().clone() for name, tensor in weights.items()}
    for key in ("loss", "fvu", "l0", "aux_loss", "dead_fraction", "grad_norm", "live_loss", "eval_fvu", "eval_l0"):
        column = [float(entry[key]) for entry in trainer.state.log_history if key in entry]
        if column:
            state[f"log.{key}"] = torch.tensor(column)
    return state


def main(folder: Path) -> None:
    for name in CASES:
        trainer = train(name, folder / f"work-{name}", processes=2)
        state = result(trainer)
        for key, tensor in state.items():
            both = [torch.empty_like(tensor) for _ in range(2)]
            torch.distributed.all_gather(both, tensor)
            assert torch.equal(*both), f"{name}: {key} is not the same in both processes"
        if trainer.is_world_process_zero():
            save_file(state, folder / f"{name}.safetensors")
    for name in SHARDED:
        work = folder / f"work-fsdp-{name}"
        trainer = train(name, work, processes=2, fsdp=True, save_strategy="steps", save_steps=STEPS)
        # accelerate by itself would take DDP on a CPU, and the comparison would hold.
        assert isinstance(trainer.model, FSDPModule)
        assert all(isinstance(weight, DTensor) for weight in trainer.model.parameters())
        with pytest.raises(ValueError, match="is sharded by FSDP"):
            trainer.model.save_pretrained(work / "pieces")
        state = result(trainer, with_weights=False)
        if trainer.is_world_process_zero():
            whole = SAEForFeatureExtraction.from_pretrained(work / f"checkpoint-{STEPS}")
            save_file({**whole.state_dict(), **state}, folder / f"fsdp-{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    torch.distributed.barrier()
    # All has held by now; a thread of gloo may still abort while the interpreter is taken down.
    os._exit(0)
