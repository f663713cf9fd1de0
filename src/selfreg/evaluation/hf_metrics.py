"""selfreg's own figures as metrics of Hugging Face's `evaluate`, one class each.

They are what `evaluate.load` gives: `compute` in one call or after `add` and `add_batch`, `evaluate.combine`, several
processes. They read nothing from the Hub, and the values are those of the functions of the same names in
`selfreg.evaluation.metrics` and `selfreg.evaluation.reliance`; accuracy, F1 and AUC are evaluate's own.

Which combine: `WorstGroupAccuracy` and `GroupGap` take class ids as `predictions`, as evaluate's accuracy and F1 do;
`Leakage` and `UnintendedDependence` take logits. `UnintendedUse` looks at neither and combines with all. Beside
metrics from elsewhere, add the texts first: `combined.compute(predictions=…, groups=…)` hands the groups to the other
metrics too, which don't know them, where `combined.add_batch(…)` gives each metric the columns that it declares.
"""

import json
from collections.abc import Iterable
from typing import Any, ClassVar

import evaluate
import numpy as np
import numpy.typing as npt
from datasets import Features, List, Value

from selfreg.evaluation.arrays import group_name
from selfreg.evaluation.metrics import group_gap, leakage, worst_group_accuracy
from selfreg.evaluation.reliance import FOLDS, unintended_dependence, unintended_use

__all__ = ["GroupGap", "Leakage", "UnintendedDependence", "UnintendedUse", "WorstGroupAccuracy"]

_CITATION = """\
@inproceedings{wu2025selfregularization,
  title     = {Self-Regularization with Latent Space Explanations for Controllable LLM-based Classification},
  author    = {Wu, Xuansheng and Yu, Wenhao and Zhai, Xiaoming and Liu, Ninghao},
  booktitle = {Proceedings of the 31st ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year      = {2025},
  url       = {https://arxiv.org/abs/2502.14133}
}
"""

_CODE = "https://github.com/selfreg/selfreg"

_CLASS_IDS = Value("int64")
_ROW_OF_FLOATS = List(Value("float64"))
_GROUPS = Value("string")
"""Arrow columns have one type, groups are names, whole numbers or None: they are stored as JSON."""

_OF_THE_OTHERS = frozenset({"groups", "activations", "pooled", "weight", "directions", "folds", "seed"})
"""What `evaluate.combine` may hand to a figure that has no use for it, as another one has."""


class _Figure(evaluate.Metric):
    columns: ClassVar[Features]
    """What is given for each text."""

    def add_batch(self, **batch: Any) -> None:
        """Adds texts: one value a text in each column."""
        super().add_batch(**batch | {name: self._encoded(name, batch.get(name)) for name in self.columns})

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """Adds one text."""
        given = {"predictions": prediction, "references": reference, **columns}
        self.add_batch(**{name: [value] for name, value in given.items()})

    def _encoded(self, name: str, column: Any) -> Any:
        """What evaluate stores of a column, after the checks that it doesn't make."""
        if column is None:
            raise ValueError(f"{self.name} needs {name}: pass {', '.join(self.columns)}, one value a text in each")
        if self.columns[name] == _GROUPS:
            values = np.asarray(column, dtype=object)
            if values.ndim != 1:
                raise ValueError(f"groups must have one entry a text, got {column!r}: pass a list")
            return [json.dumps(group_name(group)) for group in values]
        if self.columns[name] == _CLASS_IDS and len(column) and np.asarray(column).dtype.kind not in "biu":
            # evaluate would cut a probability of 0.9 down to class 0
            raise ValueError(f"{name} must be integers, got {np.asarray(column).dtype}: pass class ids, from 0")
        return column

    def _info_of(self, *, description: str, inputs: str) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=description,
            citation=_CITATION,
            inputs_description=inputs,
            features=self.columns,
            codebase_urls=[_CODE],
            reference_urls=["https://arxiv.org/abs/2502.14133"],
            license="Apache-2.0",
        )

    def _refuse_unknown(self, options: Iterable[str]) -> None:
        unknown = sorted(set(options) - _OF_THE_OTHERS)
        if unknown:
            raise TypeError(f"{self.name} does not know {', '.join(unknown)}: its columns are {list(self.columns)}")


def _decoded(groups: Iterable[str]) -> list[str | int | None]:
    return [json.loads(group) for group in groups]


class WorstGroupAccuracy(_Figure):
    """`selfreg.evaluation.metrics.worst_group_accuracy`."""

    columns = Features({"predictions": _CLASS_IDS, "references": _CLASS_IDS, "groups": _GROUPS})

    def _info(self) -> evaluate.MetricInfo:
        return self._info_of(
            description="""\
Worst-group accuracy: the smallest accuracy over the cells of one true label and one group that hold 10 texts or more.
A classifier that leans on a shortcut is right on average, and wrong in the cells where the shortcut points elsewhere.
""",
            inputs="""
Args:
    predictions: class ids, one a text.
    references: true class ids, one a text.
    groups: the group of each text, a name or a whole number; None where it is not known (the text is left out).

Returns:
    worst_group_accuracy: 0 to 1, higher is better; None where no cell holds 10 texts.

Examples:
    >>> from selfreg.evaluation.hf_metrics import WorstGroupAccuracy
    >>> references = [0] * 20 + [1] * 20
    >>> groups = (["women"] * 10 + ["men"] * 10) * 2
    >>> predictions = [0] * 20 + [1] * 14 + [0] * 6
    >>> WorstGroupAccuracy().compute(predictions=predictions, references=references, groups=groups)
    {'worst_group_accuracy': 0.4}
""",
        )

    def _compute(
        self, *, predictions: list[int], references: list[int], groups: list[str], **others: Any
    ) -> dict[str, float | None]:
        self._refuse_unknown(others)
        return {"worst_group_accuracy": worst_group_accuracy(predictions, references, _decoded(groups))}


class GroupGap(_Figure):
    """`selfreg.evaluation.metrics.group_gap`."""

    columns = Features({"predictions": _CLASS_IDS, "references": _CLASS_IDS, "groups": _GROUPS})

    def _info(self) -> evaluate.MetricInfo:
        return self._info_of(
            description="""\
Group gap: fairlearn's equalized odds difference, for any number of labels. For each label, among the texts whose true
label it is and among those whose true label is another: the largest less the smallest share, over groups, of texts
that are predicted as that label. The largest of these gaps counts. A group without texts of a true label is left out
of that comparison.
""",
            inputs="""
Args:
    predictions: class ids, one a text.
    references: true class ids, one a text.
    groups: the group of each text, a name or a whole number; None where it is not known (the text is left out).

Returns:
    group_gap: 0 (groups are treated alike) to 1; None where no two groups can be compared.

Examples:
    >>> from selfreg.evaluation.hf_metrics import GroupGap
    >>> references = [0, 0, 0, 0, 1, 1, 1, 1]
    >>> groups = ["women", "women", "men", "men"] * 2
    >>> predictions = [0, 0, 0, 0, 1, 1, 1, 0]
    >>> GroupGap().compute(predictions=predictions, references=references, groups=groups)
    {'group_gap': 0.5}
""",
        )

    def _compute(
        self, *, predictions: list[int], references: list[int], groups: list[str], **others: Any
    ) -> dict[str, float | None]:
        self._refuse_unknown(others)
        return {"group_gap": group_gap(predictions, references, _decoded(groups))}


class Leakage(_Figure):
    """`selfreg.evaluation.metrics.leakage`."""

    columns = Features({"predictions": _ROW_OF_FLOATS, "references": _CLASS_IDS, "groups": _GROUPS})

    def _info(self) -> evaluate.MetricInfo:
        return self._info_of(
            description="""\
Leakage: how well a classifier's score tells the group among texts of the same true label. It is 2·|AUC − 0.5| of the
log odds of the true label, for telling one group from the others, averaged over labels and groups with the smaller
side as the weight.
""",
            inputs="""
Args:
    predictions: logits, one row a text, one column a label.
    references: true class ids, one a text.
    groups: the group of each text, a name or a whole number; None where it is not known (the text is left out).

Returns:
    leakage: 0 (the score says nothing of the group) to 1 (the group can be read off it); None where no true label has
        texts of two groups.

Examples:
    >>> from selfreg.evaluation.hf_metrics import Leakage
    >>> logits = [[0.0, 2.0], [0.0, 0.5], [0.0, 1.5], [0.0, 0.2]]
    >>> Leakage().compute(predictions=logits, references=[1, 1, 1, 1], groups=["women", "women", "men", "men"])
    {'leakage': 0.5}
""",
        )

    def _compute(
        self, *, predictions: list[list[float]], references: list[int], groups: list[str], **others: Any
    ) -> dict[str, float | None]:
        self._refuse_unknown(others)
        return {"leakage": leakage(predictions, references, _decoded(groups))}


class UnintendedUse(_Figure):
    """`selfreg.evaluation.reliance.unintended_use`."""

    columns = Features({"pooled": _ROW_OF_FLOATS})

    def _info(self) -> evaluate.MetricInfo:
        return self._info_of(
            description="""\
Unintended use: the share of the variance of a linear classifier's logit margin that comes through the span of the
features it must not use. It is Var(w · P h) / Var(w · h) over the texts, averaged over logits, with h the pooled
hidden states, w the weights centred over labels, and P the projector on the span of the features' decoder directions.
""",
            inputs="""
Args:
    pooled: pooled hidden states as the head sees them, one row a text.
    weight: weights of the head, one row a label, in the space of `pooled`; an option of `compute`.
    directions: decoder directions of the unintended features, one row a feature; an option of `compute`.

Returns:
    unintended_use: 0 (nothing goes through them) or more, lower is better. 1 where all does; above 1 where the parts
        inside and outside the span cancel one another.

Examples:
    >>> from selfreg.evaluation.hf_metrics import UnintendedUse
    >>> pooled = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    >>> UnintendedUse().compute(pooled=pooled, weight=[[0.0, 0.0], [2.0, 2.0]], directions=[[1.0, 0.0]])
    {'unintended_use': 0.5}
""",
        )

    def _compute(
        self, *, pooled: list[list[float]], weight: npt.ArrayLike, directions: npt.ArrayLike, **others: Any
    ) -> dict[str, float]:
        self._refuse_unknown(others)
        return {"unintended_use": unintended_use(pooled, weight, directions)}


class UnintendedDependence(_Figure):
    """`selfreg.evaluation.reliance.unintended_dependence`."""

    columns = Features({"predictions": _ROW_OF_FLOATS, "references": _CLASS_IDS, "activations": _ROW_OF_FLOATS})

    def _info(self) -> evaluate.MetricInfo:
        return self._info_of(
            description="""\
Unintended dependence: how much of what varies in a classifier's logits, among texts of the same true label, the
activations of the features it must not use predict. It is the cross-validated R² of a ridge regression, floored at 0,
averaged over logits. Unlike unintended use it sees reliance through directions that are merely correlated with the
features, and needs no access to the classifier's weights.
""",
            inputs="""
Args:
    predictions: logits, one row a text, one column a label.
    references: true class ids, one a text.
    activations: largest activation of each unintended feature in each text, one row a text.
    folds: parts that the texts are dealt into, 2 or more, at most one a text (default 5); an option of `compute`.
    seed: of the deal (default 0); an option of `compute`.

Returns:
    unintended_dependence: 0 (the features predict nothing) to 1 (they predict all), lower is better.

Examples:
    >>> from selfreg.evaluation.hf_metrics import UnintendedDependence
    >>> activations = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]
    >>> logits = [[0.0, 2.0 * row[0] + 1.0] for row in activations]
    >>> metric = UnintendedDependence()
    >>> result = metric.compute(predictions=logits, references=[1] * 6, activations=activations)
    >>> round(result["unintended_dependence"], 3)
    1.0
""",
        )

    def _compute(
        self,
        *,
        predictions: list[list[float]],
        references: list[int],
        activations: list[list[float]],
        folds: int = FOLDS,
        seed: int = 0,
        **others: Any,
    ) -> dict[str, float]:
        self._refuse_unknown(others)
        value = unintended_dependence(predictions, references, activations, folds=folds, seed=seed)
        return {"unintended_dependence": value}
