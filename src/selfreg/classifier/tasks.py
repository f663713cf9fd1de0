"""The four tasks: what a target is, what the loss is, and what is held constant where dependence is measured.

Shapes: N texts (or pairs), L labels (logits).

| task           | logits            | labels            | loss (mean over texts)                                    |
|----------------|-------------------|-------------------|-----------------------------------------------------------|
| `single_label` | `[N, L]`          | `[N]`, int64      | cross-entropy                                             |
| `multi_label`  | `[N, L]`          | `[N, L]`, 0 or 1  | binary cross-entropy, mean over labels                    |
| `regression`   | `[N, 1]`          | `[N]`, float      | squared error, in units of the target's variance          |
| `preference`   | `[N, 2]`: a score | `[N]`, all 0: the | Bradley-Terry, -log σ(s_chosen - s_rejected - margin); or |
|                | for either side   | chosen side       | pointwise, binary cross-entropy of either side by itself  |
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Task = Literal["single_label", "multi_label", "regression", "preference"]
PreferenceLoss = Literal["bradley_terry", "pointwise"]

PROBLEM_TYPES: dict[str, str | None] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    # What transformers calls a model with one logit, as reward models are.
    "preference": "regression",
}
"""transformers' `problem_type` of each task."""


def num_logits(task: Task, num_labels: int) -> int:
    """Outputs of the head."""
    return num_labels if task in ("single_label", "multi_label") else 1


def task_loss(
    task: Task,
    logits: Tensor,
    labels: Tensor,
    *,
    sample_weights: Tensor | None = None,
    label_weights: Tensor | None = None,
    margins: Tensor | None = None,
    target_scale: Tensor | float = 1.0,
    preference_loss: PreferenceLoss = "bradley_terry",
    mean_weight: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The (weighted) mean loss of a batch; see the table at the top of this file.

    Args:
        task: which one.
        logits, labels: see the table.
        sample_weights (`[N]`, *optional*): weight of each text (or pair).
        label_weights (`[L]`, *optional*): weight of each label: of the texts that have it (`single_label`), or of its
            term (`multi_label`).
        margins (`[N]`, *optional*): by how much the chosen side should win at least (Bradley-Terry only).
        target_scale: standard deviation of the target (`regression`).
        preference_loss: of the two losses of `preference`.
        mean_weight: mean of the texts' weights over the whole training set. With it a text counts the same whatever
            else is in its batch; None: the weights are those of all texts there are.
        label_smoothing: this much of the target's probability is spread over all labels, over yes and no of each
            label (`multi_label`), or over both sides (`preference`); not for `regression`.
    """
    s = label_smoothing
    weights = torch.ones_like(logits[:, 0]) if sample_weights is None else sample_weights.to(logits)
    if task == "single_label":
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=s)
        if label_weights is not None:
            weights = weights * label_weights.to(logits)[labels]
    elif task == "multi_label":
        targets = (1 - s) * labels.to(logits) + s / 2
        each = _weighted(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), label_weights)
    elif task == "regression":
        each = ((logits[:, 0] - labels.to(logits)) / target_scale).pow(2)
    elif preference_loss == "bradley_terry":
        difference = logits[:, 0] - logits[:, 1]
        each = _surely(difference if margins is None else difference - margins.to(logits), s)
    else:
        each = (_surely(logits[:, 0], s) + _surely(-logits[:, 1], s)) / 2
    return weighted_mean(each, weights, mean_weight)


def squared_logits(task: Task, logits: Tensor, *, preference_loss: PreferenceLoss = "bradley_terry") -> Tensor:
    """How sure each text (or pair) is made to look, `[N]`: what a logit decay keeps small.

    The mean over labels of the squared logits, for `single_label` less their mean, which changes nothing; of pairs the
    square of the difference between the sides, or with `"pointwise"` the mean of both squares.

    Args:
        task: any but `regression`, whose outputs are no logits.
        logits: as for `task_loss`.
        preference_loss: of pairs.
    """
    if task == "single_label":
        logits = logits - logits.mean(dim=1, keepdim=True)
    elif task == "preference" and preference_loss == "bradley_terry":
        return (logits[:, 0] - logits[:, 1]).pow(2)
    return logits.pow(2).mean(dim=1)


def _surely(logits: Tensor, smoothing: float) -> Tensor:
    """Binary cross-entropy of logits whose target is 1 - smoothing / 2."""
    return F.softplus(-logits) + smoothing / 2 * logits


def weighted_mean(each: Tensor, weights: Tensor, mean_weight: float | None) -> Tensor:
    """Σ w l / Σ w; or Σ w l / (N · mean_weight) where the mean weight is known from elsewhere."""
    return (weights * each).sum() / (weights.sum() if mean_weight is None else len(each) * mean_weight)


def text_weights(task: Task, labels: Tensor, sample_weights: Tensor | None, label_weights: Tensor | None) -> Tensor:
    """What each text of a training set counts in the loss, `[N]`."""
    weights = torch.ones(len(labels), device=labels.device) if sample_weights is None else sample_weights.float()
    return weights * label_weights[labels] if task == "single_label" and label_weights is not None else weights


def _weighted(losses_NL: Tensor, label_weights: Tensor | None) -> Tensor:
    if label_weights is None:
        return losses_NL.mean(dim=1)
    return losses_NL @ label_weights.to(losses_NL) / label_weights.sum()


def held_constant(task: Task, labels: Tensor) -> Tensor:
    """What of the targets is held constant where reliance "within a label" is meant: `[N, P]`, float64.

    Residuals after a linear regression on these columns are, for a single label, the values centred within each label;
    for many labels and for a target on a scale the partial values; for pairs (differences between the sides, whose
    sign is the label) the values less their mean.
    """
    if task == "single_label":
        _, index = labels.unique(return_inverse=True)
        return F.one_hot(index).double()
    columns = torch.ones(len(labels), 1, dtype=torch.float64, device=labels.device)
    if task == "preference":
        return columns
    targets = labels.double()
    # No reshape by -1: a process may have no texts left in an epoch's last batch.
    return torch.cat([columns, targets.unsqueeze(1) if targets.ndim == 1 else targets.flatten(1)], dim=1)


def residuals(values: Tensor, constant: Tensor) -> Tensor:
    """What is left of `values` `[N, ...]` after a linear regression on `constant` `[N, P]`, in float64."""
    flat = values.double().flatten(1)
    basis, singular, _ = torch.linalg.svd(constant.double(), full_matrices=False)
    # Labels that always come together, or never, are no two columns.
    basis = basis[:, singular > 1e-9 * singular[0]]
    return (flat - basis @ (basis.T @ flat)).reshape(values.shape)


def as_targets(task: Task, values: Iterable[Any], num_labels: int, name: str) -> Tensor:
    """Labels as a tensor of the task's kind; `name` is what an error calls them.

    Raises:
        ValueError: a value is no class id, no row of 0 and 1, or no finite number; names the row.
    """
    rows = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if task == "single_label":
        return torch.tensor(class_ids(rows, num_labels, name), dtype=torch.long)
    if task == "multi_label":
        return torch.tensor([_indicator(row, num_labels, name, i) for i, row in enumerate(rows)]).float()
    if task == "regression":
        return torch.tensor([_number(row, name, i) for i, row in enumerate(rows)], dtype=torch.float32)
    return torch.zeros(len(rows), dtype=torch.long)


def _indicator(row: Any, num_labels: int, name: str, number: int) -> list[float]:
    values = row.tolist() if isinstance(row, Tensor | np.ndarray) else row
    is_row = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == num_labels
    if not is_row or any(value not in (0, 1) for value in values):
        raise ValueError(
            f"{name}: label {row!r} in row {number} must be {num_labels} values, 0 or 1, one a label, for multi_label"
        )
    return [float(value) for value in values]


def _number(value: Any, name: str, number: int) -> float:
    if isinstance(value, str | bytes) or value is None or not np.isfinite(float(value)):
        raise ValueError(f"{name}: label {value!r} in row {number} is no finite number, which regression needs")
    return float(value)


def indicator(own: Iterable[str], names: Sequence[str], where: str) -> list[int]:
    """Names of labels -> 0 and 1, one a label of `names`; `where` is what an error calls those.

    Raises:
        ValueError: a name that is not there.
    """
    given = set(own)
    unknown = sorted(given - set(names))
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is none of {where}: {', '.join(names)}")
    return [int(name in given) for name in names]


def class_ids(labels: Iterable[Any], num_labels: int, name: str) -> list[int]:
    """Labels as class ids; `name` is what the error calls them.

    Raises:
        ValueError: one is no whole number, or the model has no such label.
    """
    ids = []
    for row, label in enumerate(labels):
        is_id = isinstance(label, int | float | Tensor | np.generic) and float(label).is_integer()
        if not is_id or not 0 <= int(label) < num_labels:
            raise ValueError(
                f"{name}: label {label!r} in row {row} is no class id; the model has labels 0 to {num_labels - 1}"
                + (" (model.config.label2id maps names to them)" if isinstance(label, str) else "")
            )
        ids.append(int(label))
    return ids
