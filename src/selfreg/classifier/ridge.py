"""Choosing the ridge, which keeps a head's weights small: by cross-validation, with all else as in the training.

The texts held out are like those of the training set: no groups and no shifted data enter. Shapes: N texts, L logits,
D hidden size.
"""

import copy
import logging
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfreg.classifier.held_out import TO_CHOOSE_BY, HeldOutLoss
from selfreg.classifier.inputs import label_weights
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.path import fitted_regularizer
from selfreg.classifier.solver import HeadProblem
from selfreg.classifier.states import PooledStates
from selfreg.classifier.terms import Regularizer
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.utils.progress import progress

logger = logging.getLogger(__name__)

RIDGES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
FOLDS = 5
USUAL = 0.05
"""Where the texts are too few or too much alike to choose by."""
Rows = NDArray[np.intp]
_LEAST, _MANY = 2 * FOLDS, 5000


@dataclass(frozen=True)
class RidgeChoice:
    """
    Attributes:
        ridge (`float`): what was chosen.
        best (`float`): the one of the lowest loss.
        losses (`list[tuple[float, float]]`): ridges, from strong to weak, and the loss of the texts held out.
    """

    ridge: float
    best: float
    losses: list[tuple[float, float]]


def choose_ridge(
    model: RegularizedSequenceClassifier, states: PooledStates, args: RegularizedTrainingArguments
) -> RidgeChoice:
    """The strongest ridge whose loss is not told from the best one's by the texts that were held out.

    Each text is held out once, in five folds; of more than 5,000 texts a fifth is. A loss is told from the best where
    the difference is more than one standard error of it, over the same texts. The loss is that of logits + offset
    where there are offsets, as in training: with what the features say set aside, leaning on them gains nothing. A
    text whose label comes in none of those that its head was solved on does not count.

    A Trainer with a `loss_of` of its own trains another loss than the one that this ridge is chosen for.

    Args:
        model: the classifier; left as it is.
        states: pooled states of the training set, with the offsets as they are added in training, if any.
        args: the weights as numbers, `similarity`, `class_weights`, `preference_loss`, `label_smoothing_factor`,
            `logit_decay` and `seed`.

    Returns:
        the choice; of fewer than ten texts, and of those that leave a fold nothing to learn from (targets that are all
        alike, weights that are all 0), `USUAL`, with a warning.
    """
    args = args.resolve_defaults(model.task, model.config.num_unintended, can_offset=True)
    if len(states) < _LEAST:
        return _usual(f"{len(states)} training texts are too few to choose one by")
    parts = _folds(model, states, args.seed)
    for rows, _ in parts:
        if why := _nothing_to_learn(model, states.select(rows)):
            return _usual(f"{why} in a fold of the training texts, so that none can be chosen by them")
    head = _head_alone(model)
    of_labels = label_weights(args, states.labels, model)
    of_labels = None if of_labels is None else of_labels.cpu()
    folds = [_Fold(head, states, args, of_labels, *rows) for rows in parts]
    order = np.concatenate([fold.held_out for fold in folds])
    judged = states.select(order)
    judged = replace(judged, weights=_counted(judged, torch.cat([fold.knows for fold in folds])))
    head.set_standardization(states.pooled, states.labels)
    held_out = HeldOutLoss(of_labels, args.preference_loss)  # type: ignore[arg-type]
    losses: list[tuple[float, float]] = []
    pulls: list[Tensor] = []
    with progress("ridge by cross-validation", len(RIDGES) * len(folds), "heads") as advance:
        for ridge in RIDGES:
            logits = []
            for fold in folds:
                logits.append(fold.logits(ridge))
                advance(1)
            loss, own_pulls = held_out.with_pulls(head, judged, torch.cat(logits))
            losses.append((ridge, loss))
            pulls.append(own_pulls)
            if len(losses) > 1 and loss > losses[-2][1]:
                break
    if not all(math.isfinite(loss) for _, loss in losses):
        return _usual(f"the losses of held-out texts are not finite ({losses})")
    best = min(range(len(losses)), key=lambda i: losses[i][1])
    chosen = next(
        i for i in range(best + 1) if losses[i][1] - losses[best][1] <= float((pulls[i] - pulls[best]).norm())
    )
    if chosen == 0:
        logger.warning(
            "ridge=%g, the strongest that is tried, is no worse than the best on held-out texts (loss %.3f): the "
            "states hardly tell the labels",
            *losses[0],
        )
    return RidgeChoice(losses[chosen][0], losses[best][0], losses)


def _usual(why: str) -> RidgeChoice:
    logger.warning("ridge=%g: %s", USUAL, why)
    return RidgeChoice(USUAL, USUAL, [])


def _nothing_to_learn(model: RegularizedSequenceClassifier, states: PooledStates) -> str:
    """Why no head can be solved on the texts; empty where one can."""
    if states.weights is not None and not bool(states.weights.sum() > 0):
        return "the weights are all 0"
    if model.task == "regression" and not bool(states.labels.double().std(correction=0) > 0):
        return "the targets are all alike"
    if bool((states.pooled == states.pooled.flatten(0, -2)[0]).all()):
        return "the states are all alike"
    return ""


def _counted(states: PooledStates, knows: Tensor) -> Tensor | None:
    if bool(knows.all()):
        return states.weights
    logger.info("%d texts have a label that the rest of a fold lacks", int((~knows).sum()))
    return knows.float() if states.weights is None else states.weights * knows


def _head_alone(model: RegularizedSequenceClassifier) -> RegularizedSequenceClassifier:
    """A copy without a backbone, on the CPU, whose head is free to be solved over and over."""
    own = RegularizedSequenceClassifier(copy.deepcopy(model.config))
    for name, buffer in model.named_buffers(recurse=False):
        own.get_buffer(name).copy_(buffer)
    return own


def _folds(model: RegularizedSequenceClassifier, states: PooledStates, seed: int) -> list[tuple[Rows, Rows]]:
    """(solved on, held out), drawn within each label where there are enough texts of each."""
    from sklearn.model_selection import KFold, StratifiedKFold

    by_label = model.task == "single_label" and int(states.labels.unique(return_counts=True)[1].min()) >= FOLDS
    splitter = (StratifiedKFold if by_label else KFold)(FOLDS, shuffle=True, random_state=seed)
    labels = states.labels.numpy() if by_label else None
    folds = list(splitter.split(np.zeros(len(states)), labels))
    return folds[:1] if len(states) > _MANY else folds


class _Fold:
    """One part of the texts held out, and the heads that the others give."""

    def __init__(
        self,
        head: RegularizedSequenceClassifier,
        states: PooledStates,
        args: RegularizedTrainingArguments,
        label_weights: Tensor | None,
        rows: Rows,
        held_out: Rows,
    ) -> None:
        own = states.select(rows)
        self.held_out, self.head = held_out, copy.deepcopy(head)
        judged = states.select(held_out)
        self.pooled = judged.pooled
        # Whether a text's label is among those that the head is solved on: a bias alone, which no ridge holds, would
        # take it for ever less likely.
        self.knows = torch.ones(len(held_out), dtype=torch.bool)
        if head.task == "single_label":
            self.knows = torch.isin(judged.labels, own.labels)
        elif head.task == "multi_label":
            self.knows = ~((judged.labels > 0) & ~(own.labels > 0).any(dim=0)).any(dim=1)
        self.regularizer: Regularizer | None = None
        if args.dependence_weight and head.config.num_unintended:
            self.regularizer = fitted_regularizer(self.head, own, args)
        else:
            self.head.set_standardization(own.pooled, own.labels)
            if head.config.num_unintended:
                self.regularizer = Regularizer(head.unintended, args, head.unintended_mask)
        self.problem = HeadProblem(
            self.head,
            own,
            label_weights=label_weights,
            preference_loss=args.preference_loss,  # type: ignore[arg-type]
            label_smoothing=args.label_smoothing_factor,
            logit_decay=args.logit_decay or 0.0,
        )
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def logits(self, ridge: float) -> Tensor:
        """Of the texts held out; each ridge starts from the one before."""
        solved = self.problem.solve(
            self.regularizer, ridge=ridge, start=self.weight, start_bias=self.bias, **TO_CHOOSE_BY
        )
        self.weight, self.bias = solved.weight, solved.bias
        with torch.no_grad():
            return self.head.logits(self.pooled).double()
