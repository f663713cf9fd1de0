"""Arguments of classifier training."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from selfreg.activations.prompt import check_choice
from selfreg.classifier.penalty import Similarity


@dataclass
class RegularizedTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with what regularised training adds.

    Other defaults: `per_device_train_batch_size=64`, `learning_rate=3e-3`, `num_train_epochs=100`, `weight_decay=2.0`,
    `remove_unused_columns=False`, `logging_steps=50`.

    loss = task loss + penalty_weight · similarity + dependence_weight · dependence

    Args:
        penalty_weight (`float`, defaults to 1.0): weight of the similarity between head and unintended features; 0
            turns it off.
        similarity (`str`, defaults to `"dot"`): `"encoder"`, `"dot"`, `"cosine"` or `"subspace"`; see
            [`similarity_penalty`].
        dependence_weight (`float`, defaults to 30.0): weight of what still depends on the unintended features; 0 turns
            it off. See [`dependence_term`].
        remove_unintended (`bool`, defaults to `True`): take the features out of the hidden states, in training and
            afterwards.
        cache_states (`bool`, defaults to `True`): with a frozen backbone, run each text through it once instead of
            once an epoch.
        class_weights (`"balanced"` or `list[float]`, *optional*): weight of each label in the task loss.
    """

    penalty_weight: float = field(default=1.0, metadata={"help": "Weight of the similarity penalty; 0: off."})
    similarity: str = field(default="dot", metadata={"help": "encoder, dot, cosine or subspace."})
    dependence_weight: float = field(default=30.0, metadata={"help": "Weight of the dependence term; 0: off."})
    remove_unintended: bool = field(default=True, metadata={"help": "Remove the features from the hidden states."})
    cache_states: bool = field(default=True, metadata={"help": "Run each text through a frozen backbone only once."})
    class_weights: str | list[float] | None = field(
        default=None, metadata={"help": "Weight of each label in the task loss: balanced, or a list."}
    )
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
        for name in ("penalty_weight", "dependence_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise ValueError(f"class_weights={self.class_weights!r} is not known: 'balanced', or a weight a label")
        super().__post_init__()
        # Without an accelerator pinned memory only brings a warning.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
