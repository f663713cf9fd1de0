"""Choosing the weights of the two terms: a path of ever stronger ones, and the strongest that costs next to nothing.

The path is solved on cached states (`solver`), each point from the solution of the one before; what is chosen is the
strongest whose validation loss lies within one standard error of the best. The validation texts are like those of the
training set: no groups and no shifted data enter.
"""

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfreg.classifier.arguments import AUTO
from selfreg.classifier.held_out import TO_CHOOSE_BY, HeldOutLoss
from selfreg.classifier.inputs import check_logits, label_weights
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.offset import with_offsets
from selfreg.classifier.penalty import dependence_directions
from selfreg.classifier.solver import HeadProblem
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import held_constant
from selfreg.classifier.terms import Regularizer
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.utils.files import write_json

logger = logging.getLogger(__name__)

WEIGHT_PATH_FILE = "weight_path.json"
SCORES = {"single_label": "accuracy", "multi_label": "f1", "regression": "r2", "preference": "accuracy"}
"""What `PathPoint.score` is, by task."""
UNIT = {"penalty_weight": 1.0, "dependence_weight": 30.0}
"""Weights at a strength of 1."""
VALIDATION_SHARE = 0.2
RIDGES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
# Past ten times the unit the terms are as good as 0 and the solved heads change no more, while AdamW no longer
# gets there: on the demo's notes RegularizedTrainer's training loss is 0.02 without the terms, 0.06 at three times the
# unit, 0.23 at 32 times and 0.50 at a hundred.
_RANGE = (0.01, 10.0)
Measure = Callable[[RegularizedSequenceClassifier, PooledStates], Mapping[str, float | None]]


@dataclass(frozen=True)
class PathPoint:
    """
    Attributes:
        strength (`float`): what the unit of each weight that is chosen is multiplied by.
        penalty_weight, dependence_weight (`float`): the weights.
        train_loss (`float`): task loss of the texts that the head was solved on, with the label smoothing of `args`.
        validation_loss, validation_se (`float`): task loss of the validation texts, without it, and its standard
            error.
        score (`float`): accuracy, F1 (mean over labels) or R² on the validation texts; see `SCORES`.
        similarity, dependence (`float`): the two terms without their weights.
        iterations (`int`), converged (`bool`): of the solver.
        figures (`dict`): what else was measured on the validation texts.
    """

    strength: float
    penalty_weight: float
    dependence_weight: float
    train_loss: float
    validation_loss: float
    validation_se: float
    score: float
    similarity: float
    dependence: float
    iterations: int
    converged: bool
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightPath:
    """
    Attributes:
        points (`list[PathPoint]`): from weak to strong.
        chosen (`int`): index of the strongest point within one standard error of the best.
        best (`int`): index of the lowest validation loss.
        ridge (`float`): of all points.
        ridges (`list[tuple[float, float]]`): ridge and validation loss without the two terms, where it was searched.
        score_name (`str`): what `score` is.
        num_train, num_validation (`int`): texts (or pairs).
        similarity (`str`): of the penalty.
    """

    points: list[PathPoint]
    chosen: int
    best: int
    ridge: float
    ridges: list[tuple[float, float]]
    score_name: str
    num_train: int
    num_validation: int
    similarity: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "WeightPath":
        """From what `asdict` gave, as JSON."""
        points = [PathPoint(**point) for point in values["points"]]
        ridges = [(ridge, loss) for ridge, loss in values["ridges"]]
        return cls(**{**values, "points": points, "ridges": ridges})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `weight_path.json` into `folder`, and returns its path; `evaluation.path_chart` draws it."""
        path = Path(folder) / WEIGHT_PATH_FILE
        write_json(path, asdict(self))
        return path


def strengths(points: int) -> list[float]:
    """0, then evenly spaced in their logarithm from a hundredth of the units to ten times them.

    Raises:
        ValueError: fewer than 3 points.
    """
    if points < 3:
        raise ValueError(f"points={points} is too few for a path: at least 3")
    return [0.0, *(float(f"{value:.4g}") for value in np.geomspace(*_RANGE, points - 1))]


def strongest_within(losses: Sequence[float], errors: Sequence[float]) -> tuple[int, int]:
    """(chosen, best): the last index whose loss is at most the best one plus that one's standard error.

    Of equal losses the stronger is the best.
    """
    best = max(range(len(losses)), key=lambda i: (-losses[i], i))
    chosen = max(i for i, loss in enumerate(losses) if loss <= losses[best] + errors[best])
    return chosen, best


def weight_path(
    model: RegularizedSequenceClassifier,
    train: PooledStates,
    args: RegularizedTrainingArguments,
    *,
    validation: PooledStates | None = None,
    points: int = 10,
    ridge: float | None = None,
    measure: Measure | None = None,
) -> WeightPath:
    """Solves the head for a series of weights, and says which to take. `model` is left as it was.

    The weights of `args` that are `"auto"` grow from 0 to 10 times their `UNIT`; one that is a number stays. Both
    grow together, at a ratio of 1 : 30: they are two sights of one thing, what the weights point
    along and what the logits still depend on, and a grid of both would take `points` times as long.

    The ridge is chosen by the same rule, without the terms: the strongest within one standard error of the best. Where
    texts are told apart well the best is next to none, with weights that are larger than any Trainer's, and small
    weights are what the dependence term needs beside it.

    Args:
        model: the classifier. Its standardisation is worked out anew, from the texts solved on.
        train: pooled states of the training set.
        args: weights, similarity, `class_weights`, `preference_loss`, `label_smoothing_factor`, `logit_decay`
            and `seed`.
        validation: pooled states to choose by. None: a fifth of `train`, with the same share of every label where
            there is one label a text. Given ones are judged with the offsets that they bring, if any.
        points: of the path, the first without the terms that are chosen.
        ridge: of all points; None: that of `args` where it is a number more than 0, and else searched among `RIDGES`.
        measure (*optional*): called with the model at each point and the validation states, for `PathPoint.figures`.

    Raises:
        ValueError: neither weight is "auto", or the validation texts are too few.
    """
    auto = [name for name in UNIT if getattr(args, name) == AUTO]
    if not auto:
        raise ValueError(f"a path needs a weight that is 'auto'; {', '.join(UNIT)} are both numbers")
    args = args.resolve_defaults(model.task, model.config.num_unintended, can_offset=True)
    if ridge is None and args.ridge not in (AUTO, 0.0):
        ridge = args.ridge
    train = with_offsets(model, args, train)
    if validation is None:
        train, validation = split(model, train, args.seed)
    if len(validation) < 2:
        raise ValueError(f"{len(validation)} validation texts have no standard error: give at least 2")
    before = {name: value.clone() for name, value in model.state_dict().items() if name in _fitted(model)}
    try:
        return _solve_path(model, train, validation, args, auto, points, ridge, measure)
    finally:
        model.load_state_dict(before, strict=False)


def _fitted(model: RegularizedSequenceClassifier) -> set[str]:
    """Names of what is fitted to a training set."""
    buffers = {"pooled_mean", "pooled_scale", "target_mean", "target_scale"}
    return {"score.weight", "score.bias"} | (buffers & {name for name, _ in model.named_buffers(recurse=False)})


def _solve_path(
    model: RegularizedSequenceClassifier,
    train: PooledStates,
    validation: PooledStates,
    args: RegularizedTrainingArguments,
    auto: Sequence[str],
    points: int,
    ridge: float | None,
    measure: Measure | None,
) -> WeightPath:
    check_logits(args, model)
    regularizer = fitted_regularizer(model, train, _with(args, dict.fromkeys(auto, 0.0)))
    loss = HeldOutLoss(label_weights(args, train.labels, model), args.preference_loss)  # type: ignore[arg-type]
    problem = HeadProblem(
        model,
        train,
        label_weights=loss.label_weights,
        preference_loss=loss.preference_loss,
        label_smoothing=args.label_smoothing_factor,
        logit_decay=args.logit_decay or 0.0,
    )
    ridges: list[tuple[float, float]] = []
    if ridge is None:
        ridge, ridges = _search_ridge(problem, validation, loss)
    found = []
    weight = bias = None
    for strength in strengths(points):
        own = copy.copy(regularizer)
        for name in auto:
            setattr(own, name, strength * UNIT[name])
        solved = problem.solve(own, ridge=ridge, start=weight, start_bias=bias, **TO_CHOOSE_BY)
        weight, bias = solved.weight, solved.bias
        if not solved.converged:
            logger.warning("the solver did not converge at strength %g of the path of weights", strength)
        similarity, dependence = own(weight.cpu())
        validation_loss, error = loss.with_error(model, validation)
        found.append(
            PathPoint(
                strength=strength,
                penalty_weight=float(own.penalty_weight),
                dependence_weight=float(own.dependence_weight),
                train_loss=problem.task_loss(weight, bias),
                validation_loss=validation_loss,
                validation_se=error,
                score=_score(model, validation),
                similarity=float(similarity),
                dependence=float(dependence),
                iterations=solved.iterations,
                converged=solved.converged,
                figures=dict(measure(model, validation)) if measure else {},
            )
        )
    chosen, best = strongest_within([p.validation_loss for p in found], [p.validation_se for p in found])
    return WeightPath(
        found,
        chosen,
        best,
        ridge,
        ridges,
        SCORES[model.task],
        len(train),
        len(validation),
        args.similarity,
    )


def fitted_regularizer(
    model: RegularizedSequenceClassifier, states: PooledStates, args: RegularizedTrainingArguments
) -> Regularizer:
    """Sets the standardisation of `model` from `states`, and gives the two terms that belong to both."""
    model.set_standardization(states.pooled, states.labels)
    regularizer = Regularizer(model.unintended, args, model.unintended_mask)
    if model.config.num_unintended:
        differences, activations = states.compared
        # The mean of the standardisation is held constant anyway.
        regularizer.dependence_directions = dependence_directions(
            differences / model.pooled_scale.cpu(), activations, held_constant(model.task, states.labels)
        )
    return regularizer


def split(model: RegularizedSequenceClassifier, states: PooledStates, seed: int) -> tuple[PooledStates, PooledStates]:
    """Four fifths to solve on and a fifth to choose by; drawn within each label where every label can spare texts."""
    from sklearn.model_selection import train_test_split

    stratify = None
    if model.task == "single_label":
        counts = states.labels.unique(return_counts=True)[1]
        if int(counts.min()) >= 2 and VALIDATION_SHARE * len(states) >= len(counts):
            stratify = states.labels.numpy()
    fit, validation = train_test_split(
        np.arange(len(states)), test_size=VALIDATION_SHARE, random_state=seed, stratify=stratify
    )
    # In the order of the set: float sums then do not depend on the draw more than they must.
    return states.select(np.sort(fit)), states.select(np.sort(validation))


def _search_ridge(
    problem: HeadProblem, validation: PooledStates, loss: HeldOutLoss
) -> tuple[float, list[tuple[float, float]]]:
    """From strong to weak, as far as the validation loss falls."""
    tried: list[tuple[float, float]] = []
    errors: list[float] = []
    weight = bias = None
    for ridge in RIDGES:
        solved = problem.solve(None, ridge=ridge, start=weight, start_bias=bias, **TO_CHOOSE_BY)
        weight, bias = solved.weight, solved.bias
        mean, error = loss.with_error(problem.model, validation)
        tried.append((ridge, mean))
        errors.append(error)
        if len(tried) > 1 and mean > tried[-2][1]:
            break
    # From weak to strong, as the rule has them.
    chosen, _ = strongest_within([mean for _, mean in reversed(tried)], errors[::-1])
    return tried[-1 - chosen][0], tried


@torch.no_grad()
def _score(model: RegularizedSequenceClassifier, states: PooledStates) -> float:
    from sklearn.metrics import accuracy_score, f1_score, r2_score

    logits = model.logits(states.pooled.to(model.score.weight.device)).cpu()
    labels = states.labels.numpy()
    if model.task == "single_label":
        return float(accuracy_score(labels, logits.argmax(dim=1).numpy()))
    if model.task == "multi_label":
        return float(f1_score(labels, (logits > 0).numpy(), average="macro", zero_division=0.0))
    if model.task == "regression":
        return float(r2_score(labels, logits[:, 0].numpy()))
    return float((logits[:, 0] > logits[:, 1]).double().mean())


def resolve_weights(
    model: RegularizedSequenceClassifier,
    args: RegularizedTrainingArguments,
    train: PooledStates,
    *,
    measure: Measure | None = None,
) -> tuple[RegularizedTrainingArguments, WeightPath | None]:
    """`args` with every `"auto"` replaced by the weight that the path chooses, and the path.

    `RegularizedTrainer` does not solve quite the same problem. Its ridge, where it is chosen as well, is chosen after
    the weights, with the terms in place (`ridge.choose_ridge`). Where there is a `weight_decay` instead, AdamW shrinks
    every weight by lr · `weight_decay` a step, beside steps that are scaled by 1/√v, v the mean square of the
    gradient: at rest a ridge of `weight_decay` · √v, another one for each weight. The weights of the two terms have
    the same meaning in all: they stand beside the same mean loss.

    Args:
        model: the classifier; left as it was.
        args: of the training.
        train: pooled states of the training set, whole: the texts to choose by are taken from it.
        measure (*optional*): see `weight_path`.

    Returns:
        `args` itself and None where nothing is "auto". Without unintended features there is nothing to weigh either:
        zeros, and None.
    """
    auto = [name for name in UNIT if getattr(args, name) == AUTO]
    if not auto:
        return args, None
    if not model.config.num_unintended:
        return _with(args, dict.fromkeys(auto, 0.0)), None
    args = args.resolve_defaults(model.task, model.config.num_unintended, can_offset=True)
    path = weight_path(model, train, args, measure=measure)
    chosen: Any = path.points[path.chosen]
    return _with(args, {name: getattr(chosen, name) for name in auto}), path


def _with(args: RegularizedTrainingArguments, weights: Mapping[str, Any]) -> RegularizedTrainingArguments:
    return replace(args, **weights)
