"""The data sets by name, and how real texts are read: without duplicates, and no text in both train and test.

A further one is a function that gives a `Pool`: add it to `DATASETS`.
"""

import json
import lzma
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.controllability.pool import Pool

PLANTED_VARIANTS = ((0.8, 320), (1.0, 320), (0.95, 160))
"""Of each planted shift beside a tie of 95 % in 320 texts: other strengths of the tie, and fewer texts."""


ASKED = "_asked"
"""Ends the name of a data set whose texts stand behind the question that their labels answer."""

FRESH = "_fresh"
"""Ends the name of a planted data set whose texts are written anew."""

OF_PAIRS = ("preferences", "preferences_length", "llmbar")
"""The chat template is around each of their replies, and no question."""

NOTES_SIZES = (200, 1_000, 5_000)
"""Training texts of the notes beside 480."""


def data_root() -> Path:
    """Where the real data lies."""
    root = Path(os.environ.get("SELFREG_DATA", "../shared/data"))
    if not root.is_dir():
        raise FileNotFoundError(f"there is no real data in {root}: set SELFREG_DATA to its folder")
    return root


@cache
def _read(name: str, split: str) -> list[dict[str, Any]]:
    with lzma.open(data_root() / name / f"{split}.jsonl.xz", "rt", encoding="utf8") as file:
        return [json.loads(line) for line in file]


def read(name: str, *splits: str, text: Callable[[dict[str, Any]], str] | None = None) -> list[dict[str, Any]]:
    """Rows of splits, each with its `split`; of a text that comes again (whatever its case and spacing) the first.

    Args:
        name: folder of the data set.
        splits: in the order in which they have precedence.
        text: what tells that two rows are the same; the column `text` if None.
    """
    seen: set[str] = set()
    rows = []
    for split in splits:
        for row in _read(name, split):
            key = " ".join((text(row) if text else row["text"]).casefold().split())
            if key and key not in seen:
                seen.add(key)
                rows.append({**row, "split": split})
    return rows


def where(rows: Iterable[dict[str, Any]], split: str) -> list[int]:
    """The numbers of the rows of a split."""
    return [i for i, row in enumerate(rows) if row["split"] == split]


def asked(make: Callable[[], Pool]) -> Pool:
    """The same texts, labels and draws, with the question in front of every text: nothing but the states changes."""
    pool = make()
    if pool.task == "preference":
        raise ValueError(f"{pool.name}: the chat template is around the replies, there is no place for a question")
    corpus = replace(pool.corpus, name=pool.corpus.name + ASKED, template=f"{pool.instruction}\n\n{{text}}")
    return replace(
        pool, name=pool.name + ASKED, about=f"{pool.about}; the question stands in front of every text", corpus=corpus
    )


def _datasets() -> dict[str, Callable[[], Pool]]:
    from benchmarks.controllability import found, tasks, ties

    sets: dict[str, Callable[[], Pool]] = {
        "toxicchat": tasks.toxicchat,
        "preferences": tasks.preferences,
        "dxy": tasks.dxy,
        "symptom2disease": tasks.symptom2disease,
        "notes": ties.notes,
        "reviews_domain": ties.reviews_domain,
        "reviews_length": ties.reviews_length,
        "toxicchat_length": ties.toxicchat_length,
        "tweets_identity": ties.tweets_identity,
        "preferences_length": ties.preferences_length,
        "cebab_service": ties.cebab_service,
        "dxy_age": ties.dxy_age,
        "davidson": found.davidson,
        "cebab_edits": found.cebab_edits,
        "llmbar": found.llmbar,
        **{f"planted_{name}": partial(ties.planted, name) for name in ties.PLANTED_INSTRUCTIONS},
    }
    questions = {name + ASKED: partial(asked, make) for name, make in sets.items() if name not in OF_PAIRS}
    fresh = {
        f"notes{FRESH}": partial(ties.notes, fresh=True),
        **{f"planted_{name}{FRESH}": partial(ties.planted, name, fresh=True) for name in ties.PLANTED_INSTRUCTIONS},
    }
    sizes = {f"notes_{size}": partial(ties.many_notes, size) for size in NOTES_SIZES}
    ties_and_sizes = {
        f"planted_{name}_tie{round(100 * strength)}_{size}": partial(ties.planted, name, strength=strength, size=size)
        for name in ties.PLANTED_INSTRUCTIONS
        for strength, size in PLANTED_VARIANTS
    }
    return {**sets, **fresh, **sizes, **ties_and_sizes, **questions}


DATASETS: dict[str, Callable[[], Pool]] = _datasets()
NOT_ASKED = tuple(name for name in DATASETS if not name.endswith(ASKED))
"""What is run unless told otherwise: all texts are in these."""
SEEN = tuple(name for name in NOT_ASKED if not name.endswith(FRESH))
"""What the SAE is trained on unless told otherwise."""
