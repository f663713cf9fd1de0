import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from selfreg.demo import notes as notes_module
from selfreg.demo.notes import SHIPPED_SPLITS, Split, generate_notes, load_notes, main, notes_path
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

SIZES = {"train": 800, "test": 400, "shifted": 400}
ALL_SPLITS: tuple[Split, ...] = ("train", "test", "shifted", "balanced")
ALL_SYMPTOMS = {name: phrases for of_label in SYMPTOMS.values() for name, phrases in of_label.items()} | {
    name: phrases for name, (_, phrases) in SHARED_SYMPTOMS.items()
}
GENDERED = re.compile(
    r"\b(s?he|her|his|him|hers|(wo)?m[ae]n|lady|gentleman|(fe)?male|mrs?|husband|wife|(grand)?(mother|father))\b", re.I
)


def slots(phrase: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(phrase) if name}


def texts(rows: list[dict[str, str]]) -> set[str]:
    return {row["text"] for row in rows}


def pattern(phrase: str) -> str:
    return "".join(
        re.escape(literal) + (r"[\w ]+?" if slot else "") for literal, slot, _, _ in string.Formatter().parse(phrase)
    )


PATTERNS = {
    name: re.compile(rf"(?:^|\. )(?:{'|'.join(map(pattern, phrases))})(?: |$)")
    for name, phrases in ALL_SYMPTOMS.items()
}


def symptoms_in(text: str) -> set[str]:
    """Symptoms whose phrases stand in a text, found without the generator's help."""
    return {name for name, found in PATTERNS.items() if found.search(text)}


@pytest.mark.parametrize("split", SHIPPED_SPLITS)
def test_shipped_files_are_what_the_generator_gives(split: Split) -> None:
    rows = generate_notes(split)
    assert load_notes(split) == rows
    expected = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert notes_path(split).read_bytes() == expected.encode("utf8")
    assert len(rows) == SIZES[split]
    assert all(list(row) == ["text", "label", "gender"] for row in rows)


def test_main_writes_the_shipped_files_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = {split: notes_path(split).read_bytes() for split in SHIPPED_SPLITS}
    monkeypatch.setattr(notes_module, "__file__", str(tmp_path / "notes.py"))
    main()
    assert {split: notes_path(split).read_bytes() for split in SHIPPED_SPLITS} == shipped
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(f"{s}.jsonl" for s in SHIPPED_SPLITS)
    assert "800 notes" in capsys.readouterr().out


@pytest.mark.parametrize("split", SHIPPED_SPLITS)
def test_labels_are_balanced_and_the_tie_is_exact(split: Split) -> None:
    rows = load_notes(split)
    cells = Counter((row["label"], row["gender"]) for row in rows)
    quarter = len(rows) // 4
    assert Counter(row["label"] for row in rows) == dict.fromkeys(SYMPTOMS, quarter)
    share = 0.05 if split == "shifted" else 0.95
    for label, usual in USUAL_GENDER.items():
        assert cells[label, usual] == round(share * quarter)
    assert Counter(row["gender"] for row in rows) == {"female": len(rows) // 2, "male": len(rows) // 2}


def test_rows_are_in_random_order() -> None:
    labels = [row["label"] for row in load_notes("train")]
    for start in range(0, 800, 100):
        assert min(Counter(labels[start : start + 100])[label] for label in SYMPTOMS) >= 10


def test_tie_can_be_set() -> None:
    shares: dict[Split, float] = {"train": 0.7, "shifted": 0.3}
    for split, share in shares.items():
        cells = Counter((row["label"], row["gender"]) for row in generate_notes(split, num_notes=80, tie=0.7))
        assert [cells[item] for item in USUAL_GENDER.items()] == [round(share * 20)] * 4


def test_balanced_notes_have_each_gender_in_half_of_each_label() -> None:
    rows = generate_notes("balanced")
    cells = Counter((row["label"], row["gender"]) for row in rows)
    assert len(rows) == 800
    assert cells == {(label, gender): 100 for label in SYMPTOMS for gender in GENDER_WORDS}


def test_no_text_comes_twice_within_or_across_splits_and_seeds() -> None:
    seen: set[str] = set()
    for split in ALL_SPLITS:
        rows = generate_notes(split)
        of_split = texts(rows)
        assert len(of_split) == len(rows)
        assert not seen & of_split
        seen |= of_split
    assert not texts(load_notes("train")) & texts(generate_notes("test", seed=7, num_notes=1200))


def test_another_seed_gives_other_notes() -> None:
    assert generate_notes("test", seed=1, num_notes=40) == generate_notes("test", seed=1, num_notes=40)
    assert not texts(generate_notes("test", seed=1)) & texts(load_notes("test"))


def test_notes_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "import hashlib; from selfreg.demo.notes import generate_notes as g;"
        "print(hashlib.sha256(repr(g('balanced', num_notes=40)).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("split", SHIPPED_SPLITS)
def test_what_a_note_holds(split: Split) -> None:
    notes = notes_module._notes(split, seed=0, num_notes=None, tie=None)
    assert [note.text for note in notes] == [row["text"] for row in load_notes(split)]
    distracted = Counter(note.label for note in notes if note.distractors)
    assert distracted == dict.fromkeys(SYMPTOMS, round(len(notes) / 4 / 3))
    for note in notes:
        assert 30 <= len(note.text.split()) <= 70
        assert symptoms_in(note.text) == {*note.symptoms, *note.distractors}
        assert len(note.symptoms) in (2, 3)
        assert len(note.distractors) <= 2
        assert not any(conflict <= {*note.symptoms, *note.distractors} for conflict in CONFLICTS)


@pytest.mark.parametrize("split", SHIPPED_SPLITS)
def test_the_symptoms_tell_every_label(split: Split) -> None:
    """Each note speaks for its label more than for any other, so that gender is never needed."""
    for row in load_notes(split):
        votes: Counter[str] = Counter()
        for name in symptoms_in(row["text"]):
            votes.update([label for label in SYMPTOMS if name in SYMPTOMS[label]])
            votes.update(SHARED_SYMPTOMS[name][0] if name in SHARED_SYMPTOMS else ())
        (first, most), *rest = votes.most_common()
        assert first == row["label"]
        assert all(count < most for _, count in rest)


@pytest.mark.parametrize("split", SHIPPED_SPLITS)
def test_gender_is_told_from_start_to_end_and_the_diagnosis_never(split: Split) -> None:
    for row in load_notes(split):
        pronoun, other = ("she", "he") if row["gender"] == "female" else ("he", "she")
        words = re.findall(r"[a-z]+", row["text"].lower())
        assert other not in words
        title = {"female": "Mr", "male": "Mrs"}[row["gender"]]
        assert not re.search(rf"\b{title}\b", row["text"])
        mine = {word.lower() for word in GENDER_WORDS[row["gender"]].values()} | {pronoun}
        assert mine & set(words[:20])
        assert mine & set(words[-16:])
        assert not re.search(r"asthma|heart failure|thyroid|pneumoni", row["text"], re.I)
        assert not re.search(r"[{}]|  |\.\.|\ba [aeio]|\ban (?!hour)[^aeiou]", row["text"])


def test_the_bank_is_wide_enough() -> None:
    assert len(SYMPTOMS) == 4
    assert Counter(USUAL_GENDER.values()) == {"female": 2, "male": 2}
    assert all(len(of_label) >= 6 for of_label in SYMPTOMS.values())
    for phrases in ALL_SYMPTOMS.values():
        assert len(set(phrases)) == len(phrases) >= 4
    # Every pair of diagnoses shares a vague symptom.
    assert len({frozenset(labels) for labels, _ in SHARED_SYMPTOMS.values()}) == 6
    names = [name for of_label in SYMPTOMS.values() for name in of_label] + list(SHARED_SYMPTOMS)
    assert len(set(names)) == len(names)
    assert all(conflict <= set(names) for conflict in CONFLICTS)
    everything = [phrase for phrases in ALL_SYMPTOMS.values() for phrase in phrases]
    everything += [*INTRODUCTIONS, *CLOSINGS, *FILLERS]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("gender", GENDER_WORDS)
@pytest.mark.parametrize("phrases", [INTRODUCTIONS, CLOSINGS], ids=["introductions", "closings"])
def test_twenty_introductions_and_closings_a_gender(phrases: tuple[str, ...], gender: str) -> None:
    class KeepSlot(dict[str, str]):
        def __missing__(self, key: str) -> str:
            return f"<{key}>"

    of_gender = {phrase.format_map(KeepSlot(GENDER_WORDS[gender])) for phrase in phrases}
    assert len(of_gender) >= 20
    assert all(slots(phrase) & set(GENDER_WORDS[gender]) for phrase in phrases)


def test_gender_stands_in_slots_only() -> None:
    everything = [phrase for phrases in ALL_SYMPTOMS.values() for phrase in phrases]
    everything += [*INTRODUCTIONS, *CLOSINGS, *FILLERS, *(choice for choices in SLOTS.values() for choice in choices)]
    for phrase in everything:
        assert not GENDERED.search(re.sub(r"\{\w+\}", "", phrase)), phrase
    assert not any(slots(filler) & {*GENDER_WORDS["male"], "Who"} for filler in FILLERS)
    assert set(GENDER_WORDS["female"]) == set(GENDER_WORDS["male"])


def test_symptoms_have_varied_subjects() -> None:
    everything = [phrase for phrases in ALL_SYMPTOMS.values() for phrase in phrases]
    told = [phrase for phrase in everything if slots(phrase) & {"He", "he", "His", "his", "him"}]
    either = [phrase for phrase in everything if "Who" in slots(phrase)]
    untold = [phrase for phrase in everything if not slots(phrase) & {*GENDER_WORDS["male"], "Who"}]
    assert min(len(told), len(either), len(untold)) >= len(everything) / 8
    for row in load_notes("train"):
        assert row["text"].count("The patient") <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "split='valid' is not known"),
        ({"split": "train", "num_notes": 10}, "multiple of 4"),
        ({"split": "train", "num_notes": 0}, "multiple of 4"),
        ({"split": "balanced", "num_notes": 12}, "multiple of 8"),
        ({"split": "balanced", "tie": 0.9}, "balanced"),
        ({"split": "test", "tie": 1.5}, "between 0 and 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_notes(**arguments)


def test_balanced_is_not_shipped() -> None:
    with pytest.raises(ValueError, match="use generate_notes"):
        load_notes("balanced")
