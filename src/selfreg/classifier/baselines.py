"""What a user would try instead, under the same interface and budget.

`plain`: the linear probe. `l2`: the same with weight decay. `leace`: the same after the group was erased from the
pooled states (Belrose et al. 2023, the library concept-erasure); it needs the group of each training text.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.states import PooledStates
from selfreg.classifier.trainer import RegularizedTrainer
from selfreg.classifier.training_args import RegularizedTrainingArguments

logger = logging.getLogger(__name__)

L2_WEIGHT_DECAY = 2.0
"""Decoupled decay of AdamW, the same that selfreg's classifier has by default."""


@dataclass(frozen=True)
class FittedHead:
    """A trained head over cached states.

    Attributes:
        name (`str`): the method.
        model (`RegularizedSequenceClassifier`): head and standardisation; without a backbone for the baselines.
        erase (`Callable`): what happens to raw pooled states before the head; the identity but for `leace`.
        history (`list[dict]`): the Trainer's log.
    """

    name: str
    model: RegularizedSequenceClassifier
    erase: Callable[[Tensor], Tensor]
    history: list[dict[str, float]]

    @torch.inference_mode()
    def states(self, states: PooledStates) -> Tensor:
        """Raw pooled states -> what the head sees, `[N, hidden_size]`, on the CPU."""
        return self._standardized(states).cpu()

    @torch.inference_mode()
    def logits(self, states: PooledStates) -> Tensor:
        """Raw pooled states -> logits `[N, num_labels]`, on the CPU."""
        return self.model.score(self._standardized(states)).cpu()

    @property
    def weight(self) -> Tensor:
        """`[num_labels, hidden_size]`, over what `states` gives, on the CPU."""
        return self.model.score.weight.detach().cpu()

    def _standardized(self, states: PooledStates) -> Tensor:
        # The Trainer leaves the head on the accelerator; cached states are on the CPU.
        return self.model.standardize(self.erase(states.pooled).to(self.model.score.weight.device))


def fit_head(
    name: str,
    model: RegularizedSequenceClassifier,
    args: RegularizedTrainingArguments,
    train: PooledStates,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    erase: Callable[[Tensor], Tensor] | None = None,
) -> FittedHead:
    """Trains the head of `model` on cached states; from zero, whatever it held before."""
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.zeros_(model.score.bias)
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=train, callbacks=list(callbacks))
    trainer.train()
    model.eval()
    return FittedHead(name, model, erase or _identity, trainer.state.log_history)


def fit_baseline(
    name: str,
    config: RegularizedSequenceClassifierConfig,
    args: RegularizedTrainingArguments,
    train: PooledStates,
    *,
    groups: Sequence[Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> FittedHead | None:
    """Trains a baseline with the budget of `args`.

    Args:
        name: `"plain"`, `"l2"` or `"leace"`.
        config: of the classifier that it is compared with.
        args: of that classifier's training; penalties, removal and (but for `l2`) weight decay are turned off here.
        train: pooled states before any removal.
        groups: the group of each training text, None where it is not known; for `leace`.
        callbacks: for the Trainer.

    Returns:
        None where the method does not apply: `leace` without groups.

    Raises:
        ValueError: an unknown name.
    """
    args = replace(
        args,
        penalty_weight=0.0,
        dependence_weight=0.0,
        remove_unintended=False,
        weight_decay=L2_WEIGHT_DECAY if name == "l2" else 0.0,
    )
    plain = RegularizedSequenceClassifierConfig(
        hidden_size=config.hidden_size,
        id2label=config.id2label,
        label2id=config.label2id,
        unintended_feature_ids=[],
        remove_unintended=False,
    )
    model = RegularizedSequenceClassifier(plain)
    if name in ("plain", "l2"):
        return fit_head(name, model, args, train, callbacks=callbacks)
    if name != "leace":
        raise ValueError(f"baseline {name!r} is not known; there are plain, l2 and leace")
    if groups is None or len({group for group in groups if group is not None}) < 2:
        logger.warning("leace needs the group of the training texts (data.group): left out")
        return None
    erase = leace_eraser(train.pooled, groups)
    erased = replace(train, pooled=erase(train.pooled))
    return fit_head(name, model, args, erased, callbacks=callbacks, erase=erase)


def leace_eraser(pooled: Tensor, groups: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Fits LEACE to take the group out of pooled states; texts of unknown group are left out of the fit."""
    from concept_erasure import LeaceFitter

    values = sorted({str(group): group for group in groups if group is not None}.items())
    rows = torch.tensor([index for index, group in enumerate(groups) if group is not None])
    known = [groups[int(row)] for row in rows]
    concept = torch.tensor([[group == value for _, value in values] for group in known]).double()
    # In float64: the states' covariance spans many orders of magnitude.
    eraser = LeaceFitter.fit(pooled[rows].double(), concept).eraser
    return lambda states: eraser(states.double()).to(states.dtype)


def _identity(states: Tensor) -> Tensor:
    return states
