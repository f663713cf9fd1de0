"""Fills a catalogue with a chat model's answers, each on disk as soon as it is there."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfreg.features.chat import ChatModel
from selfreg.features.explainer import Explanation, explain_features
from selfreg.features.judge import Verdict, judge_features, load_rubric
from selfreg.utils.files import fingerprint_json
from selfreg.utils.progress import progress

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog
    from selfreg.features.records import FeatureRecord


class Journal:
    """Answers, a line each, appended at once and found again by all that they depend on.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = Path(path) if path is not None else None
        self.answers: dict[str, dict[str, Any]] = {}
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                # The last line of a process that was killed while writing it; the answer is asked for again.
                continue
            self.answers[entry["key"]] = entry["answer"]

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Keeps an answer."""
        self.answers[key] = answer
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A leading newline keeps a line that was cut short by a kill from swallowing this one.
        with self.path.open("a", encoding="utf8") as file:
            file.write("\n" + json.dumps({"key": key, "answer": answer}, ensure_ascii=False))
            file.flush()
            os.fsync(file.fileno())


def _chosen(catalog: "FeatureCatalog", features: Sequence[int] | None) -> "list[FeatureRecord]":
    if features is None:
        return list(catalog)
    unknown = [feature for feature in features if not 0 <= feature < len(catalog)]
    if unknown:
        raise ValueError(f"features {unknown[:10]} are not there: the catalogue has 0 to {len(catalog) - 1}")
    return [catalog[feature] for feature in dict.fromkeys(features)]


def explain_catalog(
    catalog: "FeatureCatalog",
    chat: ChatModel,
    features: Sequence[int] | None,
    path: str | os.PathLike[str] | None,
) -> None:
    """See `FeatureCatalog.explain`."""
    wanted = [record for record in _chosen(catalog, features) if record.spans]
    journal = Journal(path)
    keys = {r.feature: fingerprint_json([chat.name, [span.marked() for span in r.spans]]) for r in wanted}

    def keep(feature: int, explanation: Explanation) -> None:
        answer = {"explanation": explanation.text, "explanation_verdict": explanation.verdict}
        journal.add(keys[feature], answer)
        # At once: without a journal this is all that is left of the answers if the next call fails.
        catalog.update(feature, **answer)
        advance(1)

    missing = {record.feature: record.spans for record in wanted if keys[record.feature] not in journal.answers}
    for record in wanted:
        if record.feature not in missing:
            catalog.update(record.feature, **journal.answers[keys[record.feature]])
    with progress("explanations", len(wanted), "features", done=len(wanted) - len(missing)) as advance:
        explain_features(chat, missing, on_result=keep)


def judge_catalog(
    catalog: "FeatureCatalog",
    chat: ChatModel,
    rubric: str,
    features: Sequence[int] | None,
    path: str | os.PathLike[str] | None,
) -> None:
    """See `FeatureCatalog.judge`."""
    rubric = load_rubric(rubric)
    wanted = [record for record in _chosen(catalog, features) if record.explained]
    if not wanted:
        raise ValueError(
            "no feature has an explanation that describes its spans: call explain first; if it was called, the chat "
            "model found none, and a larger one, or features found by keywords or an attribute, may do better"
        )
    journal = Journal(path)
    keys = {
        r.feature: fingerprint_json([chat.name, rubric, r.explanation, [span.marked() for span in r.spans]])
        for r in wanted
    }

    def keep(feature: int, verdict: Verdict) -> None:
        answer = {
            "verdict": verdict.verdict,
            "verdict_probabilities": dict(verdict.probabilities),
            "decided_by": verdict.decided_by,
        }
        journal.add(keys[feature], answer)
        catalog.update(feature, **answer)
        advance(1)

    missing = {
        record.feature: (record.explanation or "", record.spans)
        for record in wanted
        if keys[record.feature] not in journal.answers
    }
    for record in wanted:
        if record.feature not in missing:
            catalog.update(record.feature, **journal.answers[keys[record.feature]])
    with progress("verdicts", len(wanted), "features", done=len(wanted) - len(missing)) as advance:
        judge_features(chat, missing, rubric, on_result=keep)
