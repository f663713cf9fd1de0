"""Votes of several judges -> one verdict, how far the judges agree, and the features that a person must decide."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from sklearn.metrics import cohen_kappa_score

from selfreg.features.records import POSITIVE_VERDICTS, VERDICTS, FeatureRecord, VerdictName, Vote

_RESAMPLES = 1000
_FEWEST = 10


@dataclass(frozen=True)
class Settled:
    """What votes come to.

    Attributes:
        verdict (`str`, *optional*): one of `VERDICTS`; None where nobody decided, or the judges are evenly split.
        probabilities (`dict[str, float]`): of each verdict, mean over the votes that count; empty where nobody
            decided. Per label, those of the label that gave the verdict.
        label_verdicts (`dict[str, str]`): the verdict for each label that has one.
        reason (`str`, *optional*): of the first vote for the winning side that has one.
        decided_by (`str`, *optional*): names of those who voted for the winning side: "a, b".
        decided_at (`str`, *optional*): when the last of them did.
        split (`bool`): the judges are evenly split, for a label at least, and no person has decided.
    """

    verdict: VerdictName | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    label_verdicts: dict[str, VerdictName] = field(default_factory=dict)
    reason: str | None = None
    decided_by: str | None = None
    decided_at: str | None = None
    split: bool = False


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on what is legitimate (Yes, Probably) and what is not.

    Attributes:
        first (`str`), second (`str`): their names.
        features (`int`): questions that both decided: features, or features times labels where both voted per label.
        kappa (`float`, *optional*): Cohen's kappa, 1: always of one mind, 0: no more than by chance. None where it is
            undefined: both gave one and the same answer throughout.
        low (`float`, *optional*), high (`float`, *optional*): its 95 % bootstrap interval over features; None where
            kappa is, for fewer than 10 features, and where resamples show no spread: all agree, or one always says
            the same.
        observed (`float`): share of the questions that they answered alike.
    """

    first: str
    second: str
    features: int
    kappa: float | None
    low: float | None
    high: float | None
    observed: float


def settle(votes: Iterable[Vote]) -> Settled:
    """What the votes on a feature come to.

    - Of each judge the latest vote counts (by `at`; among equals the later in the list). One without a verdict takes
      the earlier one back, and counts for nothing else.
    - A person's vote outranks those of all models; among persons the latest vote decides.
    - Models decide by majority: legitimate (Yes, Probably) or not (Maybe, No). An even split is left to a person.
    - Of the verdicts that the winning side gave, the one with the largest mean probability wins; on a tie the surer
      one: Yes before Probably, No before Maybe. A vote without probabilities counts as quite sure.
    - Votes on labels are settled label by label; a vote without a label is a vote on each of them. The feature's own
      verdict is that of its most legitimate label: it is unintended only if it is legitimate for no label, so that
      while a label is open (split, or undecided) and none is legitimate, there is no verdict.
    """
    votes = list(votes)
    labels = list(dict.fromkeys(vote.label for vote in votes if vote.label is not None))
    if not labels:
        return _settle_one(votes)
    by_label = {label: _settle_one([vote for vote in votes if vote.label in (label, None)]) for label in labels}
    decided = {label: settled for label, settled in by_label.items() if settled.verdict is not None}
    label_verdicts = {label: settled.verdict for label, settled in decided.items() if settled.verdict is not None}
    split = any(settled.split for settled in by_label.values())
    # Of equal verdicts the one with the higher probability of being legitimate, then the first label.
    best = min(
        decided.values(),
        key=lambda settled: (_rank(settled.verdict), -_probability_legitimate(settled.probabilities)),
        default=None,
    )
    if best is None or (best.verdict not in POSITIVE_VERDICTS and len(decided) < len(labels)):
        open_label = next(settled for settled in by_label.values() if settled.verdict is None)
        return Settled(None, open_label.probabilities, label_verdicts, split=split)
    return replace(best, label_verdicts=label_verdicts, split=split)


def settled_record(record: FeatureRecord) -> FeatureRecord:
    """The record with what its votes come to."""
    settled = settle(record.votes)
    return replace(
        record,
        verdict=settled.verdict,
        verdict_probabilities=settled.probabilities,
        label_verdicts=settled.label_verdicts,
        reason=settled.reason,
        decided_by=settled.decided_by,
        decided_at=settled.decided_at,
    )


def split_votes(records: Iterable[FeatureRecord]) -> list[FeatureRecord]:
    """The features on which models disagree and no person has decided, the most evenly split first.

    Evenly split are those that `settle` leaves open; after them come majorities, the narrowest first, and among equal
    ones those whose mean probability of being legitimate is nearest to one half. Per label, the most even one counts.
    """
    found = []
    for record in records:
        labels: set[str | None] = {vote.label for vote in record.votes if vote.label is not None}
        evenness = []
        for label in labels or {None}:
            counting = _counting([vote for vote in record.votes if vote.label in (label, None)])
            share = sum(vote.legitimate for vote in counting) / max(len(counting), 1)
            if 0 < share < 1:
                likely = _probability_legitimate(_mean_probabilities(counting))
                evenness.append((abs(share - 0.5), abs(likely - 0.5)))
        if evenness:
            found.append((min(evenness), record.feature, record))
    return [record for _, _, record in sorted(found, key=lambda entry: entry[:2])]


def agreement(records: Iterable[FeatureRecord], *, seed: int = 0) -> list[Agreement]:
    """How far each pair of judges agrees, persons too; pairs that decided nothing in common are left out.

    Compared is whether they take a feature for legitimate: for each label where both voted per label, else overall (a
    judge who voted per label takes a feature for legitimate if it is so for any label). The interval resamples
    features, since the labels of one feature hang together.

    Args:
        records: features with votes.
        seed: of the bootstrap.
    """
    # Of each judge: feature -> label -> is it legitimate?
    answers: dict[tuple[bool, str], dict[int, dict[str | None, bool]]] = {}
    for record in records:
        for judge in dict.fromkeys((vote.person, vote.judge) for vote in record.votes):
            settled = settle(vote for vote in record.votes if (vote.person, vote.judge) == judge)
            found: dict[str | None, bool] = {
                label: verdict in POSITIVE_VERDICTS for label, verdict in settled.label_verdicts.items()
            }
            if settled.verdict is not None:
                found[None] = settled.verdict in POSITIVE_VERDICTS
            answers.setdefault(judge, {})[record.feature] = found
    agreements = []
    for first, second in combinations(answers, 2):
        pairs = [
            _common(answers[first][feature], answers[second][feature])
            for feature in answers[first]
            if feature in answers[second]
        ]
        pairs = [pair for pair in pairs if pair]
        if pairs:
            agreements.append(_agreement(first[1], second[1], pairs, seed))
    return agreements


# Of each side: legitimate or not.
_SUREST_FIRST: tuple[VerdictName, ...] = ("Yes", "Probably", "No", "Maybe")


def _settle_one(votes: Sequence[Vote]) -> Settled:
    counting = _counting(votes)
    if not counting:
        return Settled()
    probabilities = _mean_probabilities(counting)
    legitimate = sum(vote.legitimate for vote in counting)
    if 2 * legitimate == len(counting):
        return Settled(None, probabilities, split=True)
    winners = [vote for vote in counting if vote.legitimate == (2 * legitimate > len(counting))]
    given = {vote.verdict for vote in winners}
    surest_first = [verdict for verdict in _SUREST_FIRST if verdict in given]
    verdict: VerdictName = max(surest_first, key=lambda verdict: probabilities[verdict])  # the first of equal ones
    return Settled(
        verdict=verdict,
        probabilities=probabilities,
        reason=next((vote.reason for vote in winners if vote.reason), None),
        decided_by=", ".join(dict.fromkeys(vote.judge for vote in winners)),
        decided_at=max(vote.at for vote in winners) or None,
    )


def _counting(votes: Sequence[Vote]) -> list[Vote]:
    """The votes that count, in the order of time: the latest person's alone, else the latest of each model."""
    latest: dict[tuple[bool, str], Vote] = {}
    for vote in sorted(votes, key=lambda vote: vote.at):  # stable; the times of `now()` sort as text
        latest.pop((vote.person, vote.judge), None)
        latest[vote.person, vote.judge] = vote
    decided = [vote for vote in latest.values() if vote.verdict is not None]
    persons = [vote for vote in decided if vote.person]
    return persons[-1:] or decided


def _mean_probabilities(votes: Sequence[Vote]) -> dict[str, float]:
    rows = [vote.probabilities or {str(vote.verdict): 1.0} for vote in votes]
    return {verdict: sum(row.get(verdict, 0.0) for row in rows) / max(len(rows), 1) for verdict in VERDICTS}


def _probability_legitimate(probabilities: dict[str, float]) -> float:
    return sum(probabilities[verdict] for verdict in POSITIVE_VERDICTS)


def _rank(verdict: VerdictName | None) -> int:
    return VERDICTS.index(verdict) if verdict is not None else len(VERDICTS)


def _common(first: dict[str | None, bool], second: dict[str | None, bool]) -> list[tuple[bool, bool]]:
    """The answers of two judges to what both decided of one feature."""
    labels: list[str | None] = [label for label in first if label is not None and label in second]
    if not labels and None in first and None in second:
        labels = [None]
    return [(first[label], second[label]) for label in labels]


def _agreement(first: str, second: str, pairs: Sequence[Sequence[tuple[bool, bool]]], seed: int) -> Agreement:
    flat = [pair for group in pairs for pair in group]
    ours, theirs = zip(*flat, strict=True)
    observed = sum(a == b for a, b in flat) / len(flat)
    if len({*ours, *theirs}) == 1:
        return Agreement(first, second, len(flat), None, None, None, observed)
    kappa = float(cohen_kappa_score(ours, theirs))
    low = high = None
    if len(pairs) > 1:
        low, high = _interval(pairs, seed) if len(pairs) >= _FEWEST else (None, None)
    return Agreement(first, second, len(flat), kappa, low, high, observed)


def _interval(pairs: Sequence[Sequence[tuple[bool, bool]]], seed: int) -> tuple[float | None, float | None]:
    """95 % of the kappas of resampled features. Closed form: scikit-learn's would take a second for each pair."""
    # Of each feature: how often both say yes, only the first, only the second, neither.
    counts_N4 = np.array([[group.count(kind) for kind in _KINDS] for group in pairs], dtype=float)
    picks = np.random.default_rng(seed).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    both, first, second, neither = (counts_N4[picks].sum(axis=1)).T
    total = both + first + second + neither
    chance = ((both + first) * (both + second) + (first + neither) * (second + neither)) / total**2
    # Where all answers of a resample are the same kappa is undefined, and it tells nothing.
    defined = chance < 1
    if not defined.any():
        return None, None
    kappas = ((both + neither) / total - chance)[defined] / (1 - chance[defined])
    low, high = np.quantile(kappas, (0.025, 0.975))
    # Where all agree, or one judge always says the same, every resample does: that is no certainty.
    return (float(low), float(high)) if low < high else (None, None)


_KINDS = ((True, True), (True, False), (False, True), (False, False))
