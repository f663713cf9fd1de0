"""Ties made on purpose, by drawing texts: 95 % of each label from one group in training, the reverse in testing.

`test` has the tie of the training set, `shifted` the reverse, `even` as many texts of either group in each label:
worst groups are read off there, because in the others the cells against the tie are small.
"""

from functools import cache
from typing import Any

from benchmarks.controllability.datasets import FRESH, read, where
from benchmarks.controllability.planted import KEYWORDS, make_planted, usual_values
from benchmarks.controllability.pool import (
    TIE,
    Corpus,
    Pool,
    Rows,
    cells_of,
    dealt,
    draw,
    even,
    folded,
    generator,
    tied,
)
from benchmarks.controllability.tasks import (
    AGE_WORDS,
    DIAGNOSIS,
    FOLDS,
    HATEFUL,
    IDENTITY_WORDS,
    JAILBREAK_WORDS,
    LENGTH_OF_PAIRS,
    LONGER,
    POLITE_WORDS,
    REWARD,
    TOXIC,
    chats,
    dialogues,
    ids_of,
    pairs,
    tweets,
)

from selfreg.demo.notes import generate_notes
from selfreg.demo.phrases import USUAL_GENDER
from selfreg.demo.recipe import KEYWORDS as GENDER_WORDS

MEDIA = ("MR", "imdb", "books", "dvd", "video", "music")
GOODS = ("electronics", "kitchen_housewares", "camera_photo", "apparel", "health_personal_care", "sports_outdoors")
DOMAIN_WORDS = (
    *("book", "books", "author", "novel", "story", "read", "reading", "film", "films", "movie", "movies", "dvd"),
    *("watch", "watching", "album", "cd", "song", "songs", "music", "band", "actor", "actors", "acting", "plot"),
    *("character", "characters", "director", "scene", "scenes", "ending", "video", "series", "episode", "comedy"),
    *("product", "camera", "battery", "batteries", "phone", "kitchen", "pan", "knife", "coffee", "machine", "unit"),
    *("size", "fit", "wear", "shoes", "shirt", "skin", "hair", "lens", "bag", "price", "bought", "purchased", "item"),
)
RATINGS = {"1": 0, "2": 0, "4": 1, "5": 1}
"""Of a review; what is between or has no majority is left out."""
SERVICE_WORDS = (
    *("service", "server", "servers", "waiter", "waiters", "waitress", "waitresses", "staff", "hostess", "host"),
    *("bartender", "manager", "attentive", "rude", "friendly", "prompt", "courteous", "helpful", "waited", "seated"),
    *("polite", "attitude", "served", "waitstaff", "accommodating", "ignored"),
)


def tied_pool(
    name: str,
    about: str,
    corpus: Corpus,
    labels: list[str],
    label: list[int],
    group: list[Any],
    tie: dict[int, Any],
    train: list[int],
    test: list[int],
    size: int,
    eval_size: int,
    *,
    strength: float = TIE,
    **others: Any,
) -> Pool:
    """A pool with two groups whose rows follow `tie`, label -> group, in training.

    Args:
        name, about, corpus, labels, label, group, others: of the `Pool`.
        tie: label -> group.
        train, test: rows to draw from.
        size, eval_size: texts of the training set, and of each eval set.
        strength: share of each label's texts that follow the tie.
    """
    names = sorted({group[row] for row in (*train, *test)} - {None}, key=str)
    if len(names) != 2:
        raise ValueError(f"{name}: a tie needs two groups, got {names}")
    reverse = {y: names[1 - names.index(own)] for y, own in tie.items()}

    def of_seed(seed: int) -> Rows:
        rng = generator(name, seed)
        from_train, from_test = pool.cells(train), pool.cells(test)
        return Rows(
            tied(from_train, tie, size, rng, strength=strength),
            {
                "test": tied(from_test, tie, eval_size, rng, strength=strength),
                "shifted": tied(from_test, reverse, eval_size, rng, strength=strength),
                "even": even(from_test, len(test), rng),
            },
            even(from_train, size, rng),
        )

    pool = Pool(name, about, corpus, labels, label, group, pool=train, rows=of_seed, **others)
    return pool


PLANTED_INSTRUCTIONS = {
    "tickets": "Each text is a ticket to customer support. The label says what it is about.",
    "reviews": "Each text is a review of a hotel. The label says whether the guest was pleased.",
    "applications": "Each text is a letter of application. The label says which field the applicant works in.",
}
PLANTED_TRAIN, PLANTED_TEST = 720, 240
"""Texts of the pools: enough for 320 training texts of four labels at any tie."""


PLANTED_SEED, NOTES_SEED = 7, 20
"""Of the writing of the texts; not one of those that were looked at when the phrases were written."""
OF_FRESH = 100
"""Added to these for texts that chose nothing of the method."""


def planted(name: str, *, strength: float = TIE, size: int = 320, fresh: bool = False) -> Pool:
    """One of the further planted shifts; see `planted.make_planted`.

    Args:
        name: one of `PLANTED_INSTRUCTIONS`.
        strength: share of each label's texts that follow the tie.
        size: training texts.
        fresh: other texts.
    """
    seed = PLANTED_SEED + OF_FRESH * fresh
    splits = make_planted(name, num_train=PLANTED_TRAIN, tie=0.5, seed=seed, num_eval=PLANTED_TEST)
    rows = [{**row, "split": split} for split in ("train", "test") for row in splits[split]]
    labels, label = ids_of([row["label"] for row in rows])
    usual = usual_values(name)
    suffix = "" if (strength, size) == (TIE, 320) else f"_tie{round(100 * strength)}_{size}"
    written = f"planted_{name}{FRESH * fresh}"
    # Every eval set has as many texts as the reversed tie leaves of the smallest cell.
    return tied_pool(
        written + suffix,
        f"written {name}, {len(labels)} labels, tied at {strength:.0%} in {size} training texts",
        Corpus(written, [row["text"] for row in rows], max_length=80),
        labels,
        label,
        [row["group"] for row in rows],
        {labels.index(own): value for own, value in usual.items()},
        where(rows, "train"),
        where(rows, "test"),
        size,
        120,
        strength=strength,
        keywords=tuple(KEYWORDS[name] or ()),
        instruction=PLANTED_INSTRUCTIONS[name],
        kind="planted",
    )


def notes(*, fresh: bool = False) -> Pool:
    """The demo's planted shift.

    Args:
        fresh: other notes.
    """
    return _notes(f"notes{FRESH * fresh}", 960, 480, fresh=fresh)


def many_notes(size: int) -> Pool:
    """The same with few training texts, or many.

    Args:
        size: training texts, to 5,000.
    """
    # No more notes than the tie can draw on: each is run through the backbone.
    return _notes(f"notes_{size}", max(960, 2 * size), size)


def _notes(name: str, pool_size: int, size: int, *, fresh: bool = False) -> Pool:
    rows = _written(pool_size, NOTES_SEED + OF_FRESH * fresh)
    labels, label = ids_of([row["label"] for row in rows])
    return tied_pool(
        name,
        f"the demo's clinical notes, four diagnoses; the diagnosis tied to the patient's gender in {size} texts",
        Corpus(f"notes_{pool_size}{FRESH * fresh}", [row["text"] for row in rows], max_length=80),
        labels,
        label,
        [row["gender"] for row in rows],
        {labels.index(name): gender for name, gender in USUAL_GENDER.items()},
        where(rows, "train"),
        where(rows, "test"),
        size,
        200,
        keywords=GENDER_WORDS,
        instruction=DIAGNOSIS,
        kind="planted",
    )


@cache
def _written(pool_size: int, seed: int) -> list[dict[str, Any]]:
    rows = [{**row, "split": "train"} for row in generate_notes("train", seed=seed, num_notes=pool_size, tie=0.5)]
    return rows + [{**row, "split": "test"} for row in generate_notes("test", seed=seed, num_notes=400, tie=0.5)]


def of_cells(
    name: str, rows: list[dict[str, Any]], column: str, tie: dict[int, str], wanted: dict[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Reviews of two groups: of each split and cell so many.

    Args:
        name: of the draw.
        rows: with `label`, `split` and the group in `column`.
        column, tie: the group, and with which one each label is tied.
        wanted: split -> texts of a cell that follows the tie, and of one that does not.
    """
    rng = generator(name, 0)
    kept = []
    for split, (following, against) in wanted.items():
        cells = [(cell, following) for cell in tie.items()] + [((1, tie[0]), against), ((0, tie[1]), against)]
        for cell, count in cells:
            own = [i for i in where(rows, split) if (rows[i]["label"], rows[i][column]) == cell]
            kept += draw(rng, own, count, f"{name}, {split}, {cell}")
    return [rows[i] for i in sorted(kept)]


def reviews_domain() -> Pool:
    rows = []
    for row in read("reviews", "train", "test"):
        area = "media" if row["domain"] in MEDIA else "goods" if row["domain"] in GOODS else None
        if area is not None:
            rows.append({**row, "area": area})
    tie = {1: "media", 0: "goods"}
    rows = of_cells("reviews", rows, "area", tie, {"train": (760, 380), "test": (400, 400)})
    return tied_pool(
        "reviews_domain",
        "product and film reviews; the sentiment tied to the domain (books, films and music positive, goods negative)",
        Corpus("reviews", [row["text"] for row in rows], max_length=256),
        ["negative", "positive"],
        [row["label"] for row in rows],
        [row["area"] for row in rows],
        tie,
        where(rows, "train"),
        where(rows, "test"),
        1_400,
        800,
        keywords=DOMAIN_WORDS,
        instruction="Is the review of a product, book or film positive or negative?",
    )


def pool_cells(label: list[int], group: list[Any], groups: tuple[str, ...]) -> list[tuple[int, list[int]]]:
    """(label, rows) of every (label, group) cell."""
    found = cells_of(label, group, range(len(label)))
    return [(y, found[y, own]) for y in (0, 1) for own in groups]


def toxicchat_length() -> Pool:
    corpus, rows = chats()
    label, group = [int(row["label"]) for row in rows], [row["length"] for row in rows]
    # Toxic short prompts are few: both splits are dealt anew, three fifths of every cell to train on.
    rng = generator("toxicchat_length", 0)
    cells = pool_cells(label, group, ("long", "short"))
    train, test = dealt(rng, [(cell, 450 if y == 0 else len(cell)) for y, cell in cells], "toxicchat_length")
    return tied_pool(
        "toxicchat_length",
        "ToxicChat, toxic tied to long prompts; keywords (jailbreak boilerplate) do not name the length",
        corpus,
        ["harmless", "toxic"],
        label,
        group,
        {1: "long", 0: "short"},
        train,
        test,
        500,
        200,
        keywords=JAILBREAK_WORDS,
        instruction=TOXIC,
    )


def preferences_length() -> Pool:
    corpus, rows = pairs()
    return tied_pool(
        "preferences_length",
        f"HH-RLHF, the longer reply is the chosen one in 95 % of the pairs; {LENGTH_OF_PAIRS}",
        corpus,
        [],
        [0] * len(rows),
        [row["longer"] for row in rows],
        {0: LONGER},
        where(rows, "train"),
        where(rows, "test"),
        900,
        300,
        keywords=POLITE_WORDS,
        instruction=REWARD,
        task="preference",
    )


LONG_REVIEW, SHORT_REVIEW = 700, 350
"""Characters of a long review, at least, and of a short one, at most."""


def reviews_length() -> Pool:
    rows = []
    for row in read("reviews", "train", "test"):
        length = len(row["text"])
        size = "long" if length >= LONG_REVIEW else "short" if length <= SHORT_REVIEW else None
        if size is not None:
            rows.append({**row, "size": size})
    tie = {1: "long", 0: "short"}
    rows = of_cells("reviews_length", rows, "size", tie, {"train": (500, 250), "test": (250, 250)})
    return tied_pool(
        "reviews_length",
        f"product and film reviews of 16 domains; the sentiment tied to the length (positive at least {LONG_REVIEW} "
        f"characters, negative at most {SHORT_REVIEW}), with which the domain goes; no words tell it",
        Corpus("reviews_length", [row["text"] for row in rows], max_length=256),
        ["negative", "positive"],
        [row["label"] for row in rows],
        [row["size"] for row in rows],
        tie,
        where(rows, "train"),
        where(rows, "test"),
        1_000,
        500,
        keywords=(),
        instruction="Is the review of a product or film positive or negative?",
    )


def tweets_identity() -> Pool:
    # The spam among the harmless ones comes again and again: one of each.
    rows = list({row["gist"]: row for row in reversed(tweets())}.values())[::-1]
    # Harmless tweets that name a group of people are few: all splits are dealt anew, three fifths to train on.
    rng = generator("tweets_identity", 0)
    label, group = [row["toxic"] for row in rows], [row["mentions"] for row in rows]
    cells = pool_cells(label, group, ("identity", "none"))
    train, test = dealt(rng, [(cell, 450) for _, cell in cells], "tweets_identity")
    # Of the many others none is run through the backbone.
    kept = sorted(train + test)
    rows = [{**rows[i], "split": "train" if i in set(train) else "test"} for i in kept]
    return tied_pool(
        "tweets_identity",
        "Davidson's tweets, offensive or hateful against neither; toxic tied to a word in the tweet that names a "
        "group of people: the groups are told by the keywords",
        Corpus("tweets_identity", [row["text"] for row in rows], max_length=64),
        ["harmless", "toxic"],
        [row["toxic"] for row in rows],
        [row["mentions"] for row in rows],
        {1: "identity", 0: "none"},
        where(rows, "train"),
        where(rows, "test"),
        500,
        200,
        keywords=IDENTITY_WORDS,
        instruction=HATEFUL,
    )


def restaurants() -> tuple[Corpus, list[dict[str, Any]]]:
    """CEBaB; rows of one original review stay together, in the split that its authors gave them."""
    rows = [row for row in read("cebab", "train", "dev", "test") if _of_use(row)]
    return Corpus("cebab", [row["text"] for row in rows], max_length=64), rows


def _of_use(row: dict[str, Any]) -> bool:
    """Whether one of the two data sets has a use for a review: others need not be run through the backbone."""
    rated, food, service = row["label"] in RATINGS, known(row["food_aspect"]), known(row["service_aspect"])
    return bool((rated and service) or (food and (row["is_original"] or service or row["split"] == "test")))


def known(value: str) -> str | None:
    """An aspect's sentiment; None where there is none, or no majority for one."""
    return value if value in ("Positive", "Negative") else None


def cebab_service() -> Pool:
    corpus, rows = restaurants()
    label = [RATINGS.get(row["label"], -1) for row in rows]
    group = [known(row["service_aspect"]) if y >= 0 else None for row, y in zip(rows, label, strict=True)]
    return tied_pool(
        "cebab_service",
        "CEBaB, rating 4 or 5 against 1 or 2 (3 and no majority left out); the rating tied to what is said of the "
        "service",
        corpus,
        ["bad", "good"],
        label,
        group,
        {1: "Positive", 0: "Negative"},
        [i for i in (*where(rows, "train"), *where(rows, "dev")) if group[i] is not None],
        [i for i in where(rows, "test") if group[i] is not None],
        600,
        100,
        keywords=SERVICE_WORDS,
        instruction="How does the review rate the restaurant as a whole?",
    )


def dxy_age() -> Pool:
    corpus, rows = dialogues()
    labels, label = ids_of([row["label"] for row in rows])
    group = [row["age_group"] if row["age_group"] in ("infant", "child") else None for row in rows]
    usual = {
        "Pediatric Diarrhea": "infant",
        "URTI": "infant",
        "HFMD": "infant",
        "Pneumonia": "child",
        "Allergic sinusitis": "child",
    }
    tie = {labels.index(name): age for name, age in usual.items()}
    of_known_age = [i for i in range(len(rows)) if group[i] is not None]

    def of_seed(seed: int) -> Rows:
        rng = generator("dxy_age", seed)
        strata = [f"{y} {age}" for y, age in zip(label, group, strict=True)]
        train, test = folded(of_known_age, strata, FOLDS, seed)
        cells = pool.cells(train)
        size = min(len(cells[label_age]) for label_age in tie.items())
        follows = {row: tie[label[row]] == group[row] for row in test}
        own = tied(cells, tie, round(size / TIE) * len(tie), rng)
        return Rows(
            own,
            {
                "test": [row for row in test if follows[row]],
                "shifted": [row for row in test if not follows[row]],
                "even": test,
            },
            even(cells, len(own), rng),
        )

    pool = Pool(
        "dxy_age",
        "dxy, five diseases tied to the patient's age group (infant or child), cross-validated; all texts of a fold "
        "that follow the tie are `test`, all that do not `shifted`, both `even`",
        corpus,
        labels,
        label,
        group,
        AGE_WORDS,
        of_known_age,
        of_seed,
        DIAGNOSIS,
        folds=FOLDS,
    )
    return pool
