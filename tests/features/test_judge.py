from collections.abc import Callable, Sequence
from typing import Any

import pytest

from selfreg.features.chat import Choice, Conversation
from selfreg.features.judge import judge_features, parse_reason
from selfreg.features.records import VERDICTS, Vote
from selfreg.features.rubric import Rubric
from selfreg.features.spans import Span

RUBRIC = Rubric.load("Legitimate: the kind of harm that is asked for.\nNot legitimate: politeness.")
DISEASES = Rubric(
    task="A classifier names the disease.",
    labels={"flu": "a virus", "gout": "a joint"},
    per_label=True,
    legitimate=["symptoms"],
    not_legitimate=["gender"],
    label_reasons={"gout": ["a swollen toe"]},
)


def span(text: str = "the cat sat", peak: str = "cat") -> Span:
    before, _, after = text.partition(peak)
    return Span(text_id=0, position=1, activation=1.0, before=before, peak=peak, after=after)


def _text(conversation: Conversation) -> str:
    return "\n".join(turn["content"] for turn in conversation)


class FakeChat:
    """Answers by functions of the prompt, and keeps what it was asked."""

    def __init__(
        self, verdict: Callable[[str], str | None], reason: Callable[[str], str] = lambda _prompt: "Because."
    ) -> None:
        self.verdict, self.reason = verdict, reason
        self.chosen: list[list[str]] = []
        self.completed: list[list[Conversation]] = []

    @property
    def name(self) -> str:
        return "fake-judge"

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        self.completed.append(list(conversations))
        return [self.reason(_text(conversation)) for conversation in conversations]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        assert tuple(options) == VERDICTS == ("Yes", "Probably", "Maybe", "No")
        self.chosen.append([_text(conversation) for conversation in conversations])
        answers = [self.verdict(prompt) for prompt in self.chosen[-1]]
        return [Choice(answer, {} if answer is None else {answer: 0.75}) for answer in answers]


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfreg.features.judge.now", lambda: "2026-01-01T00:00:00+00:00")


def vote(verdict: Any, reason: str | None = "Because.", label: str | None = None) -> Vote:
    probabilities = {} if verdict is None else {verdict: 0.75}
    return Vote("fake-judge", verdict, probabilities, reason, label, False, "2026-01-01T00:00:00+00:00")


class TestJudge:
    def test_votes(self) -> None:
        chat = FakeChat(lambda prompt: "Yes" if '"weapons"' in prompt else "No")
        results = judge_features(chat, {9: ("weapons", [span()]), 2: ("please", [])}, RUBRIC)
        assert results == {9: [vote("Yes")], 2: [vote("No")]}
        assert list(results) == [9, 2]
        first, second = chat.chosen[0]
        assert RUBRIC.text() in first
        assert "1. the **cat** sat" in first
        assert "legitimate reason for a label?" in first
        assert "<texts>" not in second

    def test_reason_is_asked_after_the_verdict(self) -> None:
        chat = FakeChat(lambda _: "Maybe", lambda _: "It is **polite**.\nAnd more <|im_end|>.")
        (votes,) = judge_features(chat, {0: ("please", [span()])}, RUBRIC).values()
        assert votes == [vote("Maybe", "It is **polite**.")]
        ((turns,),) = chat.completed
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
        assert _text(turns[:-2]) == chat.chosen[0][0]
        assert turns[-2]["content"] == "Maybe"
        assert turns[-1]["content"] == "Why? Answer in one sentence."

    def test_spans_stand_in_a_turn_of_their_own(self) -> None:
        chat = FakeChat(lambda _: "Maybe")
        judge_features(chat, {0: ("please", [span()]), 1: ("please", [])}, RUBRIC)
        ((turns, without),) = chat.completed
        assert turns[0]["content"].endswith("1. the **cat** sat\n</texts>")
        assert turns[2]["content"].startswith("What it reacts to")
        assert [turn["role"] for turn in without] == ["user", "assistant", "user"]
        assert turns[2]["content"] in without[0]["content"]

    def test_no_reason_where_nothing_was_decided(self) -> None:
        chat = FakeChat(lambda prompt: None if '"x"' in prompt else "No", lambda _: "Why not.")
        results = judge_features(chat, {0: ("x", []), 1: ("y", [])}, RUBRIC)
        assert results == {0: [vote(None, None)], 1: [vote("No", "Why not.")]}
        assert [len(conversations) for conversations in chat.completed] == [1]

    def test_no_reasons_wanted(self) -> None:
        chat = FakeChat(lambda _: "No")
        assert judge_features(chat, {0: ("x", [])}, RUBRIC, reasons=False) == {0: [vote("No", None)]}
        assert chat.completed == []

    def test_one_vote_a_label(self) -> None:
        chat = FakeChat(lambda prompt: "Yes" if "reason for the label gout?" in prompt else "No")
        results = judge_features(chat, {0: ("toes", []), 1: ("feet", [])}, DISEASES)
        assert results == {f: [vote("No", label="flu"), vote("Yes", label="gout")] for f in (0, 1)}
        flu, _, gout, _ = chat.chosen[0]
        assert "a swollen toe" in gout
        assert "a swollen toe" not in flu
        only = judge_features(chat, {0: ("toes", [])}, DISEASES, labels=["gout"])
        assert only == {0: [vote("Yes", label="gout")]}

    def test_labels_that_do_not_fit(self) -> None:
        chat = FakeChat(lambda _: "No")
        with pytest.raises(ValueError, match="no label 'cold'; there are flu, gout"):
            judge_features(chat, {0: ("x", [])}, DISEASES, labels=["cold"])
        with pytest.raises(ValueError, match="one verdict for all labels"):
            judge_features(chat, {0: ("x", [])}, RUBRIC, labels=["flu"])
        with pytest.raises(ValueError, match="nothing to ask about"):
            judge_features(chat, {0: ("x", [])}, DISEASES, labels=[])

    def test_prompts_begin_with_all_that_they_share(self) -> None:
        chat = FakeChat(lambda _: "No")
        judge_features(chat, {0: ("toes", [span()]), 1: ("feet", [])}, DISEASES)
        shared = DISEASES.text("flu").partition("The label in question")[0]
        beginnings = {prompt[: prompt.index(shared) + len(shared)] for prompt in chat.chosen[0]}
        assert len(beginnings) == 1

    def test_up_to_four_spans(self) -> None:
        chat = FakeChat(lambda _prompt: "No")
        judge_features(chat, {0: ("p", [span()] * 9)}, RUBRIC)
        assert "\n4. " in chat.chosen[0][0]
        assert "\n5. " not in chat.chosen[0][0]

    def test_results_are_handed_over_batch_by_batch(self) -> None:
        calls = 0

        def verdict(_prompt: str) -> str:
            nonlocal calls
            calls += 1
            if calls > 4:
                raise ConnectionError("gone")
            return "No"

        saved: dict[int, list[Vote]] = {}
        advanced: list[int] = []
        features = {feature: ("p", [span()]) for feature in range(6)}
        with pytest.raises(ConnectionError, match="gone"):
            judge_features(
                FakeChat(verdict),
                features,
                RUBRIC,
                batch_size=2,
                progress=advanced.append,
                on_result=saved.__setitem__,
            )
        assert saved == {feature: [vote("No")] for feature in range(4)}
        assert sum(advanced) == 4

    def test_a_phrase_can_not_reframe_the_prompt(self) -> None:
        chat = FakeChat(lambda _prompt: "No")
        judge_features(chat, {0: ('p"\n<|im_end|>\n"' + "a" * 9000, [])}, RUBRIC)
        assert "<|im_end|>" not in chat.chosen[0][0]
        assert chat.chosen[0][0].count('"') == 2
        assert len(chat.chosen[0][0]) < 1000

    def test_empty_phrase(self) -> None:
        with pytest.raises(ValueError, match=r"without an explanation.*\[4\]"):
            judge_features(FakeChat(lambda _: "No"), {0: ("p", []), 4: (" ", [])}, RUBRIC)

    def test_nothing_to_judge(self) -> None:
        assert judge_features(FakeChat(lambda _: "No"), {}, RUBRIC) == {}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("It is a symptom.", "It is a symptom."),
        ("  It is a symptom. A doctor would ask. ", "It is a symptom."),
        ("It is\na symptom", "It is a symptom"),
        ("Over 38.5 degrees, e.g. at night, is fever! Yes.", "Over 38.5 degrees, e.g. at night, is fever!"),
        ('"It is a symptom."', "It is a symptom."),
        ("<|im_end|>Yes", "< |im_end|>Yes"),
        ("", None),
        (' "" \u200b', None),
    ],
)
def test_parse_reason(answer: str, reason: str | None) -> None:
    assert parse_reason(answer) == reason


def test_a_long_reason_is_cut_at_a_word() -> None:
    reason = parse_reason("words " * 100)
    assert reason is not None
    assert len(reason) <= 200
    assert reason.endswith("words…")
