"""HeadStatistics: what the two terms need to know of the states that a head reads; kept with each checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selfreg.activations.store import save_tensors
from selfreg.classifier.running import RunningDependence, RunningScale

if TYPE_CHECKING:
    from selfreg.classifier.regularizer import RegularizationMixin

STATISTICS_NAME = "regularization.safetensors"


class HeadStatistics:
    """Scale of the states, and dependence directions in that scale.

    Args:
        num_features, hidden_size: U and D.
        momentum: what each batch leaves of what was seen before; 1 for one pass over all texts, which gives the closed
            form.
        follows_scale: whether the scale is estimated too; False where the states come standardised.

    Attributes:
        scale (`RunningScale`, *optional*), dependence (`RunningDependence`, *optional*): the estimates so far.
    """

    def __init__(self, num_features: int, hidden_size: int, momentum: float, *, follows_scale: bool = True) -> None:
        self.sizes, self.momentum = (num_features, hidden_size), momentum
        self.scale = RunningScale(momentum) if follows_scale else None
        # How much is held constant is known with the first batch.
        self.dependence: RunningDependence | None = None

    @property
    def is_exact(self) -> bool:
        """Whether nothing is forgotten: then nothing needs to be kept either, as it is measured anew."""
        return self.momentum == 1

    def dependence_of(self, num_constant: int) -> RunningDependence:
        """The estimate of the dependence, with `num_constant` columns held constant; made where there is none."""
        if self.dependence is None:
            least = {"min_texts": 1} if self.is_exact else {}
            self.dependence = RunningDependence(*self.sizes, num_constant, self.momentum, **least)
        return self.dependence

    def scaled(self, weight: Tensor) -> Tensor:
        """Weights of the head as if it read standardised states."""
        return weight if self.scale is None else weight.float() * self.scale.scale.to(weight.device)

    @property
    def directions(self) -> Tensor | None:
        """`[U, D]` of the standardised states; None before a batch was seen."""
        if self.dependence is None:
            return None
        directions = self.dependence.directions
        return directions if self.scale is None else directions / self.scale.scale.to(directions)

    def save(self, folder: Path) -> None:
        """Writes the estimates into a checkpoint."""
        parts = {"scale": self.scale, "dependence": self.dependence}
        tensors = {
            f"{part}.{name}": tensor.contiguous().cpu()
            for part, own in parts.items()
            if own is not None
            for name, tensor in own.state_dict().items()
        }
        if tensors:
            save_tensors(folder / STATISTICS_NAME, tensors)

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint; one without estimates leaves them as they are."""
        if not (folder / STATISTICS_NAME).exists():
            return
        parts: dict[str, dict[str, Tensor]] = {"scale": {}, "dependence": {}}
        for key, tensor in load_file(folder / STATISTICS_NAME).items():
            part, name = key.split(".")
            parts[part][name] = tensor
        if self.scale is not None:
            self.scale.load_state_dict(parts["scale"])
        if parts["dependence"]:
            self.dependence_of(len(parts["dependence"]["constant_states"])).load_state_dict(parts["dependence"])


class SavesStatistics(TrainerCallback):
    """Puts a Trainer's statistics into each checkpoint, where they are estimates that go on."""

    def __init__(self, trainer: "RegularizationMixin") -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        statistics = self.trainer.statistics
        if statistics is not None and not statistics.is_exact and state.is_world_process_zero and folder.is_dir():
            statistics.save(folder)
