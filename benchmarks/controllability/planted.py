"""Planted shifts: texts whose label is tied to an attribute that has nothing to do with it.

| name | texts | labels | attribute |
|---|---|---|---|
| `notes` | clinical notes, the demo's | four diagnoses | the patient's gender |
| `tickets` | messages to customer support | four concerns | politeness, in a hundred wordings |
| `reviews` | of hotels | positive, negative | length: one or two sentences, or five to seven |
| `applications` | for jobs | four fields of work | a header or footer that a mail system or portal adds |

A text of the last three makes two or three points, in random order. It is clear (all points are of its label, or one
of them fits another label too), mixed (one point is of another label) or vague (as many points of another label as of
its own: nobody can tell, and a classifier that knows the attribute guesses better). The words are in
`planted_phrases.yaml`.

    python benchmarks/controllability/planted.py reviews     # texts of each cell, and what bags of words make of them
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, get_args

import yaml

from selfreg.demo.notes import Split, generate_notes
from selfreg.demo.phrases import USUAL_GENDER
from selfreg.demo.recipe import KEYWORDS as NOTES_KEYWORDS

SHIFTS = ("notes", "tickets", "reviews", "applications")
SPLITS: tuple[Split, ...] = get_args(Split)

KEYWORDS: dict[str, list[str] | None] = {
    "notes": list(NOTES_KEYWORDS),
    "tickets": [
        *("please", "kindly", "thank", "thanks", "grateful", "appreciate", "sorry", "apologise", "could", "would"),
        *("may", "regards", "sincerely", "Dear", "Hello", "unfortunately", "afraid", "pleasant"),
        *("ridiculous", "useless", "pathetic", "joke", "demand", "immediately", "unacceptable", "excuses", "terrible"),
    ],
    "reviews": None,
    "applications": [
        *("automatic", "automatically", "generated", "confidential", "disclaimer", "recipient", "sender", "reply"),
        *("portal", "reference", "attachments", "viruses", "privacy policy", "notification", "copyright", "forwarded"),
    ],
}
"""Shift -> the words that a person who knows of the attribute would list. No word tells a length.

They were listed from general knowledge, but by the author of the texts."""

SHARE_MIXED, SHARE_VAGUE, SHARE_SHARED = 0.35, 0.08, 0.4
"""Of all texts; of all texts; of the third points of clear texts."""

MIN_WORDS, MAX_WORDS = 13, 68


class Point(NamedTuple):
    """A clause of a text, and the label it speaks for; `None` where it fits several."""

    clause: str
    label: str | None


@dataclass(frozen=True)
class Shift:
    """A planted shift.

    Attributes:
        usual (`dict[str, str]`): label -> the attribute's value that `train` and `test` tie it to.
        bank (`dict[str, Any]`): its part of `planted_phrases.yaml`, each block split into phrases.
        compose (`Callable`): sentences of a text, from its points and its value of the attribute.
    """

    usual: dict[str, str]
    bank: dict[str, Any]
    compose: Callable[[Random, dict[str, Any], list[Point], str], list[str]]

    def other(self, value: str) -> str:
        """The other value of the attribute."""
        return next(found for found in sorted(set(self.usual.values())) if found != value)


def make_planted(
    name: str, *, num_train: int, tie: float, seed: int, num_eval: int = 800
) -> dict[str, list[dict[str, str]]]:
    """Writes the texts of a planted shift: the same ones for the same arguments.

    No text comes twice, neither in one split nor in two, whatever their seeds and sizes, not even with other names and
    numbers; and (`notes` apart) no two splits have texts that make the same points. `test` and `shifted` depend on
    neither `num_train` nor one another.

    Args:
        name (`str`): one of `SHIFTS`.
        num_train (`int`): texts of `train` and of `balanced`; a multiple of twice the number of labels.
        tie (`float`): share of each label's texts whose attribute follows the tie, met to the nearest text: 0.5 is no
            tie, 1 leaves no counter-example.
        seed (`int`): each split draws from a stream of its own of this seed.
        num_eval (`int`, *optional*, defaults to 800): texts of `test` and of `shifted`.

    Returns:
        `dict[str, list[dict[str, str]]]`: split -> rows of `text`, `label` and `group` (the attribute's value), in
        random order, each label as often as the others. `test` has the tie of `train`, `shifted` the reversed one,
        and in `balanced` half of each label's texts have either value.

    Raises:
        ValueError: unknown name, a size that cannot be shared out evenly, or a tie out of range.
    """
    labels = usual_values(name)
    unit = 2 * len(labels)
    for argument, number in (("num_train", num_train), ("num_eval", num_eval)):
        if number < unit or number % unit:
            raise ValueError(
                f"{argument}={number} must be a multiple of {unit}, over 0: {name} has {len(labels)} labels, "
                f"each with two values; {max(number // unit, 1) * unit} would do"
            )
    if not 0.5 <= tie <= 1:
        raise ValueError(f"tie={tie} must lie between 0.5 (no tie) and 1 (no counter-example)")
    sizes: dict[Split, int] = {"train": num_train, "test": num_eval, "shifted": num_eval, "balanced": num_train}
    return {split: _rows(name, split, num, 0.5 if split == "balanced" else tie, seed) for split, num in sizes.items()}


def usual_values(name: str) -> dict[str, str]:
    """Label -> the attribute's value that `train` and `test` tie it to.

    Raises:
        ValueError: unknown name.
    """
    if name not in SHIFTS:
        raise ValueError(f"name={name!r} is not a planted shift; choose one of {', '.join(SHIFTS)}")
    if name == "notes":
        return USUAL_GENDER
    return _shifts()[name].usual


def _rows(name: str, split: Split, num: int, tie: float, seed: int) -> list[dict[str, str]]:
    if name == "notes":
        notes = generate_notes(split, seed=seed, num_notes=num, tie=None if split == "balanced" else tie)
        return [{"text": note["text"], "label": note["label"], "group": note["gender"]} for note in notes]

    shift, draws = _shifts()[name], Random(f"{name}-{split}-{seed}")
    per_label = num // len(shift.usual)
    num_tied = round(tie * per_label)
    cells = []
    for label, usual in shift.usual.items():
        tied, untied = usual, shift.other(usual)
        if split == "shifted":
            tied, untied = untied, tied
        cells += [(label, tied)] * num_tied + [(label, untied)] * (per_label - num_tied)
    draws.shuffle(cells)

    rows: dict[str, dict[str, str]] = {}
    for label, group in cells:
        kind = draws.random()
        template = text = ""
        while template in rows or not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            points = _points(draws, shift, label, kind)
            while _home(points) != split:
                points = _points(draws, shift, label, kind)
            sentences = shift.compose(draws, shift.bank, points, group)
            template, slots = " ".join(sentences), _slots(draws)
            text = " ".join(_capitalised(sentence.format(**slots)) for sentence in sentences)
        rows[template] = {"text": text, "label": label, "group": group}
    return list(rows.values())


def _home(points: Sequence[Point]) -> Split:
    """The one split in which these points may be made together, in whatever order, words around and slots.

    Their hash says so, which keeps any two splits of any seeds apart.
    """
    clauses = "\n".join(sorted(point.clause for point in points))
    return SPLITS[hashlib.sha256(clauses.encode("utf8")).digest()[0] % len(SPLITS)]


def _points(draws: Random, shift: Shift, label: str, kind: float) -> list[Point]:
    """Two or three points; `kind` lies in [0, 1): vague, then mixed, then clear."""
    aspects = shift.bank["aspects"]
    vague, mixed = kind < SHARE_VAGUE, SHARE_VAGUE <= kind < SHARE_VAGUE + SHARE_MIXED
    other = draws.choice([found for found in aspects if found != label])
    shared = [block for block in shift.bank["shared"] if label in block["labels"]]
    if vague:
        shared = [block for block in shared if other in block["labels"]]
    add_shared = draws.random() < (0.5 if vague else SHARE_SHARED) and not mixed
    num_own = 1 if vague else 2 if mixed or add_shared else draws.choice((2, 3))

    names = draws.sample(list(aspects[label]), num_own)
    points = [Point(draws.choice(aspects[label][name]), label) for name in names]
    if vague or mixed:
        # A bed is not soft and hard; and who would never come back has no good points at heart.
        name = draws.choice([name for name in aspects[other] if name not in (*names, "return")])
        points.append(Point(draws.choice(aspects[other][name]), other))
    if add_shared:
        points.append(Point(draws.choice(draws.choice(shared)["phrases"]), None))
    draws.shuffle(points)
    return points


def _ticket(draws: Random, bank: dict[str, Any], points: list[Point], group: str) -> list[str]:
    """The tone is everywhere: in the opening, around one clause or more, in the request and mostly in the closing."""
    wrapped = draws.randrange(len(points))
    wrappers = draws.sample(bank["wrappers"][group], len(points))
    body = _told(draws, bank, points)
    for number, (point, wrapper) in enumerate(zip(points, wrappers, strict=True)):
        if number == wrapped or draws.random() < 0.3:
            body[number] = wrapper.replace("{clause}", point.clause)
    body = _sprinkle(draws, body, draws.sample(bank["fillers"], draws.choice((0, 1, 1))), first=1)
    closing = draws.sample(bank["closings"][group], draws.choice((0, 1, 1)))
    return [draws.choice(bank["openings"][group]), *body, draws.choice(bank["requests"][group]), *closing]


def _review(draws: Random, bank: dict[str, Any], points: list[Point], group: str) -> list[str]:
    """As many points, whatever the length: a long review is filled up with what tells no opinion."""
    short = group == "short"
    if len(points) == 3 and (short or draws.random() < 0.3):
        cut = draws.choice((1, 2))
        sentences = [_joined(points[:cut]), _joined(points[cut:])]
    elif short and draws.random() < 0.5:
        sentences = [_joined(points)]
    else:
        sentences = [_joined([point]) for point in points]
    if short:
        return sentences
    num_fillers = draws.choice((5, 6, 7)) - len(sentences)
    return _sprinkle(draws, sentences, draws.sample(bank["fillers"], num_fillers), first=0)


def _application(draws: Random, bank: dict[str, Any], points: list[Point], group: str) -> list[str]:
    """Without boilerplate, a sentence or two more of the person's own: the length does not tell."""
    num_fillers = 1 if group == "boilerplate" else draws.choice((2, 3, 3))
    body = _sprinkle(draws, _told(draws, bank, points), draws.sample(bank["fillers"], num_fillers), first=0)
    sentences = [draws.choice(bank["openings"]), *body, draws.choice(bank["closings"])]
    if group == "boilerplate":
        if draws.random() < 0.5:
            return [draws.choice(bank["boilerplate"]["header"]), *sentences]
        return [*sentences, draws.choice(bank["boilerplate"]["footer"])]
    return sentences


def _told(draws: Random, bank: dict[str, Any], points: Sequence[Point]) -> list[str]:
    """A sentence a point; the second and third may lead over from the one before."""
    links = draws.sample(bank["links"], len(points))
    return [
        link.replace("{clause}", point.clause) if number and draws.random() < 0.4 else point.clause + "."
        for number, (point, link) in enumerate(zip(points, links, strict=True))
    ]


def _joined(points: Sequence[Point]) -> str:
    """One sentence of one or two points."""
    first, *rest = points
    if not rest:
        return first.clause + "."
    differ = None not in (first.label, rest[0].label) and first.label != rest[0].label
    return f"{first.clause}, {'but' if differ else 'and'} {rest[0].clause}."


def _sprinkle(draws: Random, sentences: Sequence[str], fillers: Sequence[str], *, first: int) -> list[str]:
    """The sentences in their order, the fillers anywhere from position `first` on."""
    merged = list(sentences)
    for filler in fillers:
        merged.insert(draws.randint(first, len(merged)), filler)
    return merged


def _slots(draws: Random) -> dict[str, Any]:
    """What the slots of a text hold, the same all through the text."""
    lists = _bank()["slots"]
    slots: dict[str, Any] = {name: draws.choice(values) for name, values in lists.items()}
    return {
        **slots,
        **dict(zip(("town", "elsewhere", "origin"), draws.sample(lists["town"], 3), strict=True)),
        "sum": draws.randint(12, 89),
        "year": draws.randint(2004, 2022),
        "code": draws.randint(101, 989),
        "customer": draws.randint(1000, 9999),
        "order": f"{draws.choice('ABDEKLMRT')}{draws.randint(1000, 9999)}",
        "rooms": draws.randint(40, 180),
        "room": draws.randint(101, 519),
    }


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


@cache
def _bank() -> dict[str, Any]:
    """`planted_phrases.yaml`, each block split into its phrases."""
    return _split_blocks(yaml.safe_load(Path(__file__).with_name("planted_phrases.yaml").read_text(encoding="utf8")))


def _split_blocks(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _split_blocks(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_split_blocks(value) for value in node]
    return node.splitlines() if isinstance(node, str) and node.endswith("\n") else node


@cache
def _shifts() -> dict[str, Shift]:
    composers = {"tickets": _ticket, "reviews": _review, "applications": _application}
    return {name: Shift(_bank()[name]["usual"], _bank()[name], compose) for name, compose in composers.items()}


def main() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHIFTS)
    parser.add_argument("--num-train", type=int, default=800)
    parser.add_argument("--tie", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2, help="texts to print of each label and value")
    options = parser.parse_args()
    splits = make_planted(options.name, num_train=options.num_train, tie=options.tie, seed=options.seed)

    for label, usual in usual_values(options.name).items():
        for group in sorted({row["group"] for row in splits["balanced"]}):
            print(f"\n{label}, {group}{' (tied)' if group == usual else ''}")
            found = [row["text"] for row in splits["balanced"] if (row["label"], row["group"]) == (label, group)]
            for text in found[: options.samples]:
                print(f"  - {text}")
    print("\naccuracy of logistic regression on TF-IDF")
    for target, trained_on in (("label", "train"), ("label", "balanced"), ("group", "balanced")):
        model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000))
        model.fit([row["text"] for row in splits[trained_on]], [row[target] for row in splits[trained_on]])
        scores = {
            split: model.score([row["text"] for row in splits[split]], [row[target] for row in splits[split]])
            for split in ("test", "shifted")
        }
        print(f"{target:5}, trained on {trained_on:8}: test {scores['test']:.3f}, shifted {scores['shifted']:.3f}")


if __name__ == "__main__":
    main()
