"""What the unintended features alone say about the target, set aside while the head is trained.

A product of experts (Clark et al. 2019; He et al. 2019; here with an expert that sees unintended features only): the
head is trained on logits + s · f, f the log-probabilities of a small model that knows nothing but the activations of
the unintended features, and is used without f. What f explains the head need not learn; the texts that f gets wrong
count most. Unlike the two terms on the weights it reaches what is spread over the whole text, such as a topic, because
it asks what the features say together. No group label is needed.

f is told out of fold: each text by a model that was not trained on it, or f would explain the training set by heart.

Shapes: N texts (or pairs), U unintended features, L labels.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import Task

if TYPE_CHECKING:
    from selfreg.classifier.modeling import RegularizedSequenceClassifier
    from selfreg.classifier.training_args import RegularizedTrainingArguments

logger = logging.getLogger(__name__)

COMPONENTS = 10
_FOLDS = 5
# Of a probability: features that tell a label perfectly would set it aside altogether.
_LEAST = 1e-6
_STRENGTHS = (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3)

_Matrix = NDArray[np.float64]


def offsets_of(
    task: Task, states: PooledStates, num_labels: int, mask: Tensor | None = None, *, seed: int = 0
) -> Tensor:
    """`unintended_offsets` in the shape of a head's logits, 0 for labels without texts.

    Args:
        task, states, seed: see there.
        num_labels: outputs of the head.
        mask (`[L, U]`, *optional*): for which labels each feature is unintended. Those count that are so for all: what
            is a reason for some may be learned.
    """
    if mask is not None:
        states = replace(states, activations=states.activations[..., mask.all(dim=0)])
    offsets = unintended_offsets(task, states, seed=seed)
    return F.pad(offsets, (0, num_labels - offsets.shape[1])) if task == "single_label" else offsets


def with_offsets(
    model: "RegularizedSequenceClassifier", args: "RegularizedTrainingArguments", states: PooledStates
) -> PooledStates:
    """States with what the features alone say of them, unless they bring their own offsets."""
    if not (args.offset_weight and model.config.num_unintended) or states.offsets is not None:
        return states
    offsets = offsets_of(model.task, states, model.score.out_features, model.unintended_mask, seed=args.seed)
    return replace(states, offsets=args.offset_weight * offsets)


def unintended_offsets(task: Task, states: PooledStates, *, seed: int = 0) -> Tensor:
    """f of every training text, in the shape of its logits.

    The activations, at unit variance, are reduced to their first `COMPONENTS` principal components: with as many
    features as there are, a model of all of them learns by heart. On these a logistic regression (ridge, for
    regression) is fitted, its strength chosen by the loss on what it has not seen.

    Args:
        task: which one.
        states: the training set.
        seed: of the folds.

    Returns:
        `single_label` `[N, L]` log-probabilities and `multi_label` `[N, L]` log odds, both less those of the label
        alone, which the head's bias is for; L up to the last label that occurs. `regression` `[N, 1]`: prediction less
        the mean; pairs `[N, 2]`: the log odds of the chosen side and 0.
    """
    z_NK = _components(states.compared[1].double().numpy(), symmetric=task == "preference")
    labels = states.labels.numpy()
    few = task in ("regression", "preference") and len(labels) < _FOLDS
    if few:
        logger.warning("nothing is set aside: %d training texts are fewer than %d", len(labels), _FOLDS)
    if z_NK.shape[1] == 0 or few:
        columns = {"single_label": int(labels.max(initial=0)) + 1, "multi_label": labels.shape[-1], "preference": 2}
        return torch.zeros(len(labels), columns.get(task, 1))
    if task == "single_label":
        offsets = _of_labels(z_NK, labels, seed)
    elif task == "multi_label":
        offsets = np.stack([_of_two(z_NK, labels[:, y].astype(int), seed) for y in range(labels.shape[1])], axis=1)
    elif task == "regression":
        offsets = _of_numbers(z_NK, labels, seed)[:, None]
    else:
        offsets = np.stack([_of_pairs(z_NK, seed), np.zeros(len(labels))], axis=1)
    return torch.from_numpy(offsets).float()


def _components(activations_NU: _Matrix, *, symmetric: bool) -> _Matrix:
    """`symmetric`: of differences, which have no mean: either side could stand first."""
    from sklearn.decomposition import PCA

    count = len(activations_NU)
    values_MU = np.concatenate([activations_NU, -activations_NU]) if symmetric else activations_NU
    spread_U = values_MU.std(axis=0)
    alive_U = spread_U > 1e-9 * np.abs(values_MU).max(axis=0, initial=0.0)
    if not alive_U.any():
        return np.zeros((count, 0))
    standard_MU = (values_MU[:, alive_U] - values_MU[:, alive_U].mean(axis=0)) / spread_U[alive_U]
    size = min(COMPONENTS, *standard_MU.shape)
    return np.asarray(PCA(size, whiten=True, svd_solver="full").fit_transform(standard_MU))[:count]


def _of_labels(z_NK: _Matrix, labels_N: NDArray[np.int64], seed: int) -> _Matrix:
    """log p(label | features) - log p(label), `[N, L]`. Nothing is said of labels with fewer texts than folds, nor of
    their texts."""
    counts_L = np.bincount(labels_N)
    rare = [f"{label} ({counts_L[label]})" for label in np.flatnonzero((counts_L > 0) & (counts_L < _FOLDS))]
    if rare:
        logger.warning(
            "nothing is set aside for labels with fewer than %d training texts: %s", _FOLDS, ", ".join(rare)
        )
    told_N = counts_L[labels_N] >= _FOLDS
    offsets = np.zeros((len(labels_N), len(counts_L)))
    present = np.unique(labels_N[told_N])
    if len(present) > 1:
        log_p = _log_probabilities(z_NK[told_N], labels_N[told_N], seed)
        log_shares = np.log(counts_L[present] / told_N.sum())
        offsets[np.ix_(told_N, present)] = log_p - log_shares
    return offsets


def _log_probabilities(z_NK: _Matrix, labels_N: NDArray[np.int64], seed: int) -> _Matrix:
    """Of the labels there are, out of fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    codes_N = np.unique(labels_N, return_inverse=True)[1]
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    predictions = [
        np.asarray(
            cross_val_predict(
                LogisticRegression(C=1 / (strength * len(z_NK))), z_NK, codes_N, cv=folds, method="predict_proba"
            )
        )
        for strength in _STRENGTHS
    ]
    logs = [np.log(np.maximum(p, _LEAST)) for p in predictions]
    return max(logs, key=lambda log_p: float(log_p[np.arange(len(codes_N)), codes_N].mean()))


def _of_two(z_NK: _Matrix, there_N: NDArray[np.int64], seed: int) -> _Matrix:
    if np.bincount(there_N, minlength=2).min() < _FOLDS:
        # Nothing can be told of a label that (nearly) all texts have, or none.
        return np.zeros(len(there_N))
    offsets = _of_labels(z_NK, there_N, seed)
    return np.asarray(offsets[:, 1] - offsets[:, 0])


def attribute_offsets(labels: Sequence[int], attribute: Sequence[Any], num_labels: int) -> Tensor:
    """The same where the attribute itself is known of the training texts: log p(label | value) - log p(label).

    By the counts of the other texts, half a text added to each; 0 for texts whose attribute is not known.

    Args:
        labels (`[N]`): class ids.
        attribute (`[N]`): None where it is not known.
        num_labels: L.

    Returns:
        `[N, L]`.
    """
    prior = np.full(num_labels, 0.5)
    np.add.at(prior, np.asarray(labels), 1)
    counts: dict[str, NDArray[np.float64]] = {}
    for label, value in zip(labels, attribute, strict=True):
        if value is not None:
            counts.setdefault(str(value), np.full(num_labels, 0.5))[label] += 1
    rows = np.zeros((len(labels), num_labels))
    for row, (label, value) in enumerate(zip(labels, attribute, strict=True)):
        if value is not None:
            # Without the text itself: of a value that comes once, its own label would be told by heart.
            others = counts[str(value)].copy()
            others[label] -= 1
            rows[row] = np.log(others / others.sum()) - np.log(prior / prior.sum())
    return torch.from_numpy(rows).float()


def _of_pairs(z_NK: _Matrix, seed: int) -> _Matrix:
    """Of differences, whose sign is the label: without an intercept, from either order of the sides."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold

    predictions = []
    for strength in _STRENGTHS:
        odds_N = np.empty(len(z_NK))
        for train, held_out in KFold(_FOLDS, shuffle=True, random_state=seed).split(z_NK):
            both = np.concatenate([z_NK[train], -z_NK[train]])
            sides = np.repeat([1, 0], len(train))
            model = LogisticRegression(C=1 / (strength * len(both)), fit_intercept=False).fit(both, sides)
            odds_N[held_out] = model.decision_function(z_NK[held_out])
        predictions.append(odds_N)
    return min(predictions, key=lambda odds_N: float(np.logaddexp(0, -odds_N).mean()))


def _of_numbers(z_NK: _Matrix, targets_N: Any, seed: int) -> _Matrix:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, cross_val_predict

    targets_N = np.asarray(targets_N, dtype=np.float64)
    folds = KFold(_FOLDS, shuffle=True, random_state=seed)
    predictions = [
        np.asarray(cross_val_predict(Ridge(alpha=strength * len(z_NK)), z_NK, targets_N, cv=folds))
        for strength in _STRENGTHS
    ]
    best = min(predictions, key=lambda found: float(((found - targets_N) ** 2).mean()))
    return np.asarray(best - targets_N.mean())
