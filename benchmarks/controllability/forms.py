"""Forms of the dependence term: what a head's scores must not move with, within a label.

selfreg's own are the largest activations of each unintended feature, every feature by itself. The others are for the
ablation: each gives columns that stand in the place of those activations, of which the term is then made as always. It
is a mean over columns, so that with fewer of them each weighs more at the same `dependence_weight`.

Shapes: N texts, U unintended features, M columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import held_constant, residuals

COMPONENTS = 10
_FOLDS = 5
# Rounding leaves a column that is constant within the labels a spread of its own.
_ALIVE = 1e-9
# Of the mean loss of a text: C = 1 / (ridge · N).
_RIDGE = 0.01


def means(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """Mean activations instead of the largest, `[N, U]`."""
    return mean_NU


def components(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """The first principal components of the activations within a label, `[N, COMPONENTS]`."""
    left = residuals(states.activations, held_constant("single_label", states.labels))
    spread = left.pow(2).mean(dim=0).sqrt()
    alive = spread > _ALIVE * states.activations.double().abs().amax(dim=0)
    standard = left[:, alive] / spread[alive]
    size = min(COMPONENTS, *standard.shape)
    return torch.from_numpy(PCA(size, svd_solver="full").fit_transform(standard.numpy()))


def composite(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """One column a group: its log odds as the features tell it, each text by a model that has not seen it; the choice
    of the features has."""
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    return _told(
        states, groups, lambda model, x, y: cross_val_predict(model, x, y, cv=folds, method="decision_function")
    )


def composite_in_sample(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """The same, by one model that has seen them all."""
    return _told(states, groups, lambda model, x, y: model.fit(x, y).decision_function(x))


def group(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """The group itself: one column a group, 1 where a text is of it."""
    columns = np.array([[float(own == value) for value in _values(groups)] for own in groups])
    return _filled(columns, states, groups)


FORMS: dict[str, Callable[[PooledStates, Tensor, Sequence[Any]], Tensor]] = {
    "dependence_means": means,
    "dependence_components": components,
    "dependence_composite": composite,
    "dependence_composite_in_sample": composite_in_sample,
    "dependence_group": group,
}
"""Ablations by name."""


def _values(groups: Sequence[Any]) -> list[Any]:
    return sorted({own for own in groups if own is not None}, key=str)


def _told(states: PooledStates, groups: Sequence[Any], tell: Callable[..., Any]) -> Tensor:
    """Columns of what `tell` makes of each group against the rest."""
    known = np.array([own is not None for own in groups])
    activations = states.activations.double().numpy()[known]
    columns = np.zeros((len(groups), len(_values(groups))))
    for column, value in enumerate(_values(groups)):
        is_value = np.array([own == value for own in groups])[known]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (_RIDGE * len(is_value)), max_iter=1_000))
        columns[known, column] = tell(model, activations, is_value)
    return _filled(columns, states, groups)


def _filled(columns_NM: Any, states: PooledStates, groups: Sequence[Any]) -> Tensor:
    """Texts of unknown group get the mean of those of their label, with which they say nothing within it."""
    known, labels = np.array([own is not None for own in groups]), states.labels.numpy()
    filled = columns_NM.copy()
    for label in np.unique(labels[~known]):
        others = columns_NM[known & (labels == label)]
        filled[~known & (labels == label)] = others.mean(axis=0) if len(others) else 0.0
    return torch.from_numpy(filled)
