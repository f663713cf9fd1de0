"""TextSet: the texts of a task with what is known of each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from selfreg.activations.conversation import render_pair
from selfreg.classifier.tasks import Task
from selfreg.utils.files import fingerprint_json, fingerprint_strings

_QUANTILES = 5


@dataclass(frozen=True)
class TextSet:
    """N texts, or N pairs of texts, with their labels.

    Attributes:
        name (`str`): name of the set.
        texts (`list[str]`): the texts; for `preference` the JSON of each pair's `chosen`, `rejected` and `prompt`.
        labels (`list`): class ids; for `multi_label` rows of 0 and 1; for `regression` numbers; for pairs zeros.
        groups (`list`, *optional*): the group of each text (or pair), None where it is not known.
        attribute (`list`, *optional*): what features are chosen by; training set only.
        weights (`list[float]`, *optional*): weight of each in the loss; training set only.
        margins (`list[float]`, *optional*): of pairs: by how much the chosen side should win at least.
        task (`str`): which task they are of.
    """

    name: str
    texts: list[str]
    labels: list[Any]
    groups: list[Any] | None
    attribute: list[Any] | None
    weights: list[float] | None = None
    margins: list[float] | None = None
    task: Task = "single_label"

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> "TextSet":
        """The rows `rows`."""
        chosen: dict[str, Any] = {
            field.name: [values[i] for i in rows]
            for field in fields(self)
            if isinstance(values := getattr(self, field.name), list)
        }
        return replace(self, **chosen)

    def fingerprint(self) -> str:
        """Of all that is in it."""
        columns = [self.labels, self.groups, self.attribute]
        columns += [values for values in (self.weights, self.margins) if values is not None]
        return fingerprint_strings([fingerprint_strings(self.texts), fingerprint_json(columns)])

    def prompts(self, tokenizer: Any, template: str | None) -> list[str]:
        """What the backbone reads: the texts; of pairs both sides one after the other, the chosen one first.

        Args:
            tokenizer: gives the tokenizer that pairs are written with; called only for pairs.
            template: see `render_pair`.
        """
        if self.task != "preference":
            return self.texts
        writer = tokenizer()
        return [side for text in self.texts for side in render_pair(writer, json.loads(text), template)]

    def strata(self) -> list[Any]:
        """What stands for "texts of the same label": the label; the set of labels; the fifth of the targets."""
        if self.task == "multi_label":
            return [str(row) for row in self.labels]
        if self.task == "regression":
            edges = np.quantile(self.labels, np.linspace(0, 1, _QUANTILES + 1)[1:-1])
            fifths: list[int] = np.searchsorted(edges, self.labels).tolist()
            return fifths
        return self.labels

    def of_texts(self, names: Sequence[str]) -> tuple[list[str] | None, list[Any] | None]:
        """Label and group of every text that the backbone reads, for a reader of the catalogue; None for no labels."""
        if self.task == "preference":
            groups = None if self.groups is None else [group for group in self.groups for _ in range(2)]
            return ["chosen", "rejected"] * len(self), groups
        if self.task == "regression":
            return None, self.groups
        if self.task == "multi_label":
            return [_joined(row, names) for row in self.labels], self.groups
        return [names[label] for label in self.labels], self.groups


def _joined(row: Sequence[int], names: Sequence[str]) -> str:
    return " + ".join(name for name, there in zip(names, row, strict=True) if there) or "none"
