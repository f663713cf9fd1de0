"""A person goes through a catalogue: which features come first, and decisions that are on disk at once."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from selfreg.features.decisions import DecisionLog, check_features, check_verdict, with_vote, without_vote
from selfreg.features.records import POSITIVE_VERDICTS, FeatureRecord, Vote, now
from selfreg.features.votes import settle, split_votes

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog

Selection: TypeAlias = Literal["split", "undecided", "unintended", "all"]
"""Features: that judges disagree on, that are explained and have no verdict, that are not legitimate, or all."""


def select(records: Iterable[FeatureRecord], only: Selection) -> list[FeatureRecord]:
    """The features of a selection. Those that are never active, and that nobody voted on, are in none.

    - `split`: judges disagree and no person has decided, the most evenly split first.
    - `undecided`: explained, but without a verdict.
    - `unintended`: what `FeatureCatalog.unintended` takes, the least legitimate first.
    - `all`: in the order of their numbers.

    Raises:
        ValueError: there is no such selection.
    """
    seen = [record for record in records if record.spans or record.votes]
    match only:
        case "split":
            return split_votes(seen)
        case "undecided":
            return [record for record in seen if record.explained and record.verdict is None]
        case "unintended":
            found = [record for record in seen if record.judged and not record.legitimate]
            return sorted(found, key=lambda record: -record.verdict_probabilities.get("No", 0.0))
        case "all":
            return seen
        case _:
            raise ValueError(f"only={only!r} must be one of {', '.join(get_args(Selection))}")


def review_order(records: Sequence[FeatureRecord], *, by: str) -> list[FeatureRecord]:
    """The features that a person has not decided yet, those first for which that matters most.

    Split votes come first, then explained features without a verdict, then those with one, the least sure first; then
    the rest, the most active first, and at the end what another person has decided.
    """
    split = {record.feature: place for place, record in enumerate(select(records, "split"))}

    def order(record: FeatureRecord) -> tuple[float, ...]:
        if record.feature in split:
            return 0, split[record.feature]
        if any(vote.person for vote in record.votes):
            return 4, -record.density
        if not record.explained:
            return 3, -record.density
        if record.verdict is None:
            return 1, -record.density
        return 2, _sureness(record), -record.density

    return sorted((record for record in select(records, "all") if own_vote(record, by) is None), key=order)


def own_vote(record: FeatureRecord, by: str) -> Vote | None:
    """What a person decided of a feature as a whole; None where that person did not."""
    own = [vote for vote in record.votes if vote.person and vote.judge == by and vote.label is None]
    return own[-1] if own else None


def evenly_split(record: FeatureRecord) -> bool:
    """Whether its votes come to nothing since as many are for as against."""
    return settle(record.votes).split


def _sureness(record: FeatureRecord) -> float:
    likely = sum(record.verdict_probabilities.get(verdict, 0.0) for verdict in POSITIVE_VERDICTS)
    return abs(likely - 0.5)


class DecisionMaker:
    """Takes a person's verdicts on the features of a catalogue that is in a folder.

    Args:
        catalog: the catalogue; its records change with every verdict.
        folder: where it is saved. Every verdict is appended to `decisions.jsonl` there before this goes on.
        by: who decides.

    Raises:
        ValueError: `by` is empty.
    """

    def __init__(self, catalog: "FeatureCatalog", folder: str | os.PathLike[str], *, by: str) -> None:
        if not by.strip():
            raise ValueError("by is empty: a verdict needs somebody's name")
        self.catalog, self.by = catalog, by
        self._log = DecisionLog(folder, catalog.info["sae_fingerprint"])

    def decide(self, feature: int, verdict: str, *, reason: str | None = None) -> Vote | None:
        """Takes a verdict; gives this person's earlier one, for `restore`."""
        check_features([feature], len(self.catalog), "decide")
        earlier = own_vote(self.catalog[feature], self.by)
        vote = Vote(self.by, check_verdict(verdict), reason=reason, person=True, at=now())
        self._log.add(feature, vote)
        self._change(feature, vote, with_vote)
        return earlier

    def restore(self, feature: int, earlier: Vote | None) -> None:
        """Takes this person's verdict back, to what was there before it."""
        if earlier is not None:
            self._log.add(feature, earlier)
            self._change(feature, earlier, with_vote)
            return
        vote = own_vote(self.catalog[feature], self.by)
        if vote is not None:
            self._log.add(feature, vote, undone=True)
            self._change(feature, vote, without_vote)

    def _change(self, feature: int, vote: Vote, change: Callable[[FeatureRecord, Vote], FeatureRecord]) -> None:
        self.catalog.records[feature] = change(self.catalog[feature], vote)


class _Step(NamedTuple):
    position: int
    earlier: Vote | None


class ReviewSession:
    """A walk through features: decide, skip, go back, undo.

    Args:
        decisions: takes the verdicts.
        features: in the order in which they are shown.

    Attributes:
        position (`int`): index of the feature that is shown.
        changed (`bool`): a verdict was taken, though it may have been undone since.
    """

    def __init__(self, decisions: DecisionMaker, features: Sequence[int]) -> None:
        self.decisions, self.features = decisions, list(features)
        self.position = 0
        self.changed = False
        self._steps: list[_Step] = []

    @property
    def done(self) -> bool:
        """Whether there is no feature left to show."""
        return self.position >= len(self.features)

    @property
    def feature(self) -> int:
        return self.features[self.position]

    @property
    def record(self) -> FeatureRecord:
        return self.decisions.catalog[self.feature]

    @property
    def num_decided(self) -> int:
        """Features that were decided in this walk, and not undone."""
        return len({self.features[step.position] for step in self._steps})

    @property
    def num_open(self) -> int:
        """Features that this person has not decided, in this walk or before."""
        catalog, by = self.decisions.catalog, self.decisions.by
        return sum(own_vote(catalog[feature], by) is None for feature in self.features)

    def decide(self, verdict: str) -> None:
        """Takes a verdict on the feature that is shown, and goes on to the next one."""
        earlier = self.decisions.decide(self.feature, verdict)
        self.changed = True
        self._steps.append(_Step(self.position, earlier))
        self.position += 1

    def skip(self) -> None:
        self.position = min(self.position + 1, len(self.features))

    def back(self) -> bool:
        """Goes to the feature before; False where there is none."""
        moved = self.position > 0
        self.position -= moved
        return moved

    def undo(self) -> bool:
        """Takes the last decision of this walk back, and goes to its feature; False where there is none."""
        if not self._steps:
            return False
        step = self._steps[-1]
        self.decisions.restore(self.features[step.position], step.earlier)
        self._steps.pop()
        self.position = step.position
        return True
