"""The demo's text set: short clinical notes whose patients' gender is tied to the diagnosis.

A note is an introduction, two or three symptoms of its diagnosis, some neutral sentences and a closing. A third of the
notes also have one or two symptoms of other diagnoses, always fewer than their own. The introduction and the closing
tell the gender, and nothing of the diagnosis. In `train` and `test` each diagnosis goes with one gender; in `shifted`
with the other one; so a classifier that took gender for a symptom does well on `test` and fails on `shifted`.

    python -m selfreg.demo.notes        # writes data/*.jsonl anew
"""

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

from selfreg.demo.phrases import (
    CLOSINGS,
    CONFLICTS,
    FILLERS,
    GENDER_WORDS,
    INTRODUCTIONS,
    SHARED_SYMPTOMS,
    SLOTS,
    SYMPTOMS,
    USUAL_GENDER,
)
from selfreg.utils.files import atomic_path

Split = Literal["train", "test", "shifted", "balanced"]
T = TypeVar("T")

NUM_NOTES: dict[Split, int] = {"train": 800, "test": 400, "shifted": 400, "balanced": 800}
"""How many notes a split has where the caller does not say."""

SHIPPED_SPLITS: tuple[Split, ...] = ("train", "test", "shifted")
"""The splits that lie in `data/`; `balanced` is generated where it is needed."""

PHRASINGS: dict[str, tuple[str, ...]] = {
    **{name: phrases for of_label in SYMPTOMS.values() for name, phrases in of_label.items()},
    **{name: phrases for name, (_, phrases) in SHARED_SYMPTOMS.items()},
}
"""Symptom -> phrasings, of all symptoms."""

TIE = 0.95
SHARE_WITH_DISTRACTORS = 1 / 3
MIN_WORDS, MAX_WORDS = 30, 70


class Note(NamedTuple):
    """A note and what it was made of.

    Attributes:
        text (`str`): the note.
        label (`str`): its diagnosis.
        gender (`str`): `female` or `male`.
        symptoms (`tuple[str, ...]`): the diagnosis' own symptoms and shared ones, by their name in the phrase bank.
        distractors (`tuple[str, ...]`): symptoms of other diagnoses.
    """

    text: str
    label: str
    gender: str
    symptoms: tuple[str, ...]
    distractors: tuple[str, ...]


class _Draws:
    """What the generator draws, from `Random.random` alone: the one method whose sequence Python promises to keep."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def integer(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def one(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        keys = [self._random() for _ in items]
        return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def generate_notes(
    split: Split, *, seed: int = 0, num_notes: int | None = None, tie: float | None = None
) -> list[dict[str, str]]:
    """Writes the notes of a split: the same ones for the same arguments, on any machine and Python version.

    No text comes twice, neither in one split nor in two, whatever their seeds and sizes.

    Args:
        split (`str`): `train` and `test` tie each diagnosis to its usual gender, `shifted` to the other one; in
            `balanced` half of each diagnosis' notes are of either gender.
        seed (`int`, *optional*, defaults to 0): each split draws from a stream of its own of this seed.
        num_notes (`int`, *optional*): a multiple of 4 (of 8 for `balanced`), as each diagnosis has a quarter.
            Defaults to 800 for `train` and `balanced`, to 400 for the others.
        tie (`float`, *optional*, defaults to 0.95): the share of each diagnosis' notes whose gender follows the tie,
            met to the nearest note. `balanced` has no tie.

    Returns:
        `list[dict[str, str]]`: rows of `text`, `label` and `gender`, in random order.
    """
    notes = _notes(split, seed=seed, num_notes=num_notes, tie=tie)
    return [{"text": note.text, "label": note.label, "gender": note.gender} for note in notes]


def notes_path(split: Split) -> Path:
    """Where the file of a shipped split lies.

    Raises:
        ValueError: `split` is not shipped.
    """
    if split not in SHIPPED_SPLITS:
        raise ValueError(f"split={split!r} is not shipped (only {', '.join(SHIPPED_SPLITS)} are); use generate_notes")
    return Path(__file__).parent / "data" / f"{split}.jsonl"


def load_notes(split: Split) -> list[dict[str, str]]:
    """Reads a shipped split: what `generate_notes(split)` returns."""
    return [json.loads(line) for line in notes_path(split).read_text(encoding="utf8").splitlines()]


def _notes(split: Split, *, seed: int, num_notes: int | None, tie: float | None) -> list[Note]:
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is not known; choose one of {', '.join(get_args(Split))}")
    balanced = split == "balanced"
    if balanced and tie is not None:
        raise ValueError("balanced notes have no tie between gender and diagnosis to set; leave tie out")
    if num_notes is None:
        num_notes = NUM_NOTES[split]
    unit = len(SYMPTOMS) * (2 if balanced else 1)
    if num_notes < unit or num_notes % unit:
        raise ValueError(f"num_notes={num_notes} must be a multiple of {unit} for {split}, over 0")
    tie = 0.5 if balanced else TIE if tie is None else tie
    if not 0 <= tie <= 1:
        raise ValueError(f"tie={tie} must lie between 0 and 1")

    draws = _Draws(f"{seed}-{split}")
    per_label = num_notes // len(SYMPTOMS)
    num_tied, num_distracted = round(tie * per_label), round(SHARE_WITH_DISTRACTORS * per_label)
    plans: list[tuple[str, str, bool]] = []
    for label, usual in USUAL_GENDER.items():
        unusual = "male" if usual == "female" else "female"
        tied, other = (unusual, usual) if split == "shifted" else (usual, unusual)
        genders = draws.shuffled([tied] * num_tied + [other] * (per_label - num_tied))
        distracted = draws.shuffled([True] * num_distracted + [False] * (per_label - num_distracted))
        plans += [(label, *rest) for rest in zip(genders, distracted, strict=True)]

    notes: dict[str, Note] = {}
    for label, gender, has_distractors in draws.shuffled(plans):
        note = _compose(draws, label, gender, has_distractors)
        while not MIN_WORDS <= len(note.text.split()) <= MAX_WORDS or _home(note.text) != split or note.text in notes:
            note = _compose(draws, label, gender, has_distractors)
        notes[note.text] = note
    return list(notes.values())


def _home(text: str) -> str:
    """The one split that a text may stand in.

    Its hash says so, which keeps any two splits apart without either knowing the other's seed or size.
    """
    splits = get_args(Split)
    return str(splits[hashlib.sha256(text.encode("utf8")).digest()[0] % len(splits)])


def _compose(draws: _Draws, label: str, gender: str, has_distractors: bool) -> Note:
    symptoms, distractors = _choose_symptoms(draws, label, has_distractors)
    body = [draws.one(PHRASINGS[name]) for name in draws.shuffled(symptoms + distractors)]

    fillers = draws.shuffled(FILLERS)[: 2 if draws.chance(0.3) else 1]
    before = draws.integer(0, len(fillers))
    sentences = [draws.one(INTRODUCTIONS), *fillers[:before], *body, *fillers[before:], draws.one(CLOSINGS)]
    return Note(_fill(draws, sentences, gender), label, gender, tuple(symptoms), tuple(distractors))


def _choose_symptoms(draws: _Draws, label: str, has_distractors: bool) -> tuple[list[str], list[str]]:
    """The names of a note's true symptoms, and of its distractors.

    At most one of the true symptoms is a shared one, and two distractors come from two diagnoses, beside two symptoms
    or more of the label's own: so a note always has most symptoms of its label, and a reader can tell it.
    """
    while True:
        shared = [name for name, (labels, _) in SHARED_SYMPTOMS.items() if label in labels and draws.chance(0.12)]
        shared = draws.shuffled(shared)[:1]
        num_own = (3 if draws.chance(0.8) else 2) - len(shared)
        if has_distractors:
            num_own = max(num_own, 2)
        symptoms = draws.shuffled(list(SYMPTOMS[label]))[:num_own] + shared
        others = draws.shuffled([other for other in SYMPTOMS if other != label])
        num_distractors = (2 if draws.chance(0.25) else 1) if has_distractors else 0
        distractors = [draws.one(list(SYMPTOMS[other])) for other in others[:num_distractors]]
        if not any(conflict <= {*symptoms, *distractors} for conflict in CONFLICTS):
            return symptoms, distractors


def _fill(draws: _Draws, sentences: Sequence[str], gender: str) -> str:
    """Puts words into the slots of a note's sentences; a name, once drawn, is the same all through the note."""
    words = GENDER_WORDS[gender] | {slot: draws.one(choices) for slot, choices in SLOTS.items()}
    numbers = {
        "age": draws.integer(32, 66),
        "older": draws.integer(62, 79),
        "room": draws.integer(1, 12),
        "systolic": draws.integer(112, 138),
        "diastolic": draws.integer(68, 86),
        "height": draws.integer(160, 182),
        "year": draws.integer(1998, 2014),
    }
    filled: list[str] = []
    for sentence in sentences:
        # "The patient" again and again would read like a form.
        new = not any(earlier.startswith("The patient") for earlier in filled)
        who = "The patient" if draws.chance(0.6) and new else words["He"]
        filled.append(sentence.format(Who=who, **words, **numbers))
    return " ".join(filled)


def main() -> None:
    """Writes the shipped files anew."""
    for split in SHIPPED_SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generate_notes(split)]
        with atomic_path(notes_path(split)) as temporary:
            # As bytes, so that the line ends are the same on every system.
            temporary.write_bytes("".join(lines).encode("utf8"))
        sys.stdout.write(f"{notes_path(split)}: {len(lines)} notes\n")


if __name__ == "__main__":
    main()
