"""Fills a catalogue with chat models' answers: explanations, their scores, and votes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from selfreg.features.answer_cache import AnswerCache, CachingChatModel, cached
from selfreg.features.chat import ChatModel
from selfreg.features.decisions import check_features
from selfreg.features.explainer import Explanation, explain_features
from selfreg.features.judge import judge_features
from selfreg.features.probe import probe_scores
from selfreg.features.records import FeatureRecord, Score, Vote
from selfreg.features.rubric import Rubric
from selfreg.features.scoring import detection_scores, fuzzing_scores
from selfreg.features.votes import settled_record
from selfreg.utils.progress import progress

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog

CachePath = str | os.PathLike[str] | None


def _chosen(catalog: "FeatureCatalog", features: Sequence[int] | None) -> list[FeatureRecord]:
    if features is None:
        return list(catalog)
    check_features(features, len(catalog), "features")
    return [catalog[feature] for feature in dict.fromkeys(features)]


def _with_cache(chat: ChatModel, path: CachePath) -> ChatModel:
    return chat if path is None else cached(chat, AnswerCache(path))


def _status(chat: ChatModel) -> Callable[[], str] | None:
    """What is shown beside a bar: only models that count what they are asked can tell."""
    return chat.usage.watch() if isinstance(chat, CachingChatModel) else None


def explain_catalog(
    catalog: "FeatureCatalog", chat: ChatModel, features: Sequence[int] | None, cache: CachePath
) -> None:
    """See `FeatureCatalog.explain`."""
    wanted = [record for record in _chosen(catalog, features) if record.spans]
    chat = _with_cache(chat, cache)

    def keep(feature: int, explanation: Explanation) -> None:
        record = catalog[feature]
        if explanation.text != record.explanation:
            # Scores and models' votes are of the explanation that they were given for.
            persons = [vote for vote in record.votes if vote.person]
            record = settled_record(replace(record, scores={}, votes=persons))
        catalog.records[feature] = replace(
            record,
            explanation=explanation.text,
            explanation_verdict=explanation.verdict,
            explained_by=chat.name,
        )

    with progress("explanations", len(wanted), "features", status=_status(chat)) as advance:
        explain_features(
            chat,
            {record.feature: record.spans for record in wanted},
            near_misses={record.feature: record.near_misses for record in wanted},
            progress=advance,
            on_result=keep,
        )


def score_catalog(
    catalog: "FeatureCatalog",
    chat: ChatModel | None,
    features: Sequence[int] | None,
    cache: CachePath,
    max_examples: int,
) -> None:
    """See `FeatureCatalog.score`."""
    wanted = [record for record in _chosen(catalog, features) if record.explanation is not None]
    if not wanted:
        raise ValueError("no feature has an explanation that could be scored: call explain first")

    def keeper(name: str) -> Callable[[int, Score], None]:
        def keep(feature: int, score: Score) -> None:
            catalog.update(feature, scores={**catalog[feature].scores, name: score})

        return keep

    keep_probe = keeper("probe")
    for feature, score in probe_scores(wanted).items():
        keep_probe(feature, score)
    if chat is None:
        return
    chat = _with_cache(chat, cache)
    for name, ask in (("detection", detection_scores), ("fuzzing", fuzzing_scores)):
        with progress(f"{name} scores", len(wanted), "features", status=_status(chat)) as advance:
            ask(
                chat,
                wanted,
                max_examples=max_examples,
                progress=advance,
                on_result=keeper(name),
            )


def judge_catalog(
    catalog: "FeatureCatalog",
    chats: Sequence[ChatModel],
    rubric: Rubric,
    features: Sequence[int] | None,
    cache: CachePath,
    reasons: bool,
) -> None:
    """See `FeatureCatalog.judge`."""
    if not chats:
        raise ValueError("no judge: give a chat model, or several that vote")
    names = [chat.name for chat in chats]
    if len(set(names)) < len(names):
        raise ValueError(f"judges {names}: each needs a name of its own, since each has one vote")
    wanted = [record for record in _chosen(catalog, features) if record.explained]
    if not wanted:
        raise ValueError(
            "no feature has an explanation that describes its spans: call explain first; if it was called, the chat "
            "model found none, and a larger one, or features found by keywords or an attribute, may do better"
        )

    rubric_name = rubric.fingerprint()[:12]

    def keep(feature: int, votes: Sequence[Vote]) -> None:
        record = catalog[feature]
        # What the same judge said before goes, whatever labels it was about, and what was said by another rubric.
        others = [
            vote
            for vote in record.votes
            if vote.person or (vote.judge != votes[0].judge and vote.rubric == rubric_name)
        ]
        new = [replace(vote, rubric=rubric_name) for vote in votes]
        catalog.records[feature] = settled_record(replace(record, votes=[*others, *new]))

    for bare in chats:
        chat = _with_cache(bare, cache)
        with progress(f"verdicts of {chat.name}", len(wanted), "features", status=_status(chat)) as advance:
            judge_features(
                chat,
                {record.feature: (record.explanation or "", record.spans) for record in wanted},
                rubric,
                reasons=reasons,
                progress=advance,
                on_result=keep,
            )
