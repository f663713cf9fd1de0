"""Arguments of SAE training."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

OBJECTIVES = ("pretrain", "finetune")

FEW_STEPS = 200
"""Of pre-training, below which an SAE has learned little."""
FSDP1_REFUSED = (
    "FSDP version 1 cuts weights without regard to rows, and decoder directions could not be kept at unit length: use "
    "version 2 (fsdp_config={'version': 2}, which is the default; fsdp_version: 2 in the file of `accelerate config`)"
)


@dataclass
class SAETrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with what SAE training adds. A batch is a number of hidden states.

    Other defaults: `per_device_train_batch_size=2048`, `adam_epsilon=6.25e-10`, `optim="adamw_torch_fused"`,
    `weight_decay=0`, `remove_unused_columns=False`, `logging_steps=50`, `dataloader_drop_last=True` (where there is
    more than one batch). What is None there follows the objective:
    `learning_rate` (by the width of the SAE; `5e-5` for `"finetune"`), `lr_scheduler_type` (constant, and down to 0
    over the last 30 % of the steps; `"linear"` for `"finetune"`), `adam_beta2` (0.99; 0.999 for `"finetune"`).

    Args:
        objective (`str`, defaults to `"pretrain"`): `"pretrain"`: reconstruct hidden states. `"finetune"`: the
            two-part loss that teaches features which are dead on a task what the live ones miss.
        k_start (`int`, *optional*): active features at the first step of pre-training, annealed linearly to `k`. None:
            2 k. `k` itself turns annealing off.
        k_anneal_ratio (`float`, defaults to 0.2): share of the steps that annealing takes.
        aux_coefficient (`float`, defaults to 0.03125): weight of the loss that revives dead features in pre-training;
            0 turns it off.
        dead_after_tokens (`int`, *optional*): a feature is dead once it has not fired on this many states. None: a
            fortieth of what training sees, at most 10 million.
        sparsity_coefficient (`float`, *optional*): weight of the penalty of `relu` and `jumprelu`. None: led during
            training to where `k` features are active.
        dead_loss_weight (`float`, defaults to 0.1): weight of the dead features' part in fine-tuning.
    """

    objective: str = field(default="pretrain", metadata={"help": "pretrain or finetune."})
    k_start: int | None = field(default=None, metadata={"help": "Active features at the first step; None: 2 k."})
    k_anneal_ratio: float = field(default=0.2, metadata={"help": "Share of the steps in which k falls to its value."})
    aux_coefficient: float = field(default=1 / 32, metadata={"help": "Weight of the auxiliary loss; 0: off."})
    dead_after_tokens: int | None = field(
        default=None, metadata={"help": "States without firing after which a feature is dead; None: chosen by length."}
    )
    sparsity_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of the sparsity penalty (relu, jumprelu); None: led by k."}
    )
    dead_loss_weight: float = field(default=0.1, metadata={"help": "Weight of the dead features' part (finetune)."})
    # None stands for the default of the objective.
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Initial learning rate; None: by width (pretrain), 5e-5 (finetune)."}
    )
    lr_scheduler_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Schedule; None: warmup_stable_decay (pretrain), linear (finetune)."}
    )
    adam_beta2: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Beta2 of Adam; None: 0.99 (pretrain), 0.999 (finetune)."}
    )
    per_device_train_batch_size: int = field(default=2048, metadata={"help": "Hidden states of a batch."})
    per_device_eval_batch_size: int = field(default=8192, metadata={"help": "Hidden states of a batch."})
    adam_epsilon: float = field(default=6.25e-10, metadata={"help": "Epsilon of Adam."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "The optimizer."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    # Several processes would fill it up with states from the start of the epoch, and no longer do as one does.
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave out an epoch's last, short batch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows hold hidden states only."})

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is not known; choose one of {', '.join(OBJECTIVES)}")
        if self.learning_rate is None and self.objective == "finetune":
            self.learning_rate = 5e-5
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "warmup_stable_decay" if self.objective == "pretrain" else "linear"
        if self.adam_beta2 is None:
            self.adam_beta2 = 0.99 if self.objective == "pretrain" else 0.999
        checks: dict[str, Any] = {
            "learning_rate": self.learning_rate or 0.0,
            "aux_coefficient": self.aux_coefficient,
            "dead_loss_weight": self.dead_loss_weight,
            "sparsity_coefficient": self.sparsity_coefficient or 0.0,
        }
        for name, value in checks.items():
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        for name, count in {"k_start": self.k_start, "dead_after_tokens": self.dead_after_tokens}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        if not 0 <= self.k_anneal_ratio <= 1:
            raise ValueError(f"k_anneal_ratio={self.k_anneal_ratio} must lie between 0 and 1")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError(
                "torch_compile has nothing to work on here: an SAE's step is kernels with a backward of their own, "
                "which it can't look into; leave it out"
            )
        super().__post_init__()
        if self.fsdp_plugin_args is not None and self.fsdp_plugin_args["fsdp_version"] != 2:
            raise ValueError(FSDP1_REFUSED)
        # Without an accelerator pinned memory only brings a warning.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
