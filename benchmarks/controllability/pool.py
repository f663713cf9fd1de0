"""A pool of texts with labels and groups, and the rows of it that a seed trains on and measures on.

Ties between label and group are made by drawing rows, never by changing a text.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from selfreg.classifier.tasks import Task
from selfreg.utils.files import fingerprint_json, fingerprint_strings

TIE = 0.95
TIED = ("planted", "tie")
"""Kinds of data sets in which the label goes with the group."""
Cells = dict[tuple[int, Any], list[int]]
"""Rows by (label, group)."""


@dataclass(frozen=True)
class Corpus:
    """Texts that are run through the backbone once, whatever is learned from them.

    Attributes:
        name (`str`): names its files.
        texts (`list[str]`): the texts; of pairs the JSON of `prompt`, `chosen` and `rejected`.
        max_length (`int`): tokens of a text; of pairs, of a prompt.
        template (`str`, *optional*): prompt around each.
    """

    name: str
    texts: list[str]
    max_length: int = 128
    template: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of what the backbone reads."""
        return fingerprint_json([fingerprint_strings(self.texts), self.max_length, self.template])


@dataclass(frozen=True)
class Rows:
    """What one seed works on: rows of the pool.

    Attributes:
        train (`list[int]`): training texts.
        evals (`dict[str, list[int]]`): texts to measure on, by name: `test` first.
        balanced (`list[int]`, *optional*): as many training texts in which label and group have nothing to do with
            each other: for the ceiling.
    """

    train: list[int]
    evals: dict[str, list[int]]
    balanced: list[int] | None = None


@dataclass(frozen=True)
class Pool:
    """A data set of the benchmark.

    Attributes:
        name (`str`), about (`str`): for tables.
        corpus (`Corpus`): its texts.
        labels (`list[str]`): names of the labels; none for pairs.
        label (`list[int]`): of each text; zeros for pairs, -1 where a text is only there for other data sets.
        group (`list`): of each text, None where it is not known; for figures by group, LEACE and `attribute`.
        keywords (`tuple[str, ...]`): words that tell the unintended topic, for choosing without any group label.
        pool (`list[int]`): rows that some seed may train on: what the catalogue is built from.
        rows (`Callable`): seed -> `Rows`.
        instruction (`str`): what the labels mean, for prompting.
        task (`str`): single_label or preference.
        score (`str`): the figure that the task is about.
        folds (`int`): so many seeds in turn share a cross-validation: their eval texts are parts of one whole.
        partner (`list`, *optional*): of an edited text the row of the text that it was made from.
        kind (`str`): "task" (one of the three tasks), "tie" (resampled), "planted" or "found".
    """

    name: str
    about: str
    corpus: Corpus
    labels: list[str]
    label: list[int]
    group: list[Any]
    keywords: tuple[str, ...]
    pool: list[int]
    rows: Callable[[int], Rows]
    instruction: str
    task: Task = "single_label"
    score: Literal["accuracy", "f1"] = "accuracy"
    folds: int = 1
    partner: list[int | None] | None = None
    kind: Literal["task", "tie", "planted", "found"] = "tie"

    def __post_init__(self) -> None:
        for name in ("label", "group"):
            if len(getattr(self, name)) != len(self.corpus.texts):
                raise ValueError(
                    f"{self.name}: {len(getattr(self, name))} entries of {name} for {len(self.corpus.texts)} texts"
                )

    def cells(self, rows: Sequence[int]) -> Cells:
        """`rows` by (label, group), those of unknown group left out."""
        return cells_of(self.label, self.group, rows)


def generator(name: str, seed: int) -> np.random.Generator:
    """The same draws for the same name and seed, on any machine."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def cells_of(labels: Sequence[int], groups: Sequence[Any], rows: Sequence[int]) -> Cells:
    """`rows` by (label, group), those of unknown group left out."""
    cells: Cells = {}
    for row in rows:
        if groups[row] is not None:
            cells.setdefault((labels[row], groups[row]), []).append(row)
    return cells


def draw(rng: np.random.Generator, rows: Sequence[int], count: int, what: str) -> list[int]:
    """`count` of `rows`, none twice.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(rows):
        raise ValueError(f"{what}: {count} texts are wanted, and there are {len(rows)}: make the set smaller")
    return [rows[i] for i in rng.permutation(len(rows))[:count]]


def four_fifths(
    name: str, label: Sequence[int], group: Sequence[Any], train: list[int], evals: dict[str, list[int]]
) -> Callable[[int], Rows]:
    """Seed -> four fifths of `train` as they come, balanced ones from all of it, and always the same eval texts."""

    def of_seed(seed: int) -> Rows:
        rng = generator(name, seed)
        own = draw(rng, train, int(0.8 * len(train)), name)
        return Rows(own, evals, even(cells_of(label, group, train), len(own), rng))

    return of_seed


def dealt(rng: np.random.Generator, cells: Iterable[tuple[list[int], int]], what: str) -> tuple[list[int], list[int]]:
    """Rows to train on and to measure on, dealt anew: three fifths of every cell, and the others.

    Args:
        cells: rows of each cell, and how many to take at most.
    """
    train: list[int] = []
    test: list[int] = []
    for rows, most in cells:
        own = draw(rng, rows, min(len(rows), most), what)
        border = int(0.6 * len(own))
        train += own[:border]
        test += own[border:]
    return sorted(train), sorted(test)


def tied(
    cells: Cells, tie: Mapping[int, Any], size: int, rng: np.random.Generator, *, strength: float = TIE
) -> list[int]:
    """Rows in which each label has `strength` of its texts from one group and the others from the other groups.

    Args:
        cells: what to draw from.
        tie: label -> group; labels come in equal numbers.
        size: texts, about.
        rng: of the draw.
        strength: share of each label's texts that follow the tie.

    Raises:
        ValueError: a cell has too few.
    """
    each = size // len(tie)
    found: list[int] = []
    for label, group in tie.items():
        others = [row for (y, g), rows in cells.items() if y == label and g != group for row in rows]
        aligned = round(strength * each)
        found += draw(rng, cells.get((label, group), []), aligned, f"label {label}, group {group!r}")
        found += draw(rng, others, each - aligned, f"label {label}, groups other than {group!r}")
    return _shuffled(found, rng)


def even(cells: Cells, size: int, rng: np.random.Generator) -> list[int]:
    """About `size` rows, as many of every (label, group) cell; of small cells all.

    Raises:
        ValueError: a label has none of a group that others have.
    """
    groups = sorted({str(group) for _, group in cells})
    for label in sorted({label for label, _ in cells}):
        missing = set(groups) - {str(group) for y, group in cells if y == label}
        if missing:
            raise ValueError(f"label {label} has no text of group {missing.pop()!r}: nothing can be balanced")
    # Of a label that has few of one group, few of all: else the label would still tell the group.
    found = []
    for label in sorted({label for label, _ in cells}):
        own = {group: rows for (y, group), rows in cells.items() if y == label}
        each = min(size // len(cells), *(len(rows) for rows in own.values()))
        for group in sorted(own, key=str):
            found += draw(rng, own[group], each, f"label {label}, group {group!r}")
    return _shuffled(found, rng)


def folded(rows: Sequence[int], strata: Sequence[Any], folds: int, seed: int) -> tuple[list[int], list[int]]:
    """Train and test rows of fold `seed % folds` of the `seed // folds`-th stratified split."""
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed // folds)
    parts = list(splitter.split(np.zeros(len(rows)), [str(strata[row]) for row in rows]))
    train, test = parts[seed % folds]
    return [rows[i] for i in train], [rows[i] for i in test]


def _shuffled(rows: list[int], rng: np.random.Generator) -> list[int]:
    return [rows[i] for i in rng.permutation(len(rows))]
