"""A catalogue filled by chat models: what is kept, what is asked again, and what a kill leaves."""

import json
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chat_helpers import KEY, ScriptedServer, completion, scripted_server
from selfreg import EndpointChatModel, FeatureCatalog, HiddenStateExtractor
from selfreg.features.chat import Choice, Conversation
from selfreg.features.chat_dry_run import CountingChatModel
from selfreg.features.records import VERDICTS, FeatureRecord, Vote
from selfreg.features.spans import Span


def span(text_id: int, word: str) -> Span:
    return Span(text_id, 1, 1.0, "the ", word, " today")


@pytest.fixture
def catalog(extractor: HiddenStateExtractor) -> FeatureCatalog:
    records = [
        FeatureRecord(
            i,
            spans=[span(0, f"cat{i}"), span(1, f"cats{i}")],
            quantile_spans=[[], [], [span(2, f"kitten{i}")], [span(3, f"tom{i}")]],
            near_misses=[span(4, f"dog{i}")],
            silent_spans=[span(5, "rain")],
            explanation=f"cats of the kind {i}",
            explanation_verdict="Yes",
        )
        for i in range(200)
    ]
    return FeatureCatalog(records, extractor.spec, {"sae_fingerprint": "x", "num_texts": 6, "num_tokens": 18})


class Chat:
    """Answers from its arguments, and counts."""

    def __init__(self, name: str, verdict: str = "Yes", phrase: str = "cats") -> None:
        self.name, self.verdict, self.phrase = name, verdict, phrase
        self.calls = 0

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        self.calls += len(conversations)
        return [self.phrase] * len(conversations)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        self.calls += len(conversations)
        chosen = self.verdict if self.verdict in options else options[0]
        return [Choice(chosen, {option: float(option == chosen) for option in options}) for _ in conversations]


def test_judges_vote_and_a_person_outranks_them(catalog: FeatureCatalog) -> None:
    catalog.judge([Chat("a", "No"), Chat("b", "Maybe"), Chat("c", "Yes")], "a rubric", features=[1, 2])
    assert (catalog[1].verdict, catalog[1].decided_by) == ("No", "a, b")
    assert catalog[1].reason == "cats"
    assert catalog[3].verdict is None
    assert [record.feature for record in catalog.split_votes()] == [1, 2]
    catalog.decide(1, "yes", by="Ada", reason="cats are fine")
    assert (catalog[1].verdict, catalog[1].decided_by, catalog[1].reason) == ("Yes", "Ada", "cats are fine")
    catalog.judge(Chat("a", "No"), "a rubric", features=[1])
    assert catalog[1].verdict == "Yes"
    assert len(catalog[1].votes) == 4
    kappas = {frozenset((entry.first, entry.second)): entry for entry in catalog.agreement()}
    assert kappas[frozenset("ab")].observed == 1
    assert kappas[frozenset("ac")].observed == 0
    with pytest.raises(ValueError, match="each needs a name of its own"):
        catalog.judge([Chat("a"), Chat("a")], "a rubric")
    with pytest.raises(ValueError, match="verdict 'perhaps' is not known: it must be one of Yes"):
        catalog.decide(1, "perhaps", by="Ada")
    with pytest.raises(ValueError, match=r"features \[200\] are not there"):
        catalog.decide(200, "Yes", by="Ada")


def test_another_phrase_takes_scores_and_votes_of_models_away(catalog: FeatureCatalog) -> None:
    catalog.score(Chat("scorer"), features=[5])
    catalog.judge(Chat("judge"), "a rubric", features=[5])
    catalog.decide(5, "No", by="Ada")
    assert set(catalog[5].scores) == {"probe", "detection", "fuzzing"}
    catalog.explain(Chat("e", phrase="cats of the kind 5"), features=[5])
    assert len(catalog[5].scores) == 3
    catalog.explain(Chat("e", phrase="dogs"), features=[5])
    assert catalog[5].scores == {}
    assert [vote.judge for vote in catalog[5].votes] == ["Ada"]
    assert catalog[5].explained_by == "e"


def test_another_phrase_takes_the_verdict_away(catalog: FeatureCatalog) -> None:
    catalog.judge(Chat("judge", "No"), "a rubric", features=[5])
    assert catalog[5].verdict == "No"
    catalog.explain(Chat("e", phrase="dogs"), features=[5])
    assert (catalog[5].verdict, catalog[5].verdict_probabilities, catalog[5].decided_by) == (None, {}, None)


def test_another_rubric_takes_votes_by_the_old_one_away(catalog: FeatureCatalog) -> None:
    catalog.judge([Chat("a", "Yes"), Chat("b", "Yes")], "diagnosis", features=[5])
    assert len(catalog[5].label_verdicts) > 1
    catalog.decide(5, "Maybe", by="Ada")
    catalog.judge(Chat("a", "No"), "another rubric", features=[5])
    assert [(vote.judge, vote.label) for vote in catalog[5].votes] == [("Ada", None), ("a", None)]
    assert catalog[5].label_verdicts == {}


def test_an_estimate_is_what_is_then_asked(catalog: FeatureCatalog, tmp_path: Path) -> None:
    chat = Chat("judge")
    counting = CountingChatModel(chat)
    FeatureCatalog(list(catalog.records), catalog.spec, catalog.info).judge(counting, "a rubric")
    assert catalog[0].verdict is None
    catalog.judge(chat, "a rubric", cache=tmp_path / "answers.jsonl")
    assert counting.estimate.calls == chat.calls == 400
    catalog.judge(chat, "a rubric", cache=tmp_path / "answers.jsonl")
    assert chat.calls == 400


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def _reply(body: dict[str, Any]) -> Any:
    content = body["messages"][-1]["content"]
    # Now and then an answer that is none, so that kills fall between it and its repair turn too.
    asked = sum(map(ord, json.dumps(body["messages"])))
    if "Why?" in content:
        return completion("Because it is about cats.")
    if "not one of the answers" not in content and asked % 5 == 0:
        return completion("I would rather not say")
    return completion(VERDICTS[asked % 4])


def _judge(catalog: FeatureCatalog, url: str, cache: Path, folder: Path | None) -> None:
    chat = EndpointChatModel(url, "m", concurrency=4, backoff_factor=0.01)
    catalog.judge(chat, "cats are legitimate", cache=cache)
    if folder is not None:
        catalog.save_pretrained(folder)


def _kept(cache: Path) -> list[str]:
    keys = []
    for line in cache.read_text().splitlines() if cache.exists() else []:
        try:
            keys.append(json.loads(line)["key"])
        except json.JSONDecodeError:
            continue
    return keys


def test_killed_ten_times_while_judging(catalog: FeatureCatalog, server: ScriptedServer, tmp_path: Path) -> None:
    server.script = [_reply]
    server.delay = 0.005
    cache = tmp_path / "answers.jsonl"
    fork = multiprocessing.get_context("fork")
    generator = random.Random(0)
    for _ in range(10):
        before, asked = len(_kept(cache)), len(server.bodies)
        process = fork.Process(target=_judge, args=(catalog, server.url, cache, None))
        process.start()
        # Killed after so many more questions as chance has it, wherever the process is then.
        until = asked + generator.randint(1, 40)
        while len(server.bodies) < until and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
        time.sleep(0.1)  # what the server is still answering
        # All but what was on its way is kept.
        assert len(_kept(cache)) - before >= len(server.bodies) - asked - 4
    assert 0 < len(_kept(cache)) < 400
    process = fork.Process(target=_judge, args=(catalog, server.url, cache, tmp_path / "catalog"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    keys = _kept(cache)
    # A question that had been answered was not asked again: its answer would stand there twice.
    assert len(keys) == len(set(keys))
    different = {json.dumps(body["messages"]) for body in server.bodies}
    assert len(keys) == len(different)
    assert len(server.bodies) - len(different) <= 10 * 4
    judged = FeatureCatalog.from_pretrained(tmp_path / "catalog")
    assert all(len(record.votes) == 1 and record.verdict in VERDICTS for record in judged)
    assert KEY not in cache.read_text()


def test_decisions_outlive_the_process_and_are_undone(catalog: FeatureCatalog, tmp_path: Path) -> None:
    from selfreg.features.decisions import DecisionLog

    catalog.save_pretrained(tmp_path)
    log = DecisionLog(tmp_path, "x")
    for feature, verdict in ((3, "No"), (4, "Yes"), (3, "Maybe")):
        log.add(feature, Vote("Ada", verdict, person=True, at="2026-01-01T00:00:00+00:00"))
    with log.path.open("a") as file:
        file.write('\n{"sae": "x", "fea')  # killed while writing
    again = FeatureCatalog.from_pretrained(tmp_path)
    assert [again[feature].verdict for feature in (3, 4, 5)] == ["Maybe", "Yes", None]
    log.add(3, Vote("Ada", "Maybe", person=True), undone=True)
    assert FeatureCatalog.from_pretrained(tmp_path)[3].verdict is None
    again.save_pretrained(tmp_path)  # what is in the table gives way to the log
    assert FeatureCatalog.from_pretrained(tmp_path)[3].verdict is None
    DecisionLog(tmp_path, "y").add(1, Vote("Ada", "No", person=True))
    with pytest.raises(ValueError, match="holds verdicts on the features of another SAE"):
        FeatureCatalog.from_pretrained(tmp_path)


def test_spreadsheet_out_and_in(catalog: FeatureCatalog, tmp_path: Path) -> None:
    catalog.update(7, spans=[Span(0, 0, 1.0, "=HYPERLINK(", "cat", ")")])
    assert catalog.to_csv(tmp_path / "f.csv") == 200
    text = (tmp_path / "f.csv").read_text(encoding="utf-8-sig")
    assert "'=HYPERLINK(" in text
    lines = text.splitlines()
    assert lines[0].endswith("person_verdict,person_reason")

    def fill(name: str, rows: str) -> Path:
        path = tmp_path / name
        path.write_text(f"feature,person_verdict,person_reason\n{rows}", encoding="utf8")
        return path

    assert catalog.read_csv(fill("a.csv", "7,no,a formula\n8,,\n9,Probably,\n"), by="Ada") == 2
    assert (catalog[7].verdict, catalog[7].reason, catalog[8].verdict) == ("No", "a formula", None)
    assert catalog[9].decided_by == "Ada"
    for rows, message in {
        "1,Yes,\n999,No,\n": r"line 3: features \[999\] are not there",
        "1,Yse,\n": r"feature 1: verdict 'Yse' is not known",
        "x,Yes,\n": "line 2: feature 'x' is not a number",
        "1,Yes,\n1,No,\n": "feature 1: it stands in the file twice",
    }.items():
        with pytest.raises(ValueError, match=message):
            catalog.read_csv(fill("b.csv", rows), by="Ada")
    assert catalog[1].verdict is None
    (tmp_path / "c.csv").write_text("feature,verdict\n1,Yes\n")
    with pytest.raises(ValueError, match="has no column person_verdict"):
        catalog.read_csv(tmp_path / "c.csv", by="Ada")


def test_what_was_decided_last_counts_wherever_it_is_kept(catalog: FeatureCatalog, tmp_path: Path) -> None:
    from selfreg.features.decisions import DecisionLog

    log = DecisionLog(tmp_path, "x")
    old, older = (Vote("Ada", verdict, person=True, at=f"2026-01-0{day}") for verdict, day in (("No", 2), ("Yes", 1)))
    catalog.save_pretrained(tmp_path)
    log.add(3, older)
    log.add(3, old)
    log.add(3, older)  # the second was undone
    assert FeatureCatalog.from_pretrained(tmp_path)[3].verdict == "Yes"
    catalog.decide(3, "Maybe", by="Ada")
    catalog.save_pretrained(tmp_path)
    assert FeatureCatalog.from_pretrained(tmp_path)[3].verdict == "Maybe"


def test_reasons_may_hold_any_character(catalog: FeatureCatalog, tmp_path: Path) -> None:
    from selfreg.features.decisions import DecisionLog

    catalog.save_pretrained(tmp_path)
    reason = "a\u2028b\u0085c\nd"
    DecisionLog(tmp_path, "x").add(3, Vote("Ada", "No", reason=reason, person=True))
    assert FeatureCatalog.from_pretrained(tmp_path)[3].reason == reason


def test_spreadsheets_of_other_countries(catalog: FeatureCatalog, tmp_path: Path) -> None:
    (tmp_path / "de.csv").write_text("feature;person_verdict\n4;No\n", encoding="utf8")
    assert catalog.read_csv(tmp_path / "de.csv", by="Ada") == 1
    (tmp_path / "old.csv").write_bytes("feature,person_verdict,person_reason\n4,No,für\n".encode("cp1252"))
    with pytest.raises(ValueError, match="old.csv is not in UTF-8 .* save it as CSV UTF-8"):
        catalog.read_csv(tmp_path / "old.csv", by="Ada")
