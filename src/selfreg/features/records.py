"""What is known of one feature: evidence, explanation, scores, votes and the verdict that they come to."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from selfreg.features.spans import Span

VerdictName: TypeAlias = Literal["Yes", "Probably", "Maybe", "No"]

VERDICTS: tuple[VerdictName, ...] = ("Yes", "Probably", "Maybe", "No")
"""The answers to every question of the method, from surest to least."""
POSITIVE_VERDICTS: tuple[VerdictName, ...] = VERDICTS[:2]


@dataclass(frozen=True)
class Neighbour:
    """A feature whose decoder direction points the same way.

    Attributes:
        feature (`int`): its number in the SAE.
        cosine (`float`): of the two decoder directions.
    """

    feature: int
    cosine: float


@dataclass(frozen=True)
class Score:
    """How well an explanation tells what the feature reacts to from what it does not.

    Attributes:
        balanced_accuracy (`float`): mean of the share right among positives and among negatives; 0.5 is chance.
        low (`float`), high (`float`): its 95 % interval.
        positives (`int`), negatives (`int`): how many of each were asked and decided.
    """

    balanced_accuracy: float
    low: float
    high: float
    positives: int
    negatives: int


@dataclass(frozen=True)
class Vote:
    """What one judge says of a feature: is it a legitimate reason for a label?

    Attributes:
        judge (`str`): name of the chat model, or of the person.
        verdict (`str`, *optional*): one of `VERDICTS`; None where the judge did not decide.
        probabilities (`dict[str, float]`): of each verdict; empty where there are none.
        reason (`str`, *optional*): a sentence.
        label (`str`, *optional*): the label that it is about; None: all of them.
        person (`bool`): a person's vote, which outranks those of models.
        at (`str`): when, in UTC (ISO 8601).
        rubric (`str`): beginning of the fingerprint of the rubric that a model judged by.
    """

    judge: str
    verdict: VerdictName | None
    probabilities: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    label: str | None = None
    person: bool = False
    at: str = ""
    rubric: str = ""

    @property
    def legitimate(self) -> bool:
        return self.verdict in POSITIVE_VERDICTS


@dataclass(frozen=True)
class FeatureRecord:
    """What is known of one feature.

    Attributes:
        feature (`int`): its number in the SAE.
        density (`float`): share of the tokens on which it is active.
        mean_activation (`float`): mean activation where it is active.
        max_activation (`float`): largest activation.
        num_texts (`int`): texts in which it is active; the same text counts once here and below.
        label_shares, group_shares (`dict[str, float]`): share of the texts of each label, or group, in which it is
            active; empty where the catalogue was built without them.
        spans (`list[Span]`): the texts that activate it most, strongest first, no text twice.
        quantile_spans (`list[list[Span]]`): of the other texts that activate it, some from each quarter of their
            largest activations, the weakest quarter first.
        near_misses (`list[Span]`): texts in which it is silent though they hold a word of the top spans, which is
            marked; activation 0.
        silent_spans (`list[Span]`): other texts in which it is silent, around a token at random; activation 0.
        nearest (`list[Neighbour]`): the features with the most similar decoder directions.
        promoted_tokens (`list[str]`): tokens whose unembedding the decoder direction points to (logit lens, without
            the final norm); empty where the backbone has no unembedding.
        explanation (`str`, *optional*): a phrase; None where nothing was asked, or the explainer could not tell.
        explanation_verdict (`str`, *optional*): does the phrase describe the spans?
        explained_by (`str`, *optional*): name of the explainer.
        scores (`dict[str, Score]`): of the explanation, by the names "detection", "fuzzing" and "probe".
        votes (`list[Vote]`): of all judges, models and persons.
        verdict (`str`, *optional*): is the feature a legitimate reason for a label? What the votes come to.
        verdict_probabilities (`dict[str, float]`): of each answer, mean over the votes that count.
        label_verdicts (`dict[str, str]`): the verdict for each label, where the rubric is per label.
        reason (`str`, *optional*): why, in a sentence.
        decided_by (`str`, *optional*), decided_at (`str`, *optional*): who gave the verdict, and when.
    """

    feature: int
    density: float = 0.0
    mean_activation: float = 0.0
    max_activation: float = 0.0
    spans: list[Span] = field(default_factory=list)
    num_texts: int = 0
    label_shares: dict[str, float] = field(default_factory=dict)
    group_shares: dict[str, float] = field(default_factory=dict)
    quantile_spans: list[list[Span]] = field(default_factory=list)
    near_misses: list[Span] = field(default_factory=list)
    silent_spans: list[Span] = field(default_factory=list)
    nearest: list[Neighbour] = field(default_factory=list)
    promoted_tokens: list[str] = field(default_factory=list)
    explanation: str | None = None
    explanation_verdict: VerdictName | None = None
    explained_by: str | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    votes: list[Vote] = field(default_factory=list)
    verdict: VerdictName | None = None
    verdict_probabilities: dict[str, float] = field(default_factory=dict)
    label_verdicts: dict[str, VerdictName] = field(default_factory=dict)
    reason: str | None = None
    decided_by: str | None = None
    decided_at: str | None = None

    @property
    def explained(self) -> bool:
        return self.explanation is not None and self.explanation_verdict in POSITIVE_VERDICTS

    @property
    def legitimate(self) -> bool:
        return self.verdict in POSITIVE_VERDICTS

    @property
    def judged(self) -> bool:
        """Whether its verdict counts: models' on a feature that is explained, a person's on any."""
        return self.verdict is not None and (self.explained or any(vote.person for vote in self.votes))

    @property
    def unintended_for(self) -> list[str] | None:
        """The labels that the feature is no legitimate reason for, where it was judged for each label."""
        if not self.label_verdicts or not (self.explained or any(vote.person for vote in self.votes)):
            return None
        return [label for label, verdict in self.label_verdicts.items() if verdict not in POSITIVE_VERDICTS]

    @property
    def why(self) -> str:
        """What a verdict rests on: a person's own reason, where a person decided, else what the feature stands for."""
        by_person = any(vote.person and vote.judge == self.decided_by for vote in self.votes)
        return (self.reason if by_person else None) or self.explanation or "without an explanation"


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
