"""Arguments of classifier training."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainingArguments

from selfreg.activations.prompt import check_choice
from selfreg.classifier.penalty import Similarity
from selfreg.classifier.tasks import PreferenceLoss

AUTO: Literal["auto"] = "auto"
"""A weight that is chosen by `path.resolve_weights`."""


if TYPE_CHECKING:
    Weight = float | Literal["auto"]
else:
    # HfArgumentParser takes no union of a number and a string; __post_init__ makes of the string what it says.
    Weight = str


@dataclass
class RegularizedTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with what regularised training adds.

    Other defaults: `per_device_train_batch_size=64`, `learning_rate=3e-3`, `num_train_epochs=100`, `weight_decay=2.0`,
    `remove_unused_columns=False`, `logging_steps=50`. They suit a head over a frozen backbone and
    hundreds to thousands of texts.

    loss = task loss + penalty_weight · similarity + dependence_weight · dependence

    Args:
        penalty_weight (`float` or `"auto"`, defaults to 1.0): weight of the similarity between head and unintended
            features; 0 turns it off. `"auto"` takes the strongest that costs no more validation loss than chance may
            account for; see [`resolve_weights`].
        similarity (`str`, defaults to `"dot"`): `"encoder"`, `"dot"`, `"cosine"` or `"subspace"`; see
            [`similarity_penalty`].
        dependence_weight (`float` or `"auto"`, defaults to 30.0): weight of what still depends on the unintended
            features; 0 turns it off. See [`dependence_term`]. `"auto"` as above; with both, they are chosen together,
            in the ratio of their defaults.
        remove_unintended (`bool`, *optional*): take the features out of the hidden states, in training and afterwards.
            None: as the model was made, which is True where nothing else was said.
        cache_states (`bool`, defaults to `True`): with a frozen backbone, run each text through it once instead of
            once an epoch. Has no effect while an adapter is trained.
        adapter_learning_rate (`float`, defaults to 2e-4): initial learning rate of an adapter (LoRA) in the backbone,
            whose start is the pretrained model; `learning_rate` is that of the head, which starts from zero. Both
            follow the same schedule. `weight_decay` is of the head alone.
        class_weights (`str` or `list[float]`, *optional*): weight of each label in the task loss: `"balanced"`, or a
            weight a label (on a command line `1.0,2.5`).
        preference_loss (`str`, defaults to `"bradley_terry"`): of pairs: `"bradley_terry"`, which compares the two
            sides, or `"pointwise"`, which judges each by itself; see [`task_loss`].
    """

    penalty_weight: Weight = field(
        default=1.0, metadata={"help": "Weight of the similarity penalty; 0: off; auto: chosen by validation loss."}
    )
    similarity: str = field(default="dot", metadata={"help": "encoder, dot, cosine or subspace."})
    dependence_weight: Weight = field(
        default=30.0, metadata={"help": "Weight of the dependence term; 0: off; auto: chosen by validation loss."}
    )
    remove_unintended: bool | None = field(
        default=None, metadata={"help": "Remove the features from the hidden states; None: as the model was made."}
    )
    cache_states: bool = field(default=True, metadata={"help": "Run each text through a frozen backbone only once."})
    adapter_learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate of an adapter."})
    # HfArgumentParser takes no union of a string and a list; lists are taken all the same.
    class_weights: str | None = field(
        default=None, metadata={"help": "Weight of each label in the task loss: balanced, or 1.0,2.5,..."}
    )
    preference_loss: str = field(default="bradley_terry", metadata={"help": "bradley_terry or pointwise."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Texts of a batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Texts of a batch."})
    num_train_epochs: float = field(default=100, metadata={"help": "Epochs."})
    # A head that fits a small training set perfectly can still lean on a feature where the covariance over that set
    # sees nothing: the dependence term needs small weights beside it.
    weight_decay: float = field(default=2.0, metadata={"help": "Decoupled weight decay of AdamW."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns are read by name."})

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, Similarity)
        check_choice("preference_loss", self.preference_loss, PreferenceLoss)
        for name in ("penalty_weight", "dependence_weight"):
            setattr(self, name, _weight(name, getattr(self, name)))
        self.label_weights()
        super().__post_init__()
        # Without an accelerator pinned memory only brings a warning.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()

    @property
    def term_weights(self) -> tuple[float, float]:
        """`penalty_weight` and `dependence_weight` as numbers.

        Raises:
            ValueError: one is still "auto".
        """
        for name in ("penalty_weight", "dependence_weight"):
            if getattr(self, name) == AUTO:
                raise ValueError(
                    f"{name}='auto' is no number yet: selfreg.classifier.path.resolve_weights chooses one for a "
                    "RegularizedSequenceClassifier over cached states; give a number for other models"
                )
        return self.penalty_weight, self.dependence_weight  # type: ignore[return-value]

    def label_weights(self) -> list[float] | None:
        """`class_weights` as numbers; None where they are balanced or there are none.

        Raises:
            ValueError: they are neither.
        """
        given: Any = self.class_weights
        if given is None or given == "balanced":
            return None
        try:
            weights = [float(weight) for weight in (given.split(",") if isinstance(given, str) else given)]
        except (TypeError, ValueError):
            weights = [-1.0]
        if any(weight < 0 for weight in weights):
            raise ValueError(f"class_weights={given!r} is not known: 'balanced', or a weight a label, none negative")
        return weights


def _weight(name: str, value: Any) -> Any:
    if value == AUTO:
        return AUTO
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"{name}={value!r} is not known: a finite number, or 'auto'")
    if weight < 0:
        raise ValueError(f"{name}={value} must not be negative")
    return weight
