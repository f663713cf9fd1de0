"""Explain, score and judge through a real OpenAI-compatible server."""

from pathlib import Path

import pytest

from selfreg import EndpointChatModel, FeatureCatalog
from selfreg.activations.spec import HiddenStateSpec
from selfreg.features.records import VERDICTS, FeatureRecord
from selfreg.features.spans import Span

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("chat server")]

_FEVER = ("She has had a high ", "fever", " since Monday.")
_OTHERS = ("The shop opens at nine.", "We walked along the river.", "The train was late again.")


def _fevers(count: int, first: int) -> list[Span]:
    before, peak, after = _FEVER
    return [Span(first + i, 9, 2.0 - i / 10, f"Note {first + i}. {before}", peak, after) for i in range(count)]


@pytest.fixture
def catalog() -> FeatureCatalog:
    silent = [Span(90 + i, 0, 0.0, "", *text.split(" ", 1)) for i, text in enumerate(_OTHERS)]
    record = FeatureRecord(0, spans=_fevers(4, 0), quantile_spans=[[], [], [], _fevers(3, 10)], silent_spans=silent)
    spec = HiddenStateSpec("m", None, None, 15, 576, "text_no_sinks", None, 128)
    return FeatureCatalog([record], spec, {"sae_fingerprint": "x", "num_texts": 20, "num_tokens": 200})


def test_explain_score_and_judge(catalog: FeatureCatalog, chat_server: tuple[str, str], tmp_path: Path) -> None:
    chat = EndpointChatModel(*chat_server, timeout=180.0, concurrency=2)
    cache = tmp_path / "answers.jsonl"
    catalog.explain(chat, cache=cache)
    assert chat.usage.failed == 0
    for record in catalog:
        # Whatever so small a model says; an explanation by hand stands in where it can't tell.
        if not record.explained:
            catalog.update(record.feature, explanation="symptoms of a cold", explanation_verdict="Yes")
    catalog.score(chat, cache=cache, max_examples=1)
    catalog.judge(chat, "toxic_chat", cache=cache)
    for record in catalog:
        assert record.scores["probe"].positives == 3
        assert len(record.votes) == 1
        assert all(vote.judge == chat.name for vote in record.votes)
        assert all(vote.verdict in VERDICTS or vote.verdict is None for vote in record.votes)
    calls = chat.usage.calls
    again = EndpointChatModel(*chat_server, timeout=180.0)
    catalog.judge(again, "toxic_chat", cache=cache)
    # Only what had no answer in the form that was asked for.
    assert again.usage.calls <= calls
    assert again.usage.cached > 0
