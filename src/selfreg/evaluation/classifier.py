"""The figures of a trained classifier on a set of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from selfreg.activations.conversation import render_pair
from selfreg.classifier.assembly import label_mask
from selfreg.classifier.baselines import FittedHead
from selfreg.classifier.lora import adapter_off
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import Task, indicator
from selfreg.evaluation.arrays import IntArray
from selfreg.evaluation.metrics import evaluate_predictions, group_cells
from selfreg.evaluation.tasks import evaluate_multi_label, evaluate_pairs, evaluate_regression, regression_cells
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


def figure_names(task: str) -> tuple[str, ...]:
    """The figures of a task; those that do not apply are None, but there."""
    return (*FIGURES, "r2", "mae") if task == "regression" else FIGURES


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

    The dependence of a classifier with an adapter is that on the features as they were found, in the states of the
    backbone without it; the texts are run through the backbone twice. Once the adapter is merged there are only the
    adapted states to read them from.

    Args:
        model: the classifier.
        dataset: rows with the texts, the labels (class ids, or names in `model.config.label2id`; for `multi_label` a
            list of names, or of 0 and 1) and the groups; for `preference` rows with `chosen`, `rejected` and `prompt`.
        text, label: names of the columns.
        group: name of the column of groups; None leaves the group figures out.
        unintended: what use and dependence are measured against; the classifier's own features if None. Classifiers
            that are compared need the same, and one without features (the plain one) has none of its own.

    Returns:
        `accuracy`, `f1`, `auc`, `worst_group_accuracy`, `group_gap`, `leakage`, `unintended_use`,
        `unintended_dependence`; None where a figure does not apply. For `regression` also `r2` and `mae`.

    Raises:
        TypeError: the classifier is none of selfreg's own; docs/figures.md says how others are measured.
        ValueError: a column is missing, or a label is not one of the classifier's.
    """
    if not isinstance(model, RegularizedSequenceClassifier):
        raise TypeError(
            f"evaluate_classifier measures a RegularizedSequenceClassifier, not a {type(model).__name__}: for a model "
            "of transformers take the metrics of selfreg.evaluation.hf_metrics (an example is in docs/figures.md)"
        )
    pairs = model.task == "preference"
    for column in (*(("chosen", "rejected") if pairs else (text, label)), *([group] if group else [])):
        if column not in dataset[0]:
            raise ValueError(f"there is no column {column!r}; the rows have {', '.join(dataset[0])}")
    features = model.unintended if unintended is None else unintended
    if pairs:
        if model.tokenizer is None:
            raise ValueError("the classifier has no tokenizer: load it with from_pretrained, or set model.tokenizer")
        sides = [render_pair(model.tokenizer, row, model.config.template) for row in dataset]
        texts, labels = [side for pair in sides for side in pair], None
    else:
        texts, labels = [row[text] for row in dataset], [_label(row[label], model) for row in dataset]
    states = model.pooled_states(texts, labels, activations_of=features)
    if model.config.adapter:
        # The features were found, and judged, in the states of the backbone as it was.
        with adapter_off(model.backbone):
            found = model.pooled_states(texts, labels, activations_of=features)
        states = replace(states, activations=found.activations)
    head = FittedHead("classifier", model, lambda pooled: pooled, [])
    return evaluate_head(head, states, features, [row[group] for row in dataset] if group else None)[0]


def _label(value: Any, model: RegularizedSequenceClassifier) -> Any:
    """A label of the data as `pooled_states` takes it."""
    label2id: Any = model.config.label2id or {}
    if model.task == "regression":
        return value
    if model.task == "multi_label":
        if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(own, str) for own in value):
            names = [name for _, name in sorted((model.config.id2label or {}).items())]
            return indicator(value, names, "the classifier's labels")
        return value
    if isinstance(value, str) and value not in label2id:
        raise ValueError(f"label {value!r} is none of the classifier's: {', '.join(label2id)}")
    if not isinstance(value, str) and label2id.get(str(value), value) != value:
        raise ValueError(
            f"label {value!r} may be the class id {value} or the label named {str(value)!r} (class id "
            f"{label2id[str(value)]}): give the labels as strings, or the class ids of labels that aren't numbers"
        )
    return label2id[value] if isinstance(value, str) else int(value)


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
    names: dict[int, str] = {int(i): str(name) for i, name in (head.model.config.id2label or {}).items()}
    seen = {"pooled": head.states(states).double().numpy(), "weight": head.weight.double().numpy()}
    return evaluate_logits(head.model.task, head.logits(states), states, unintended, groups, names, **seen)


def evaluate_logits(
    task: Task,
    logits_of_texts: Tensor,
    states: PooledStates,
    unintended: UnintendedFeatures,
    groups: Sequence[Any] | None,
    names: Mapping[int, str],
    **seen: Any,
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """The same of any method that gives logits; without `pooled` and `weight` (`seen`) no `unintended_use`."""
    logits, labels = logits_of_texts.double().numpy(), states.labels.numpy()
    of_text = list(groups) if groups is not None else None
    reliance: dict[str, Any] = {}
    if len(unintended) > 0:
        reliance = {
            **seen,
            "directions": unintended.decoder_directions.double().numpy(),
            "activations": states.compared[1].double().numpy(),
        }
    mask = label_mask(unintended.labels, [names[i] for i in sorted(names)])
    if task == "preference":
        figures = evaluate_pairs(logits, of_text, **reliance)
        right = (logits[:, 0] > logits[:, 1]).astype(int)
        cells = _cells(right, labels + 1, of_text, {1: "chosen"})
    elif task == "regression":
        figures = evaluate_regression(logits[:, 0], labels, of_text, **reliance)
        cells = [] if of_text is None else list[dict[str, Any]](regression_cells(logits[:, 0], labels, of_text))
    elif task == "multi_label":
        figures = evaluate_multi_label(logits, labels, of_text, mask=mask, **reliance)
        cells = []
        for y, name in names.items():
            own = labels[:, y].astype(int)
            cells += _cells((logits[:, y] > 0).astype(int), own, of_text, {0: f"not {name}", 1: name})
    else:
        figures = evaluate_predictions(logits=logits, labels=labels, groups=of_text, mask=mask, **reliance)
        cells = _cells(logits.argmax(axis=1), labels, of_text, names)
    return figures, cells


def _cells(
    predictions: IntArray, labels: IntArray, groups: list[Any] | None, names: Mapping[int, str]
) -> list[dict[str, Any]]:
    if groups is None:
        return []
    return [
        {**cell, "label": names.get(cell["label"], str(cell["label"]))}
        for cell in group_cells(predictions, labels, groups)
    ]
