"""What selfreg's trainers share: loss parts in the log, checkpoints that are whole, quiet progress."""

import math
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from selfreg.utils.processes import mean_over, one_batch, processes
from selfreg.utils.progress import Advance, progress
from selfreg.utils.sharding import shard_on_cpu

WHOLE = "selfreg_checkpoint_is_whole"


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
        """The means so far, within `one_batch` those over all its processes; starts anew."""
        means = {
            name: float(mean_over(torch.as_tensor(total, dtype=torch.float32))) / self._counts[name]
            for name, total in self._sums.items()
        }
        self._sums.clear()
        self._counts.clear()
        return means


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint once everything of it is on disk, so that one cut short by a kill is never resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        # Each process writes the state of its own random numbers.
        processes().wait_for_everyone()
        if state.is_world_process_zero and folder.is_dir():
            (folder / WHOLE).touch()


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint under `output_dir` that was written to its end; None where there is none."""
    marks = Path(output_dir).glob(f"checkpoint-*/{WHOLE}")
    folders = sorted((mark.parent for mark in marks), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return str(folders[-1]) if folders else None


class PartsTrainer(Trainer):
    """A Trainer that logs the parts of its loss by name and marks whole checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = LossParts()
        self._losses: Tensor | float = 0.0
        self.add_callback(WholeCheckpoints())
        if any(isinstance(callback, StepProgress) for callback in self.callback_handler.callbacks):
            # It would print every log entry through the bar.
            self.remove_callback(PrinterCallback)
        # compute_loss gives the mean over a micro-batch: the Trainer has to divide it by their number.
        self.model_accepts_loss_kwargs = False

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if shard_on_cpu(self.accelerator, self.args):
            self.is_fsdp_enabled = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # Every process logs; the parts are those of the whole batch, as the loss is that the Trainer gives.
            with one_batch():
                self._check_finite()
                logs = {**logs, **self.parts.flush()}
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self._losses = self._losses + loss.detach()
        return loss

    def _check_finite(self) -> None:
        # The Trainer itself leaves losses that are not finite out of the mean that it logs.
        total, self._losses = float(mean_over(torch.as_tensor(self._losses))), 0.0
        if not math.isfinite(total):
            raise ValueError(
                f"training diverged before step {self.state.global_step}: the loss is {total}; lower "
                f"learning_rate={self.args.learning_rate}, or look for such values in the hidden states"
            )


class StepProgress(TrainerCallback):
    """A progress bar over the steps of a training, with the rate, and no log lines between.

    Args:
        description: what is trained.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self._stack = ExitStack()
        self._advance: Advance | None = None
        self._shown = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._shown = state.global_step
        bar = progress(self.description, state.max_steps, "steps", done=state.global_step)
        self._advance = self._stack.enter_context(bar)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._advance is not None:
            self._advance(state.global_step - self._shown)
            self._shown = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stack.close()
