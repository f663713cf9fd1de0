"""Reads the texts of a recipe, and refuses what would only fail later."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfreg.recipe import DataRecipe, RecipeError, SplitRecipe
from selfreg.utils.files import fingerprint_json, fingerprint_strings

logger = logging.getLogger(__name__)

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# No name of a data set on the Hub ends so.
_OTHER_FORMATS = {".txt", ".tsv", ".xlsx", ".xls", ".zip", ".gz", ".xz", ".arrow", ".pkl"}


@dataclass(frozen=True)
class TextSet:
    """Texts with their labels.

    Attributes:
        name (`str`): name of the set.
        texts (`list[str]`), labels (`list[int]`): the task.
        groups (`list`, *optional*): the group of each text, None where it is not known.
        attribute (`list`, *optional*): what features are chosen by; training set only.
    """

    name: str
    texts: list[str]
    labels: list[int]
    groups: list[Any] | None
    attribute: list[Any] | None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> "TextSet":
        """The rows `rows`."""
        return replace(
            self,
            texts=[self.texts[i] for i in rows],
            labels=[self.labels[i] for i in rows],
            groups=[self.groups[i] for i in rows] if self.groups is not None else None,
            attribute=[self.attribute[i] for i in rows] if self.attribute is not None else None,
        )

    def fingerprint(self) -> str:
        """Of all that is in it."""
        rest = fingerprint_json([self.labels, self.groups, self.attribute])
        return fingerprint_strings([fingerprint_strings(self.texts), rest])


@dataclass(frozen=True)
class TaskData:
    """All texts of a recipe.

    Attributes:
        train (`TextSet`), eval (`dict[str, TextSet]`): the task.
        labels (`list[str]`): names of the labels, by class id.
        sae_text (`list[str]`, *optional*): general text for the SAE.
    """

    train: TextSet
    eval: dict[str, TextSet]
    labels: list[str]
    sae_text: list[str] | None


def load_task(data: DataRecipe, attribute: str | None) -> TaskData:
    """Reads and checks every set of a recipe.

    Raises:
        RecipeError: a file or column is missing, a text is empty, a label is missing, there is only one label, or an
            eval set has a label that training never saw.
    """
    rows = {"train": load_rows(data.train), **{name: load_rows(split) for name, split in data.eval.items()}}
    for taken in {"train", "sae_text"} & set(data.eval):
        raise RecipeError(f"data.eval: {taken!r} is the name of another set of texts; choose another")
    for name, part in rows.items():
        wanted = [data.text, data.label, *([data.group] if data.group else [])]
        _check(part, name, [*wanted, *([attribute] if attribute and name == "train" else [])], data)
    names = _label_names(rows["train"], data.label)
    index = {name: i for i, name in enumerate(names)}
    sets: dict[str, TextSet] = {}
    for name, part in rows.items():
        labels = [str(row[data.label]) for row in part]
        unseen = sorted(set(labels) - set(index))
        if unseen:
            raise RecipeError(
                f"data.eval.{name}: label {unseen[0]!r} never stands in the training set, which has {', '.join(names)}"
            )
        sets[name] = TextSet(
            name=name,
            texts=[row[data.text] for row in part],
            labels=[index[label] for label in labels],
            groups=[row[data.group] for row in part] if data.group else None,
            attribute=[row[attribute] for row in part] if attribute and name == "train" else None,
        )
    train = sets.pop("train")
    if data.drop_duplicates:
        train, sets = _drop_duplicates(train, sets)
    sae_text = None
    if data.sae_text is not None:
        general = load_rows(data.sae_text)
        _check(general, "sae_text", [data.text], data)
        sae_text = [row[data.text] for row in general]
    return TaskData(train, sets, names, sae_text)


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


def _check(rows: list[dict[str, Any]], name: str, columns: list[str], data: DataRecipe) -> None:
    for column in columns:
        if column not in rows[0]:
            raise RecipeError(f"data {name!r}: there is no column {column!r}; it has {', '.join(rows[0])}")
    for number, row in enumerate(rows):
        text = row[data.text]
        if text is not None and not isinstance(text, str):
            raise RecipeError(f"data {name!r}: row {number} holds {text!r} in column {data.text!r}, which is no text")
        if text is None or not text.strip():
            raise RecipeError(f"data {name!r}: row {number} has an empty text in column {data.text!r}: leave it out")
        if data.label in columns and row[data.label] is None:
            raise RecipeError(f"data {name!r}: row {number} has no label in column {data.label!r}")
        if data.label in columns and not isinstance(row[data.label], str | int | float):
            raise RecipeError(
                f"data {name!r}: row {number} has the label {row[data.label]!r} in column {data.label!r}: a label is "
                "one name or number"
            )


def _label_names(rows: list[dict[str, Any]], column: str) -> list[str]:
    values = {row[column] for row in rows}
    if len(values) < 2:
        raise RecipeError(f"data 'train': column {column!r} holds one label only ({next(iter(values))!r})")
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
