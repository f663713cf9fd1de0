"""What a user would try instead, under the same interface and budget.

The linear probe by itself (`plain`), with a ridge chosen by cross-validation, as selfreg's (`l2`), and with what keeps
classifiers from being too sure: `dropout` of the states' dimensions, `label_smoothing`, the `focal` loss (Lin et al.
2017), `spectral_norm` of the weights (Miyato et al. 2018). And the probe on states from which something was taken: the
group (`leace`, Belrose et al. 2023, of the library concept-erasure; needs the group of each training text), or the
whole span of the unintended features' decoder directions (`projection`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import TrainerCallback

from selfreg.classifier.arguments import AUTO
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.penalty import orthonormal_basis
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import Task, weighted_mean
from selfreg.classifier.trainer import RegularizedTrainer
from selfreg.classifier.training_args import RegularizedTrainingArguments

logger = logging.getLogger(__name__)

_DROPOUT, _LABEL_SMOOTHING, _FOCAL_GAMMA = 0.3, 0.1, 2.0
_VARIANTS = ("dropout", "focal", "spectral_norm")
BASELINES = ("plain", "l2", "dropout", "label_smoothing", "focal", "spectral_norm", "leace", "projection")
"""All that `fit_baseline` knows."""


@dataclass(frozen=True)
class FittedHead:
    """A trained head over cached states.

    Attributes:
        name (`str`): the method.
        model (`RegularizedSequenceClassifier`): head and standardisation; without a backbone for the baselines.
        erase (`Callable`): what happens to raw pooled states before the head; the identity but for `leace` and
            `projection`.
        history (`list[dict]`): the Trainer's log.
        ridge (`float`): of the training; 0 without.
    """

    name: str
    model: RegularizedSequenceClassifier
    erase: Callable[[Tensor], Tensor]
    history: list[dict[str, float]]
    ridge: float = 0.0

    @torch.inference_mode()
    def states(self, states: PooledStates) -> Tensor:
        """Raw pooled states -> what the head sees, `[N, hidden_size]`, on the CPU; of pairs, chosen less rejected."""
        seen = self.model.standardize(self._erased(states)).cpu()
        return seen[:, 0] - seen[:, 1] if states.are_pairs else seen

    @torch.inference_mode()
    def logits(self, states: PooledStates) -> Tensor:
        """Raw pooled states -> logits `[N, L]`, on the CPU; of pairs the scores of both sides, `[N, 2]`."""
        return self.model.logits(self._erased(states)).cpu()

    @property
    def weight(self) -> Tensor:
        """`[num_labels, hidden_size]`, over what `states` gives, on the CPU."""
        return self.model.score.weight.detach().cpu()

    def _erased(self, states: PooledStates) -> Tensor:
        # The Trainer leaves the head on the accelerator; cached states are on the CPU.
        return self.erase(states.pooled).to(self.model.score.weight.device)


def fit_head(
    name: str,
    model: RegularizedSequenceClassifier,
    args: RegularizedTrainingArguments,
    train: PooledStates,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    erase: Callable[[Tensor], Tensor] | None = None,
    trainer_class: type[RegularizedTrainer] = RegularizedTrainer,
) -> FittedHead:
    """Trains the head of `model` on cached states; from zero, whatever it held before."""
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.zeros_(model.score.bias)
    normed = trainer_class is _SpectralNormTrainer
    if normed:
        # Weights of zero have no direction that could be scaled to a norm of 1.
        torch.nn.init.normal_(model.score.weight, std=model.config.hidden_size**-0.5)
        spectral_norm(model.score)
    trainer = trainer_class(model=model, args=args, train_dataset=train, callbacks=list(callbacks))
    trainer.train()
    model.eval()
    if normed:
        remove_parametrizations(model.score, "weight")
    return FittedHead(name, model, erase or _identity, trainer.state.log_history, trainer.ridge)


def fit_baseline(
    name: str,
    config: RegularizedSequenceClassifierConfig,
    args: RegularizedTrainingArguments,
    train: PooledStates,
    *,
    groups: Sequence[Any] | None = None,
    directions: Tensor | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> FittedHead | None:
    """Trains a baseline with the budget of `args`.

    Args:
        name: one of `BASELINES`.
        config: of the classifier that it is compared with.
        args: of that classifier's training; penalties, removal, weight decay and (but for `l2` and
            `label_smoothing`) ridge and label smoothing are turned off here.
        train: pooled states before any removal.
        groups: the group of each training text, None where it is not known; for `leace`.
        directions (`[U, hidden_size]`): decoder directions of the unintended features; for `projection`.
        callbacks: for the Trainer.

    Returns:
        None where the method does not apply: `leace` without groups, `label_smoothing` and `focal` without labels.

    Raises:
        ValueError: an unknown name.
    """
    args = replace(
        args,
        penalty_weight=0.0,
        dependence_weight=0.0,
        offset_weight=0.0,
        logit_decay=0.0,
        remove_unintended=False,
        ridge=AUTO if name == "l2" else 0.0,
        weight_decay=0.0,
        label_smoothing_factor=_LABEL_SMOOTHING if name == "label_smoothing" else 0.0,
    )
    plain = RegularizedSequenceClassifierConfig(
        hidden_size=config.hidden_size,
        id2label=config.id2label,
        label2id=config.label2id,
        unintended_feature_ids=[],
        remove_unintended=False,
        task=config.task,
    )
    model = RegularizedSequenceClassifier(plain)
    if name in ("label_smoothing", "focal") and config.task == "regression":
        return None
    if name in ("plain", "l2", "label_smoothing"):
        return fit_head(name, model, args, train, callbacks=callbacks)
    if name in _TRAINERS:
        return fit_head(name, model, args, train, callbacks=callbacks, trainer_class=_TRAINERS[name])
    if name == "leace":
        if groups is None or len({group for group in groups if group is not None}) < 2:
            logger.warning("leace needs the group of the training texts (data.group): left out")
            return None
        erase = leace_eraser(train.compared[0], groups, differences=train.are_pairs)
    elif name == "projection":
        if directions is None:
            raise ValueError("projection needs the decoder directions of the unintended features")
        erase = _projector(directions)
    else:
        raise ValueError(f"baseline {name!r} is not known; there are {', '.join(BASELINES)}")
    erased = replace(train, pooled=erase(train.pooled))
    return fit_head(name, model, args, erased, callbacks=callbacks, erase=erase)


class _DropoutTrainer(RegularizedTrainer):
    """Dimensions of the standardised states are left out at random, and the others scaled up."""

    def task_loss(self, model: Any, inputs: dict[str, Tensor | Any]) -> tuple[Tensor, Any]:
        if model.training:
            own = self.accelerator.unwrap_model(model)
            states = F.dropout(own.standardize(inputs["pooled"]), _DROPOUT)
            inputs = {**inputs, "pooled": states * own.pooled_scale + own.pooled_mean}
        return super().task_loss(model, inputs)


class _FocalTrainer(RegularizedTrainer):
    """Texts that are told well already count less: (1 - p)^γ · cross-entropy, p the probability of the true label."""

    def loss_of(
        self, logits: Tensor, labels: Tensor, model: RegularizedSequenceClassifier, **columns: Tensor | None
    ) -> Tensor:
        if not model.training:
            return super().loss_of(logits, labels, model, **columns)
        each = focal_losses(model.task, logits, labels)
        weights = self.weights_of(labels, model.task, columns.get("sample_weights")).to(each)
        return weighted_mean(each, weights, self.mean_weight)


def focal_losses(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """`[N]`: (1 - p)^γ · cross-entropy, p the probability of the true label; for many labels the mean over labels."""
    if task == "multi_label":
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
        return ((1 - torch.exp(-each)).pow(_FOCAL_GAMMA) * each).mean(dim=1)
    each = F.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-each)).pow(_FOCAL_GAMMA) * each


class _SpectralNormTrainer(RegularizedTrainer):
    """The weights have a spectral norm of 1; see `fit_head`."""


_TRAINERS = dict(zip(_VARIANTS, (_DropoutTrainer, _FocalTrainer, _SpectralNormTrainer), strict=True))


def _projector(directions: Tensor) -> Callable[[Tensor], Tensor]:
    basis = orthonormal_basis(directions)
    return lambda states: states - (states @ basis.T) @ basis


def leace_eraser(pooled: Tensor, groups: Sequence[Any], *, differences: bool = False) -> Callable[[Tensor], Tensor]:
    """Fits LEACE to take the group out of pooled states; texts of unknown group are left out of the fit.

    Where they are `differences` between the sides of pairs, the eraser is for either side: linear, without an offset,
    which would cancel.
    """
    from concept_erasure import LeaceFitter

    values = sorted({str(group): group for group in groups if group is not None}.items())
    rows = torch.tensor([index for index, group in enumerate(groups) if group is not None])
    known = [groups[int(row)] for row in rows]
    concept = torch.tensor([[group == value for _, value in values] for group in known]).double()
    # In float64: the states' covariance spans many orders of magnitude.
    eraser = LeaceFitter.fit(pooled[rows].double(), concept).eraser
    if differences:
        offset = eraser(torch.zeros(1, pooled.shape[1], dtype=torch.float64))
        return lambda states: (eraser(states.double()) - offset).to(states.dtype)
    return lambda states: eraser(states.double()).to(states.dtype)


def _identity(states: Tensor) -> Tensor:
    return states
