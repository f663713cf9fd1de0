"""What `SAETrainer` needs of a stream: whole batches, and its place in every checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selfreg.activations.streaming import StreamingActivations
from selfreg.utils.files import read_json, write_json
from selfreg.utils.processes import processes


class StreamBatches(IterableDataset[dict[str, Tensor]]):
    """Batches of a stream, without end.

    Args:
        stream: where they come from.
        batch_size: states of a batch.
    """

    def __init__(self, stream: StreamingActivations, batch_size: int) -> None:
        self.stream, self.batch_size = stream, batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for states in self.stream.batches(self.batch_size):
            yield {"hidden_states": states}


class StreamPlace(TrainerCallback):
    """Keeps the place of each process in the texts, beside the weights that were trained up to there."""

    def __init__(self, stream: StreamingActivations) -> None:
        self.stream = stream

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        write_json(_place(folder), self.stream.state_dict())


def load_place(stream: StreamingActivations, checkpoint: Any) -> bool:
    """Brings a stream to the place of a checkpoint; False where that holds none."""
    if checkpoint is None or not _place(Path(checkpoint)).exists():
        return False
    stream.load_state_dict(read_json(_place(Path(checkpoint))))
    return True


def _place(checkpoint: Path) -> Path:
    return checkpoint / f"stream_{processes().process_index}.json"
