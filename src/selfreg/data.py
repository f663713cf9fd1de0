"""Reads the texts of a recipe, and refuses what would only fail later."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfreg.activations.conversation import check_pair
from selfreg.classifier.tasks import Task, indicator
from selfreg.recipe import DataRecipe, RecipeError, SplitRecipe
from selfreg.texts import TextSet

logger = logging.getLogger(__name__)

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# No name of a data set on the Hub ends so.
_OTHER_FORMATS = {".txt", ".tsv", ".xlsx", ".xls", ".zip", ".gz", ".xz", ".arrow", ".pkl"}


@dataclass(frozen=True)
class TaskData:
    """All texts of a recipe.

    Attributes:
        train (`TextSet`), eval (`dict[str, TextSet]`): the task.
        labels (`list[str]`): names of the labels, by class id; none for `regression` and `preference`.
        sae_text (`list[str]`, *optional*): general text for the SAE.
    """

    train: TextSet
    eval: dict[str, TextSet]
    labels: list[str]
    sae_text: list[str] | None


def load_task(data: DataRecipe, attribute: str | None, task: Task = "single_label") -> TaskData:
    """Reads and checks every set of a recipe.

    Raises:
        RecipeError: a file or column is missing, a text is empty, a label is missing, there is only one label, an eval
            set has a label that training never saw, or a pair lacks a side.
    """
    rows = {"train": load_rows(data.train), **{name: load_rows(split) for name, split in data.eval.items()}}
    for taken in {"train", "sae_text"} & set(data.eval):
        raise RecipeError(f"data.eval: {taken!r} is the name of another set of texts; choose another")
    own = ["chosen", "rejected"] if task == "preference" else [data.text, data.label]
    for name, part in rows.items():
        further = [data.group] if data.group else []
        if name == "train":
            further += [column for column in (attribute, data.weight) if column is not None]
        check_columns(part, name, [*own, *further])
        if task == "preference":
            rows[name] = _check_pairs(part, name)
        else:
            _check(part, name, data, label=True)
            _check_labels(part, name, data.label, task)
    names = _label_names(rows["train"], data.label, task)
    sets = {name: _text_set(name, part, data, attribute, task, names) for name, part in rows.items()}
    train = sets.pop("train")
    if data.drop_duplicates:
        train, sets = _drop_duplicates(train, sets)
    for name, part_set in sets.items():
        seen = {str(group) for group in train.groups or []}
        unseen = sorted({str(group) for group in part_set.groups or [] if group is not None} - seen)
        if unseen:
            logger.warning(
                "%s: group %s never stands in the training set: it is measured, but nothing could be learned of it",
                name,
                ", ".join(map(repr, unseen)),
            )
    sae_text = None
    if data.sae_text is not None:
        general = load_rows(data.sae_text)
        check_columns(general, "sae_text", [data.text])
        _check(general, "sae_text", data, label=False)
        sae_text = [row[data.text] for row in general]
    return TaskData(train, sets, names, sae_text)


def _text_set(
    name: str,
    rows: list[dict[str, Any]],
    data: DataRecipe,
    attribute: str | None,
    task: Task,
    names: list[str],
) -> TextSet:
    training = name == "train"
    if task == "preference":
        columns = ("prompt", "chosen", "rejected")
        texts = [json.dumps({key: row.get(key) for key in columns}, ensure_ascii=False) for row in rows]
    else:
        texts = [row[data.text] for row in rows]
    return TextSet(
        name=name,
        texts=texts,
        labels=_targets(rows, name, data.label, task, names),
        groups=[row[data.group] for row in rows] if data.group else None,
        attribute=[row[attribute] for row in rows] if attribute and training else None,
        weights=[_weight(row, i, data.weight) for i, row in enumerate(rows)] if data.weight and training else None,
        margins=_margins(rows, name) if task == "preference" else None,
        task=task,
    )


def _targets(rows: list[dict[str, Any]], name: str, column: str, task: Task, names: list[str]) -> list[Any]:
    if task == "preference":
        return [0] * len(rows)
    if task == "regression":
        return [float(row[column]) for row in rows]
    where = "data.train" if name == "train" else f"data.eval.{name}"
    if task == "multi_label":
        try:
            return [indicator(map(str, row[column]), names, "the training set's") for row in rows]
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error
    index = {label: i for i, label in enumerate(names)}
    labels = [str(row[column]) for row in rows]
    unseen = sorted(set(labels) - set(index))
    if unseen:
        raise RecipeError(
            f"{where}: label {unseen[0]!r} never stands in the training set, which has {', '.join(names)}"
        )
    return [index[label] for label in labels]


def _finite(value: Any, name: str) -> None:
    if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}, which is no finite number")


def _margins(rows: list[dict[str, Any]], name: str) -> list[float] | None:
    values = [row.get("margin") for row in rows]
    if all(value is None for value in values):
        return None
    if None in values:
        raise RecipeError(f"data {name!r}: row {values.index(None)} has no margin: give every pair one, or none")
    return [float(value) for value in values if value is not None]


def _weight(row: Mapping[str, Any], number: int, column: str) -> float:
    value = row[column]
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RecipeError(f"data.weight: row {number} of 'train' holds {value!r}: a weight is a number, 0 or more")
    return float(value)


def load_rows(split: SplitRecipe) -> list[dict[str, Any]]:
    """Rows of a local file (JSONL, CSV or Parquet, compressed or not) or of a data set on the Hub.

    Raises:
        RecipeError: it can't be read.
    """
    from datasets import load_dataset

    path = Path(split.path)
    suffixes = [suffix for suffix in path.suffixes if suffix in _FORMATS]
    try:
        if suffixes:
            if not path.exists():
                raise RecipeError(f"there is no file {split.path}")
            if path.stat().st_size == 0:
                raise RecipeError(f"{split.path} is empty")
            dataset = load_dataset(_FORMATS[suffixes[-1]], data_files=str(path), split=split.split)
        elif path.is_file() or path.suffix.lower() in _OTHER_FORMATS or split.path.startswith((".", "/", "~")):
            known = ", ".join(_FORMATS)
            what = f"{split.path} is none of {known}" if path.is_file() else f"there is no file {split.path}"
            raise RecipeError(f"{what}: texts are read from files that end on {known}, or from a data set on the Hub")
        else:
            dataset = load_dataset(split.path, split=split.split)
    except RecipeError:
        raise
    except Exception as error:
        # datasets raises many kinds, of which few say which file they are about, and hides the one that says why.
        cause = error.__cause__ or error
        raise RecipeError(f"can't read {split.path} (split {split.split!r}): {cause}") from error
    rows = dataset.to_list()
    if not rows:
        raise RecipeError(f"{split.path} (split {split.split!r}) holds no rows")
    return rows


def first_texts(texts: Sequence[str], max_tokens: int | None, max_length: int) -> list[str]:
    """The first texts that hold about `max_tokens` tokens; all where it is None.

    Counted by characters, which needs no tokenizer: four to a token, cut at `max_length` tokens.
    """
    if max_tokens is None:
        return list(texts)
    total = count = 0
    for text in texts:
        total += min(len(text), 4 * max_length)
        count += 1
        if total >= 4 * max_tokens:
            break
    return list(texts[:count])


def check_columns(rows: list[dict[str, Any]], name: str, columns: Sequence[str]) -> None:
    """Raises RecipeError where a column is missing."""
    for column in columns:
        if column not in rows[0]:
            raise RecipeError(f"data {name!r}: there is no column {column!r}; it has {', '.join(rows[0])}")


def _check(rows: list[dict[str, Any]], name: str, data: DataRecipe, *, label: bool) -> None:
    for number, row in enumerate(rows):
        text = row[data.text]
        if text is not None and not isinstance(text, str):
            raise RecipeError(f"data {name!r}: row {number} holds {text!r} in column {data.text!r}, which is no text")
        if text is None or not text.strip():
            raise RecipeError(f"data {name!r}: row {number} has an empty text in column {data.text!r}: leave it out")
        if label and row[data.label] is None:
            raise RecipeError(f"data {name!r}: row {number} has no label in column {data.label!r}")


def _check_labels(rows: list[dict[str, Any]], name: str, column: str, task: Task) -> None:
    kinds: dict[str, tuple[Any, str]] = {
        "single_label": (str | int | float, "a label is one name or number"),
        "multi_label": (list, "with task multi_label it is a list of different names"),
        "regression": (int | float, "with task regression it is a number"),
    }
    kind, wanted = kinds[task]
    for number, row in enumerate(rows):
        value = row[column]
        fits = isinstance(value, kind) and (task != "regression" or math.isfinite(value))
        if task == "multi_label" and fits:
            fits = all(isinstance(own, str) for own in value) and len(set(value)) == len(value)
        if not fits:
            raise RecipeError(f"data {name!r}: row {number} has the label {value!r} in column {column!r}: {wanted}")


def _check_pairs(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The pairs whose sides differ."""
    kept = [row for row in rows if row["chosen"] != row["rejected"]]
    if len(kept) < len(rows):
        logger.warning("%s: %d pairs with the same text on both sides left out", name, len(rows) - len(kept))
    if not kept:
        raise RecipeError(f"data {name!r}: every pair has the same text on both sides: there is nothing to prefer")
    for number, row in enumerate(kept):
        try:
            check_pair(row)
            _finite(row.get("margin"), "margin")
        except ValueError as error:
            raise RecipeError(f"data {name!r}: row {number}: {error}") from error
    return kept


def _label_names(rows: list[dict[str, Any]], column: str, task: Task) -> list[str]:
    if task in ("regression", "preference"):
        if task == "regression" and len({row[column] for row in rows}) < 2:
            raise RecipeError(f"data 'train': column {column!r} holds one value only ({rows[0][column]!r})")
        return []
    values = {label for row in rows for label in row[column]} if task == "multi_label" else {r[column] for r in rows}
    if not values or (task == "single_label" and len(values) < 2):
        shown = f" ({next(iter(values))!r})" if values else ""
        raise RecipeError(f"data 'train': column {column!r} holds {'one label only' if values else 'no label'}{shown}")
    # Numbers in their own order, not in that of their names.
    numeric = all(isinstance(value, int | float) for value in values)
    return [str(value) for value in sorted(values, key=None if numeric else str)]


def _drop_duplicates(train: TextSet, evals: dict[str, TextSet]) -> tuple[TextSet, dict[str, TextSet]]:
    first: dict[str, int] = {}
    for i, text in enumerate(train.texts):
        first.setdefault(text.strip(), i)
    kept = sorted(first.values())
    if len(kept) < len(train):
        logger.warning("train: %d repeated texts left out", len(train) - len(kept))
    out = {}
    for name, part in evals.items():
        rows = [i for i, text in enumerate(part.texts) if text.strip() not in first]
        if len(rows) < len(part):
            logger.warning("%s: %d texts that stand in the training set left out", name, len(part) - len(rows))
        if not rows:
            raise RecipeError(
                f"data.eval.{name}: every text stands in the training set too; measure on other texts, or set "
                "data.drop_duplicates: false"
            )
        out[name] = part.select(rows)
    return train.select(kept), out
