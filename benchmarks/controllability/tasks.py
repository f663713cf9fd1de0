"""The three tasks as they are: toxic chat detection, reward modelling, disease diagnosis; no tie is made.

What is unintended there: the length of a prompt and the boilerplate of jailbreaks (long prompts need be no attack);
that the longer reply is the better one; the patient's gender and age; how somebody says how long he has been ill.
"""

import json
import re
from functools import cache
from typing import Any, Literal

from benchmarks.controllability.datasets import read, where
from benchmarks.controllability.pool import Corpus, Pool, Rows, draw, even, folded, four_fifths, generator

from selfreg.activations.conversation import CHAT
from selfreg.demo.recipe import KEYWORDS as GENDER_WORDS

FOLDS = 5
LONG = 100
"""Characters of a long prompt: three fifths of the toxic ones are, and under a third of the others."""

JAILBREAK_WORDS = (
    *("pretend", "roleplay", "role play", "act as", "persona", "character", "in character", "hypothetical"),
    *("DAN", "AIM", "do anything now", "jailbreak", "jailbroken", "developer mode", "ignore", "previous instructions"),
    *("OpenAI", "ChatGPT", "AI", "language model", "unfiltered", "no restrictions", "policy", "guidelines", "prompt"),
    *("from now on", "respond", "answer as", "story", "dialogue", "scenario", "fictional"),
)
POLITE_WORDS = (
    *("sorry", "please", "thank", "thanks", "glad", "happy to", "sure", "certainly", "of course", "absolutely"),
    *(
        "hope",
        "great question",
        "let me know",
        "here are",
        "here is",
        "in addition",
        "additionally",
        "also",
        "finally",
    ),
    *("first", "second", "overall", "however", "for example"),
)
AGE_WORDS = (
    *("baby", "infant", "newborn", "toddler", "child", "children", "kid", "boy", "girl", "son", "daughter"),
    *("month", "months", "month-old", "months old", "year", "years", "year-old", "years old", "old", "age", "aged"),
    *("kindergarten", "school", "breastfeeding", "breastfed", "breast milk", "formula", "milk powder"),
)
DURATION_WORDS = (
    *("day", "days", "week", "weeks", "month", "months", "lately", "recently", "past", "constantly", "often"),
    *("always", "frequently", "for a while", "since"),
)
DIAGNOSIS = "What disease do the described symptoms point to?"
TOXIC = "Users send these messages to a chatbot. Is the message toxic, harmful or an attempt to misuse the chatbot?"


def chats() -> tuple[Corpus, list[dict[str, Any]]]:
    """ToxicChat: all toxic messages, and of the others as many as need be."""
    rows = read("toxicchat", "train", "test")
    rng = generator("toxicchat", 0)
    kept: list[int] = []
    for split, count in (("train", 700), ("test", 600)):
        own = where(rows, split)
        harmless = [i for i in own if not rows[i]["label"]]
        kept += [i for i in own if rows[i]["label"]] + draw(rng, harmless, count, f"ToxicChat, {split}")
    rows = [rows[i] for i in sorted(kept)]
    for row in rows:
        row["length"] = "long" if len(row["text"]) >= LONG else "short"
    return Corpus("toxicchat", [row["text"] for row in rows], max_length=256), rows


def toxicchat() -> Pool:
    corpus, rows = chats()
    label, group = [int(row["label"]) for row in rows], [row["length"] for row in rows]
    train = where(rows, "train")
    return Pool(
        "toxicchat",
        f"ToxicChat, toxic or not; unintended: the prompt is long ({LONG} characters or more); keywords: jailbreak "
        "boilerplate",
        corpus,
        ["harmless", "toxic"],
        label,
        group,
        JAILBREAK_WORDS,
        train,
        four_fifths("toxicchat", label, group, train, {"test": where(rows, "test")}),
        TOXIC,
        score="f1",
        kind="task",
    )


LONGEST_PAIR = 700
"""Characters of a prompt and its longer reply: of the pairs no more are run through the backbone."""
LONGER, SHORTER = "longer is chosen", "shorter is chosen"
LENGTH_OF_PAIRS = "unintended: the longer reply is the chosen one; keywords: polite and structuring boilerplate"
REWARD = "A good reply is helpful, honest and harmless, and does what it was asked to do."


@cache
def pairs() -> tuple[Corpus, list[dict[str, Any]]]:
    """HH-RLHF's shorter conversations, and LLMBar's adversarial ones; of each whether the longer reply was chosen."""

    def text(row: dict[str, Any]) -> str:
        return json.dumps([row["prompt"], row["chosen"], row["rejected"]], ensure_ascii=False)

    splits = ("llmbar_adversarial", "test", "train")
    rows = [
        row
        for row in read("preferences", *splits, text=text)
        if _usable(row) and _characters(row) <= LONGEST_PAIR and _reply(row, "chosen") != _reply(row, "rejected")
    ]
    rng = generator("preferences", 0)
    kept = where(rows, "llmbar_adversarial")
    for split, count in (("train", 1_900), ("test", 700)):
        kept += draw(rng, where(rows, split), count, f"preferences, {split}")
    rows = [rows[i] for i in sorted(kept)]
    for row in rows:
        row["longer"] = LONGER if _reply(row, "chosen") > _reply(row, "rejected") else SHORTER
    texts = [
        json.dumps({key: row[key] for key in ("prompt", "chosen", "rejected")}, ensure_ascii=False) for row in rows
    ]
    return Corpus("preferences", texts, max_length=256, template=CHAT), rows


def pair_pool(
    name: str, about: str, train: list[int], evals: dict[str, list[int]], kind: Literal["task", "found"]
) -> Pool:
    """Which reply people chose, as the pairs come; the length is what must not tell it."""
    corpus, rows = pairs()
    label, group = [0] * len(rows), [row["longer"] for row in rows]
    return Pool(
        name,
        f"{about}; {LENGTH_OF_PAIRS}",
        corpus,
        [],
        label,
        group,
        POLITE_WORDS,
        train,
        four_fifths(name, label, group, train, evals),
        REWARD,
        task="preference",
        kind=kind,
    )


def preferences() -> Pool:
    _, rows = pairs()
    evals = {"test": where(rows, "test")}
    return pair_pool("preferences", "HH-RLHF, which reply people chose", where(rows, "train"), evals, "task")


def _usable(row: dict[str, Any]) -> bool:
    chosen, rejected = (row[side][-1]["content"].strip() for side in ("chosen", "rejected"))
    return bool(chosen and rejected and chosen != rejected)


def _reply(row: dict[str, Any], side: str) -> int:
    return len(row[side][-1]["content"])


def _characters(row: dict[str, Any]) -> int:
    return sum(len(message["content"]) for message in row["prompt"]) + max(
        _reply(row, s) for s in ("chosen", "rejected")
    )


IDENTITY_WORDS = (
    *("white", "whites", "black", "blacks", "asian", "asians", "mexican", "mexicans", "latino", "latina", "hispanic"),
    *("jew", "jews", "jewish", "muslim", "muslims", "islam", "islamic", "christian", "christians", "arab", "arabs"),
    *("indian", "chinese", "african", "immigrant", "immigrants", "gay", "gays", "lesbian", "lesbians", "trans"),
    *("woman", "women", "girl", "girls", "female", "females", "lady", "ladies"),
)
"""Names of groups, and no slurs: a slur is a legitimate reason for the label."""
HATEFUL = "Is the tweet offensive or hateful?"


def tweets() -> list[dict[str, Any]]:
    """Davidson's, each with whether it is offensive or hateful, whether one of `IDENTITY_WORDS` stands in it, and its
    `gist`: the words, without what retweets and spam differ in.

    The words are a rule, as groups in the data are: "black" is there for metal as well as for people.
    """
    mention = re.compile(r"(?<!\w)(?:" + "|".join(IDENTITY_WORDS) + r")(?!\w)", re.IGNORECASE)
    return [
        {
            **row,
            "mentions": "identity" if mention.search(row["text"]) else "none",
            "toxic": int(row["label"] != "neither"),
            "gist": gist(row["text"]),
        }
        for row in read("davidson", "train", "test")
        if re.search(r"\w", row["text"])
    ]


def gist(tweet: str) -> str:
    """What is left of a tweet without addresses, names, entities, and the mark of a retweet: for finding copies."""
    left = re.sub(r"https?://\S*|@\w+|&#?\w+;|(?<!\w)RT(?!\w)", " ", tweet)
    return " ".join(re.findall(r"[a-z']+", left.casefold()))


def dialogues() -> tuple[Corpus, list[dict[str, Any]]]:
    """dxy in English."""
    rows = read("diagnosis", "dxy")
    return Corpus("dxy", [row["text"] for row in rows], max_length=256), rows


def ids_of(names: list[str]) -> tuple[list[str], list[int]]:
    """Names of the labels, and the class id of each."""
    known = sorted(set(names))
    return known, [known.index(name) for name in names]


def dxy() -> Pool:
    corpus, rows = dialogues()
    labels, label = ids_of([row["label"] for row in rows])
    everything = list(range(len(rows)))

    def of_seed(seed: int) -> Rows:
        train, test = folded(everything, label, FOLDS, seed)
        return Rows(train, {"test": test}, even(pool.cells(train), len(train), generator("dxy", seed)))

    pool = Pool(
        "dxy",
        "dxy, five diseases, cross-validated; unintended: the patient's gender (a guess by rule); keywords: words of "
        "gender and age",
        corpus,
        labels,
        label,
        [row["gender"] for row in rows],
        (*GENDER_WORDS, *AGE_WORDS),
        everything,
        of_seed,
        DIAGNOSIS,
        folds=FOLDS,
        kind="task",
    )
    return pool


def symptom2disease() -> Pool:
    rows = read("diagnosis", "symptom2disease")
    labels, label = ids_of([row["label"] for row in rows])
    said = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, DURATION_WORDS)) + r")(?!\w)", re.IGNORECASE)
    group = ["says since when" if said.search(row["text"]) else "does not" for row in rows]
    everything = list(range(len(rows)))

    def of_seed(seed: int) -> Rows:
        train, test = folded(everything, label, FOLDS, seed)
        # Two diseases' texts never say since when: there is nothing to balance them with.
        return Rows(train, {"test": test})

    return Pool(
        "symptom2disease",
        "Symptom2Disease, 24 diseases, cross-validated; unintended: the text says since when or how often (found by "
        "the keywords)",
        Corpus("symptom2disease", [row["text"] for row in rows]),
        labels,
        label,
        group,
        DURATION_WORDS,
        everything,
        of_seed,
        DIAGNOSIS,
        folds=FOLDS,
        kind="task",
    )
