import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "controllability" / "planted.py"
NEW = ("tickets", "reviews", "applications")
NAMES = ("notes", *NEW)
SPLITS = ("train", "test", "shifted", "balanced")


def load() -> ModuleType:
    # benchmarks/ is no package, and holds another planted.py.
    spec = importlib.util.spec_from_file_location("controllability_planted", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


planted = load()
USUAL: dict[str, dict[str, str]] = {name: planted.usual_values(name) for name in NAMES}


def make(name: str, **changes: Any) -> dict[str, list[dict[str, str]]]:
    arguments: dict[str, Any] = {"num_train": 160, "tie": 0.95, "seed": 0, "num_eval": 80} | changes
    return planted.make_planted(name, **arguments)


def texts(rows: list[dict[str, str]]) -> set[str]:
    return {row["text"] for row in rows}


def phrases(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [phrase for value in node.values() for phrase in phrases(value)]
    return [phrase for value in node for phrase in phrases(value)] if isinstance(node, list) else [str(node)]


def pattern_of(phrase: str) -> re.Pattern[str]:
    """The phrase in a text, whatever fills its slots."""
    return re.compile(r"[\w. -]+?".join(map(re.escape, re.split(r"\{\w+\}", phrase))), re.I)


def tied_share(rows: list[dict[str, str]], usual: dict[str, str]) -> dict[str, int]:
    """Label -> how many of its texts have the usual value."""
    return {
        label: sum(row["label"] == label and row["group"] == value for row in rows) for label, value in usual.items()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tie", [0.5, 0.8, 0.95, 1.0])
def test_the_tie_is_exact_reversed_in_shifted_and_absent_in_balanced(name: str, tie: float) -> None:
    splits = make(name, tie=tie)
    usual = USUAL[name]
    assert tuple(splits) == SPLITS
    for split, rows in splits.items():
        per_label = (160 if split in ("train", "balanced") else 80) // len(usual)
        assert all(list(row) == ["text", "label", "group"] for row in rows)
        assert Counter(row["label"] for row in rows) == dict.fromkeys(usual, per_label)
        assert {row["group"] for row in rows} == set(usual.values())
        num_tied = per_label // 2 if split == "balanced" else round(tie * per_label)
        expected = per_label - num_tied if split == "shifted" else num_tied
        assert tied_share(rows, usual) == dict.fromkeys(usual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_each_value_is_usual_for_half_of_the_labels(name: str) -> None:
    usual = USUAL[name]
    assert set(Counter(usual.values()).values()) == {len(usual) // 2}


@pytest.mark.parametrize("name", NAMES)
def test_no_text_comes_twice_in_or_across_splits_and_seeds(name: str) -> None:
    seen: dict[str, str] = {}
    for seed in (0, 1):
        for split, rows in make(name, seed=seed, num_train=200).items():
            assert len(texts(rows)) == len(rows)
            assert all(seen.get(text, split) == split for text in texts(rows))
            seen |= dict.fromkeys(texts(rows), split)


@pytest.mark.parametrize("name", NEW)
def test_no_two_texts_differ_by_names_and_numbers_alone(name: str) -> None:
    values = sorted({str(value) for value in phrases(planted._bank()["slots"])}, key=len, reverse=True)
    slot = re.compile(rf"\b(?:[A-Z]?\d+|{'|'.join(map(re.escape, values))})\b")
    masked = [slot.sub("_", row["text"]) for rows in make(name, num_train=800).values() for row in rows]
    assert len(set(masked)) == len(masked)


@pytest.mark.parametrize("name", NEW)
def test_no_two_splits_make_the_same_points(name: str) -> None:
    clauses = phrases(planted._bank()[name]["aspects"])
    clauses += [clause for block in planted._bank()[name]["shared"] for clause in block["phrases"]]
    patterns = [pattern_of(clause) for clause in clauses]
    home: dict[frozenset[int], str] = {}
    for split, rows in make(name, num_train=200).items():
        for row in rows:
            told = frozenset(number for number, found in enumerate(patterns) if found.search(row["text"]))
            assert len(told) in (2, 3), row
            assert home.setdefault(told, split) == split, row


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_texts_and_another_seed_others(name: str) -> None:
    first = make(name)
    assert make(name) == first
    other = make(name, seed=1)
    assert len(texts(other["train"]) & texts(first["train"])) == 0


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_texts_do_not_depend_on_the_size_of_train(name: str) -> None:
    small, large = make(name), make(name, num_train=320)
    assert {split: small[split] for split in ("test", "shifted")} == {
        split: large[split] for split in ("test", "shifted")
    }


def test_texts_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    arguments = "num_train=16, tie=0.8, seed=3, num_eval=16"
    code = (
        f"import sys, json; sys.path.insert(0, {str(SCRIPT.parent)!r}); from planted import *;"
        f"print(json.dumps([make_planted(name, {arguments}) for name in SHIFTS]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    made = [make(name, num_train=16, tie=0.8, seed=3, num_eval=16) for name in NAMES]
    assert json.loads(done.stdout) == made


@pytest.mark.parametrize("name", NEW)
def test_what_a_text_looks_like(name: str) -> None:
    for row in make(name, num_train=200)["balanced"]:
        text = row["text"]
        assert 13 <= len(text.split()) <= 68
        assert not re.search(r"[{}_\n]|  |\.\.|,,|\?\.|\bNone\b", text), text
        assert re.fullmatch(r"[A-Z].*[.?]", text), text
        assert not re.search(r"[.?] [a-z]", text), text
        assert not re.search(r"\ba [aeio]\w|\ban (?!hour)[^aeiou]", text), text
        sentences = re.findall(r"[^.?]+[.?]", text)
        assert len(set(sentences)) == len(sentences), text


def test_reviews_differ_in_length_and_in_nothing_else() -> None:
    rows = make("reviews", num_train=200)["balanced"]
    fillers = {filler.split("{")[0] for filler in planted._bank()["reviews"]["fillers"]}
    for row in rows:
        num_sentences = len(re.findall(r"[.?](?: |$)", row["text"]))
        assert num_sentences in ({1, 2} if row["group"] == "short" else {5, 6, 7}), row
        assert any(filler in row["text"] for filler in fillers) == (row["group"] == "long"), row


def test_boilerplate_stands_in_its_own_texts_alone_and_the_length_does_not_tell() -> None:
    bank = planted._bank()["applications"]["boilerplate"]
    marks = [max(re.split(r"\{\w+\}", phrase), key=len) for phrase in phrases(bank)]
    lengths: dict[str, list[int]] = {"boilerplate": [], "none": []}
    for row in make("applications", num_train=200)["balanced"]:
        assert sum(mark in row["text"] for mark in marks) == (row["group"] == "boilerplate"), row
        lengths[row["group"]].append(len(row["text"].split()))
    boilerplate, none = (sum(found) / len(found) for found in lengths.values())
    assert abs(boilerplate - none) < 4


def test_the_tone_of_a_ticket_is_told_three_times_or_more() -> None:
    bank = planted._bank()["tickets"]
    tones = {
        tone: [
            pattern_of(phrase.removesuffix("{clause}."))
            for block in ("openings", "wrappers", "requests", "closings")
            for phrase in bank[block][tone]
        ]
        for tone in ("polite", "blunt")
    }
    for row in make("tickets")["balanced"]:
        other = "blunt" if row["group"] == "polite" else "polite"
        assert sum(bool(pattern.search(row["text"])) for pattern in tones[row["group"]]) >= 3, row
        assert not any(pattern.search(row["text"]) for pattern in tones[other]), row


@pytest.mark.parametrize("name", NEW)
def test_the_label_can_mostly_be_told_from_its_own_points(name: str) -> None:
    """Vague texts apart, most points are of the label; in vague ones another label has as many."""
    aspects = planted._bank()[name]["aspects"]
    patterns = {label: [pattern_of(phrase) for phrase in phrases(of)] for label, of in aspects.items()}
    vague = 0
    rows = make(name, num_train=200)["balanced"]
    for row in rows:
        votes = {label: sum(bool(found.search(row["text"])) for found in patterns[label]) for label in patterns}
        own = votes.pop(row["label"])
        assert own >= 1, row
        assert max(votes.values()) <= own, row
        vague += max(votes.values()) == own
    assert 0.03 <= vague / len(rows) <= 0.14


@pytest.mark.parametrize("name", NEW)
def test_the_bank_is_wide_and_without_repetition(name: str) -> None:
    bank = planted._bank()[name]
    everything = phrases({key: value for key, value in bank.items() if key != "usual"})
    clauses = [found for block in bank["shared"] for found in block["phrases"]] + phrases(bank["aspects"])
    assert len(set(everything)) == len(everything) - sum(
        everything.count(label) - 1 for label in {*bank["usual"]} if label in everything
    )
    assert len(clauses) >= 100
    assert all(len(found) >= 5 for of_label in bank["aspects"].values() for found in of_label.values())
    assert all(not clause.endswith(".") for clause in clauses)
    assert len({frozenset(block["labels"]) for block in bank["shared"]}) == len(bank["shared"])


def test_keywords_name_what_a_person_would_list() -> None:
    assert set(planted.KEYWORDS) == set(NAMES)
    assert planted.KEYWORDS["reviews"] is None
    for name in ("notes", "tickets", "applications"):
        found = planted.KEYWORDS[name]
        assert len(set(found)) == len(found) >= 10
        # On most texts of an attribute's own value, one at least is to be seen.
        pattern = re.compile(rf"\b(?:{'|'.join(found)})\b", re.I)
        seen = Counter(row["group"] for row in make(name)["balanced"] if pattern.search(row["text"]))
        assert max(seen.values()) > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "tweets"}, "name='tweets' is not a planted shift; choose one of notes, tickets"),
        ({"tie": 0.4}, "tie=0.4 must lie between 0.5"),
        ({"tie": 1.01}, "tie=1.01 must lie"),
        ({"tie": float("nan")}, "tie=nan must lie"),
        ({"num_train": 500}, r"num_train=500 must be a multiple of 8.*496 would do"),
        ({"num_train": 0}, r"num_train=0 must be a multiple of 8.*8 would do"),
        ({"num_train": -8}, "num_train=-8 must be a multiple"),
        ({"num_eval": 12}, "num_eval=12 must be a multiple of 8"),
        ({"name": "reviews", "num_train": 6}, "num_train=6 must be a multiple of 4"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**({"name": "tickets"} | arguments))


def test_main_prints_texts_of_each_cell_and_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["planted.py", "reviews", "--num-train", "80", "--samples", "1"])
    planted.main()
    printed = capsys.readouterr().out
    assert "positive, short (tied)" in printed
    assert printed.count("\n  - ") == 4
    assert re.search(r"label, trained on balanced: test 0\.\d{3}, shifted 0\.\d{3}", printed)
