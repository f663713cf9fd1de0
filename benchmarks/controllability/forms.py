"""Forms of the dependence term: what a head's scores must not move with, within a label.

selfreg's own are the largest activations of each unintended feature, every feature by itself. The others are for the
ablation: each gives columns that stand in the place of those activations, of which the term is then made as always.

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
# Of the mean loss of a text: C = 1 / (ridge · N).
_RIDGE = 0.01


def means(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """Mean activations instead of the largest, `[N, U]`."""
    return mean_NU


def components(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """The first principal components of the activations within a label, `[N, COMPONENTS]`."""
    left = residuals(states.activations, held_constant("single_label", states.labels))
    spread = left.pow(2).mean(dim=0).sqrt()
    standard = left[:, spread > 0] / spread[spread > 0]
    size = min(COMPONENTS, *standard.shape)
    return torch.from_numpy(PCA(size, svd_solver="full").fit_transform(standard.numpy()))


def composite(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """One column a group: its log odds as the features tell it, each text by a model that has not seen it."""
    return _told(states, groups, lambda model, x, y: cross_val_predict(model, x, y, cv=_folds(), method=_METHOD))


def composite_in_sample(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """The same, by one model that has seen them all."""
    return _told(states, groups, lambda model, x, y: model.fit(x, y).decision_function(x))


def group(states: PooledStates, mean_NU: Tensor, groups: Sequence[Any]) -> Tensor:
    """The group itself: one column a group, 1 where a text is of it."""
    return torch.tensor([[float(own == value) for value in _values(groups)] for own in groups])


FORMS: dict[str, Callable[[PooledStates, Tensor, Sequence[Any]], Tensor]] = {
    "dependence_means": means,
    "dependence_components": components,
    "dependence_composite": composite,
    "dependence_composite_in_sample": composite_in_sample,
    "dependence_group": group,
}
"""Ablations by name."""
_METHOD = "decision_function"


def _folds() -> StratifiedKFold:
    return StratifiedKFold(_FOLDS, shuffle=True, random_state=0)


def _values(groups: Sequence[Any]) -> list[Any]:
    return sorted({own for own in groups if own is not None}, key=str)


def _told(states: PooledStates, groups: Sequence[Any], tell: Callable[..., Any]) -> Tensor:
    """Columns of what `tell` makes of each group against the rest; 0 for texts of unknown group."""
    known = np.array([own is not None for own in groups])
    activations = states.activations.double().numpy()[known]
    columns = np.zeros((len(groups), len(_values(groups))))
    for column, value in enumerate(_values(groups)):
        is_value = np.array([own == value for own in groups])[known]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (_RIDGE * len(is_value)), max_iter=1_000))
        columns[known, column] = tell(model, activations, is_value)
    return torch.from_numpy(columns)
