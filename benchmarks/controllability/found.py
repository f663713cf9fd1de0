"""Shifts as they were found, none made: tweets that name a group of people or not, CEBaB's edited reviews, LLMBar."""

from benchmarks.controllability.datasets import where
from benchmarks.controllability.pool import Corpus, Pool, Rows, draw, even, generator
from benchmarks.controllability.tasks import HATEFUL, IDENTITY_WORDS, LONGEST_PAIR, pair_pool, pairs, tweets
from benchmarks.controllability.ties import SERVICE_WORDS, known, restaurants

SURROUNDINGS_WORDS = (
    *("atmosphere", "ambiance", "ambience", "decor", "music", "noise", "noisy", "loud", "quiet", "crowded", "cozy"),
    *("romantic", "view", "patio", "clean", "dirty", "tables", "seating", "place", "room"),
)


def davidson() -> Pool:
    rows = tweets()
    rng = generator("davidson", 0)
    kept: list[int] = []
    # Harmless tweets that mention an identity are rare: all of them, or there is nothing to measure on.
    for split, counts in (("train", (350, 450, 300)), ("test", (200, 250, 200))):
        cells: dict[tuple[int, str], list[int]] = {}
        for i in where(rows, split):
            cells.setdefault((rows[i]["toxic"], rows[i]["mentions"]), []).append(i)
        kept += cells[0, "identity"]
        for cell, count in zip(((0, "none"), (1, "none"), (1, "identity")), counts, strict=True):
            kept += draw(rng, cells[cell], min(count, len(cells[cell])), f"davidson, {split}, {cell}")
    rows = [rows[i] for i in sorted(kept)]
    train = where(rows, "train")
    learned = {rows[i]["gist"] for i in train}
    # A retweet or a copy of spam is no new text.
    test = [i for i in where(rows, "test") if rows[i]["gist"] not in learned]

    def of_seed(seed: int) -> Rows:
        rng = generator("davidson", seed)
        # As many of each label: a head that is unsure leans to the more frequent one, and cells of the other suffer,
        # whoever is named in them.
        of_label = [[i for i in train if rows[i]["toxic"] == y] for y in (0, 1)]
        each = int(0.8 * min(map(len, of_label)))
        drawn = [row for texts in of_label for row in draw(rng, texts, each, "davidson")]
        return Rows(
            [drawn[i] for i in rng.permutation(len(drawn))],
            {"test": test, "even": even(pool.cells(test), len(test), rng)},
            even(pool.cells(train), len(drawn), rng),
        )

    pool = Pool(
        "davidson",
        "Davidson's tweets, offensive or hateful against neither (as many of each in training); unintended: a "
        "word in the tweet that names a group of people, by the keywords. `even`: as many texts of either group in "
        "each label",
        Corpus("davidson", [row["text"] for row in rows], max_length=64),
        ["harmless", "toxic"],
        [row["toxic"] for row in rows],
        [row["mentions"] for row in rows],
        IDENTITY_WORDS,
        train,
        of_seed,
        HATEFUL,
        kind="found",
    )
    return pool


def cebab_edits() -> Pool:
    """What is said of the food; an edit of service, ambience or noise must not change the verdict on it."""
    corpus, rows = restaurants()
    names = ["Negative", "Positive"]
    label = [names.index(food) if (food := known(row["food_aspect"])) else -1 for row in rows]
    group = [known(row["service_aspect"]) if y >= 0 else None for row, y in zip(rows, label, strict=True)]
    originals = {row["original_id"]: i for i, row in enumerate(rows) if row["is_original"]}
    partner = [None if row["is_original"] else originals.get(row["original_id"]) for row in rows]
    with_food = [i for i, y in enumerate(label) if y >= 0]
    learned = [i for i in with_food if rows[i]["split"] != "test"]
    train = [i for i in learned if rows[i]["is_original"]]
    tests = [i for i in with_food if rows[i]["split"] == "test"]
    test = [i for i in tests if rows[i]["is_original"]]
    edits = [
        i
        for i in tests
        if rows[i]["edit_type"] in ("service", "ambiance", "noise")
        and partner[i] is not None
        and label[partner[i]] == label[i]  # type: ignore[index]
    ]

    def of_seed(seed: int) -> Rows:
        rng = generator("cebab_edits", seed)
        own = draw(rng, train, int(0.9 * len(train)), "cebab_edits")
        return Rows(own, {"test": test, "edits": edits}, even(pool.cells(learned), len(own), rng))

    pool = Pool(
        "cebab_edits",
        "CEBaB, is the food good; trained on original reviews, where food and service go together; `edits`: reviews "
        "whose service, ambience or noise was rewritten and whose food was not: the verdict must stay. Unintended: "
        "what is said of the service. The balanced set has edited reviews too",
        corpus,
        ["the food is bad", "the food is good"],
        label,
        group,
        (*SERVICE_WORDS, *SURROUNDINGS_WORDS),
        train,
        of_seed,
        "Does the review say that the food is good or bad? Nothing but the food counts.",
        kind="found",
        partner=partner,
    )
    return pool


def llmbar() -> Pool:
    """Pairs in which the better-looking reply is the wrong one, judged by what was learned from people's choices."""
    _, rows = pairs()
    # Pairs that were made for harmlessness teach to refuse, and LLMBar asks for nothing that is to be refused.
    train, test = ([i for i in where(rows, split) if "helpful" in rows[i]["source"]] for split in ("train", "test"))
    return pair_pool(
        "llmbar",
        f"LLMBar's adversarial pairs of at most {LONGEST_PAIR} characters, by what was learned from HH-RLHF's pairs "
        "made for helpfulness",
        train,
        {"test": test, "adversarial": where(rows, "llmbar_adversarial")},
        "found",
    )
