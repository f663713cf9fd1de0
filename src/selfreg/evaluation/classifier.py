"""The figures of a trained classifier on a set of texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from selfreg.classifier.baselines import FittedHead
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.states import PooledStates
from selfreg.evaluation.metrics import evaluate_predictions, group_cells
from selfreg.features.selection import UnintendedFeatures

FIGURES = (
    "accuracy",
    "f1",
    "auc",
    "worst_group_accuracy",
    "group_gap",
    "leakage",
    "unintended_use",
    "unintended_dependence",
)
"""The figures of one method on one set of texts, in the order of `metrics.json`."""


def evaluate_classifier(
    model: RegularizedSequenceClassifier,
    dataset: Sequence[Mapping[str, Any]],
    *,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    unintended: UnintendedFeatures | None = None,
) -> dict[str, float | None]:
    """Runs a classifier over texts and measures its scores, group gaps, unintended use and dependence.

    Args:
        model: the classifier.
        dataset: rows with the texts, the labels (class ids, or names in `model.config.label2id`) and the groups.
        text, label: names of the columns.
        group: name of the column of groups; None leaves the group figures out.
        unintended: what use and dependence are measured against; the classifier's own features if None. Classifiers
            that are compared need the same, and one without features (the plain one) has none of its own.

    Returns:
        `accuracy`, `f1`, `auc`, `worst_group_accuracy`, `group_gap`, `leakage`, `unintended_use`,
        `unintended_dependence`; None where a figure does not apply.

    Raises:
        ValueError: a column is missing, or a label is not one of the classifier's.
    """
    for column in (text, label, *([group] if group else [])):
        if column not in dataset[0]:
            raise ValueError(f"there is no column {column!r}; the rows have {', '.join(dataset[0])}")
    label2id = model.config.label2id or {}
    labels = []
    for row in dataset:
        value = row[label]
        if isinstance(value, str) and value not in label2id:
            raise ValueError(f"label {value!r} is none of the classifier's: {', '.join(label2id)}")
        if not isinstance(value, str) and label2id.get(str(value), value) != value:
            raise ValueError(
                f"label {value!r} may be the class id {value} or the label named {str(value)!r} (class id "
                f"{label2id[str(value)]}): give the labels as strings, or the class ids of labels that aren't numbers"
            )
        labels.append(label2id[value] if isinstance(value, str) else int(value))
    features = model.unintended if unintended is None else unintended
    states = model.pooled_states([row[text] for row in dataset], labels, activations_of=features)
    head = FittedHead("classifier", model, lambda pooled: pooled, [])
    return evaluate_head(head, states, features, [row[group] for row in dataset] if group else None)[0]


def evaluate_head(
    head: FittedHead, states: PooledStates, unintended: UnintendedFeatures, groups: Sequence[Any] | None
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Every figure of one head on one set of cached states.

    Args:
        head: the classifier.
        states: pooled states that it takes, with the activations of `unintended`.
        unintended: what use and dependence are measured against; the same for all methods of a table.
        groups: the group of each text, or None.

    Returns:
        the figures, and a row a (label, group) cell with its size, accuracy and interval.
    """
    logits = head.logits(states)
    chosen = len(unintended) > 0
    figures = evaluate_predictions(
        logits=logits.double().numpy(),
        labels=states.labels.numpy(),
        groups=list(groups) if groups is not None else None,
        pooled=head.states(states).double().numpy() if chosen else None,
        weight=head.weight.double().numpy() if chosen else None,
        directions=unintended.decoder_directions.double().numpy() if chosen else None,
        activations=states.activations.double().numpy() if chosen else None,
    )
    if groups is None:
        return figures, []
    names: dict[Any, str] = head.model.config.id2label or {}
    predictions = torch.argmax(logits, dim=1).numpy()
    cells = [
        {**cell, "label": names.get(cell["label"], str(cell["label"]))}
        for cell in group_cells(predictions, states.labels.numpy(), list(groups))
    ]
    return figures, cells
