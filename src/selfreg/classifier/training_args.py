"""Arguments of classifier training."""

import copy
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from selfreg.activations.prompt import check_choice
from selfreg.classifier.arguments import AUTO, RegularizationArguments, Weight, number_of, weight_of
from selfreg.classifier.tasks import PreferenceLoss, Task

OFFSET_WEIGHT, LOGIT_DECAY, WEIGHT_DECAY = 0.6, 0.1, 2.0
"""Where nothing else is said; docs/evidence.md tells how they were chosen."""


@dataclass
class RegularizedTrainingArguments(RegularizationArguments, TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] and [`RegularizationArguments`] in one, for a head over a frozen backbone.

    Other defaults: `per_device_train_batch_size=64`, `learning_rate=3e-3`, `num_train_epochs=100`,
    `remove_unused_columns=False`, `logging_steps=50`. They suit a head over a frozen backbone and
    hundreds to thousands of texts.

    loss = task loss + penalty_weight · similarity + dependence_weight · dependence + ridge / 2 · ‖W‖², where the task
    loss is that of logits + offset, plus logit_decay · mean squared logit.

    An offset and a logit decay come with the two terms by default, where there are unintended features whose
    activations in the texts are known, the backbone is frozen, the task is no `regression` and labels are not
    smoothed. With both terms off they are off as well.

    Args:
        penalty_weight, similarity, dependence_weight, dependence_momentum: see [`RegularizationArguments`].
        offset_weight (`float`, *optional*): how much of what the unintended features alone say about the label is
            set aside in training, 0 to 1; see [`unintended_offsets`]. It reaches what is spread over the whole text,
            and costs accuracy where what is unintended does predict the label. None: 0.6 or 0, see
            above. It needs a frozen backbone.
        logit_decay (`float`, *optional*): weight of the mean squared logit (see [`squared_logits`]; Kannan et al.
            2018), so that a head which tells its training texts apart need not become ever surer of them by whatever
            helps. The offset is not counted. None: 0.1 or 0, as above.
        ridge (`float` or `"auto"`, *optional*): weight of half the squared norm of the head's weights, over
            standardised states. `"auto"` chooses one by cross-validation on the training texts, see [`choose_ridge`];
            it needs a frozen backbone. None: `"auto"` where there are unintended features whose activations in the
            texts are known, the backbone is frozen, and neither `weight_decay` is given nor both terms are off;
            0 elsewhere.
        weight_decay (`float`, *optional*): decoupled weight decay of AdamW on the head. None: 0 beside a ridge, 2
            without.
        remove_unintended (`bool`, *optional*): take the features out of the hidden states, in training and afterwards.
            None: as the model was made, which is True where nothing else was said.
        cache_states (`bool`, defaults to `True`): with a frozen backbone, run each text through it once instead of
            once an epoch. Has no effect while an adapter is trained.
        adapter_learning_rate (`float`, defaults to 2e-4): initial learning rate of an adapter (LoRA) in the backbone,
            whose start is the pretrained model; `learning_rate` is that of the head, which starts from zero. Both
            follow the same schedule.
        class_weights (`str` or `list[float]`, *optional*): weight of each label in the task loss: `"balanced"`, or a
            weight a label (on a command line `1.0,2.5`).
        label_smoothing_factor (`float`, defaults to 0.0): this much of the target's probability is spread over all
            labels in training. Not for `regression`, and not beside an offset, of which it would take back what that
            is sure of.
        preference_loss (`str`, defaults to `"bradley_terry"`): of pairs: `"bradley_terry"`, which compares the two
            sides, or `"pointwise"`, which judges each by itself; see [`task_loss`].
    """

    offset_weight: float | None = field(
        default=None,
        metadata={
            "help": "How much of what the features say about the label is set aside; 0: off; None: see the docs."
        },
    )
    logit_decay: float | None = field(
        default=None, metadata={"help": "Weight of the mean squared logit; 0: off; None: 0.1 or 0, see the docs."}
    )
    ridge: Weight | None = field(
        default=None,
        metadata={"help": "Weight of half the head's squared norm; auto: by cross-validation; None: see the docs."},
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
    weight_decay: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Decoupled weight decay of AdamW; None: 0 beside a ridge, 2 without."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns are read by name."})

    def __post_init__(self) -> None:
        check_choice("preference_loss", self.preference_loss, PreferenceLoss)
        for name, most in (("offset_weight", 1.0), ("logit_decay", sys.float_info.max)):
            given = getattr(self, name)
            if given is not None:
                setattr(self, name, number_of(given))
                if not 0 <= getattr(self, name) <= most:
                    raise ValueError(f"{name}={given!r} must be a number from 0" + " to 1" * (most == 1))
        if self.ridge is not None:
            self.ridge = weight_of("ridge", self.ridge)
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} must be from 0 to below 1")
        if self.label_smoothing_factor and self.offset_weight:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} would take back what the offset is sure of "
                f"(offset_weight={self.offset_weight}): set one of them to 0"
            )
        self.label_weights()
        super().__post_init__()
        # Without an accelerator pinned memory only brings a warning.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()

    def resolve_defaults(self, task: Task, num_unintended: int, *, can_offset: bool) -> "RegularizedTrainingArguments":
        """A copy in which offset, logit decay and weight decay are numbers, and the ridge is one or `"auto"`.

        Args:
            task: of the classifier.
            num_unintended: how many features it must not use.
            can_offset: whether states stay as they are, and the features' activations in them are known.
        """
        weights: tuple[Any, ...] = (self.penalty_weight, self.dependence_weight)
        controls = can_offset and num_unintended > 0 and any(weights)
        usual = controls and task != "regression" and not self.label_smoothing_factor
        own = copy.copy(self)
        if own.ridge is None:
            own.ridge = AUTO if controls and own.weight_decay is None else 0.0
        if own.weight_decay is None:
            own.weight_decay = 0.0 if own.ridge else WEIGHT_DECAY
        if own.offset_weight is None:
            own.offset_weight = OFFSET_WEIGHT if usual else 0.0
        if own.logit_decay is None:
            own.logit_decay = LOGIT_DECAY if usual else 0.0
        return own

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
