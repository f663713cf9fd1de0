"""What selfreg's trainers share: loss parts in the log, checkpoints that are whole, quiet progress."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_WHOLE = "selfreg_checkpoint_is_whole"


class LossParts:
    """Means of named scalars between two log entries, without a device synchronisation at every step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, **parts: Tensor | float) -> None:
        for name, value in parts.items():
            self._sums[name] = self._sums[name] + (value.detach() if isinstance(value, Tensor) else value)
            self._counts[name] += 1

    def flush(self) -> dict[str, float]:
        """The means so far; starts anew."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint once everything of it is on disk, so that one cut short by a kill is never resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / _WHOLE).touch()


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint under `output_dir` that was written to its end; None where there is none."""
    marks = Path(output_dir).glob(f"checkpoint-*/{_WHOLE}")
    folders = sorted((mark.parent for mark in marks), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return str(folders[-1]) if folders else None


class PartsTrainer(Trainer):
    """A Trainer that logs the parts of its loss by name and marks whole checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = LossParts()
        self.add_callback(WholeCheckpoints())
        # compute_loss gives the mean over a micro-batch: the Trainer has to divide it by their number.
        self.model_accepts_loss_kwargs = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.parts.flush()}
        super().log(logs, start_time)


def set_deterministic_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    from transformers import set_seed

    set_seed(seed)
    torch.use_deterministic_algorithms(False)
