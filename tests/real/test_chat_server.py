"""EndpointChatModel against `transformers serve`, and beside LocalChatModel with the same weights."""

from pathlib import Path

import pytest

from selfreg.features.answer_cache import AnswerCache
from selfreg.features.chat import Conversation, EndpointChatModel, LocalChatModel

# One server serves all.
pytestmark = [pytest.mark.real, pytest.mark.xdist_group("chat server")]

OPTIONS = ("Yes", "Probably", "Maybe", "No")


def user(content: str) -> Conversation:
    return [{"role": "user", "content": content}]


@pytest.fixture
def chat(chat_server: tuple[str, str]) -> EndpointChatModel:
    return EndpointChatModel(*chat_server, timeout=180.0, concurrency=2)


def test_completes_like_the_local_model(chat: EndpointChatModel, smollm2_chat: Path) -> None:
    conversations = [user("What is the capital of France?"), user("Name a colour of the sky.")]
    local = LocalChatModel(str(smollm2_chat), device="cpu")
    answers = chat.complete(conversations, max_new_tokens=12)
    # Greedy on both sides, with the same template.
    assert answers == local.complete(conversations, max_new_tokens=12)
    assert "Paris" in answers[0]
    assert chat.usage.calls == 2
    assert not chat.usage.estimated
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (
        local.usage.prompt_tokens,
        local.usage.completion_tokens,
    )


def test_chooses_an_option_or_none(chat: EndpointChatModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    questions = [user("Is Paris in France? Answer with one word: Yes, Probably, Maybe or No."), user("Is water dry?")]
    for choice in chat.choose(questions, OPTIONS):
        if choice.option is None:
            assert choice.probabilities == {}
        else:
            assert choice.probabilities == {option: float(option == choice.option) for option in OPTIONS}
    # It takes response_format and does not heed it, which must be noticed once.
    assert caplog.text.count("no structured output") == 1
    assert 2 <= chat.usage.calls <= 4
    assert chat.usage.failed == 0


def test_nothing_is_asked_twice(chat: EndpointChatModel, tmp_path: Path) -> None:
    questions = [user("Say a word."), user("Say another word.")]
    first = chat.with_cache(AnswerCache(tmp_path / "answers.jsonl"))
    answers, choices = first.complete(questions, max_new_tokens=4), first.choose(questions, OPTIONS)
    calls = chat.usage.calls
    again = chat.with_cache(AnswerCache(tmp_path / "answers.jsonl"))
    assert again.complete(questions, max_new_tokens=4) == answers
    assert again.choose(questions, OPTIONS) == choices
    assert chat.usage.calls == calls == chat.usage.cached


def test_a_wrong_name_of_the_model(chat_server: tuple[str, str]) -> None:
    with pytest.raises(RuntimeError, match="for the model 'nobody/knows'"):
        EndpointChatModel(chat_server[0], "nobody/knows").complete([user("x")])
