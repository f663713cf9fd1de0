import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from selfreg.features.answer_cache import (
    AnswerCache,
    CachedChatModel,
    CachingChatModel,
    answer_key,
    cached,
)
from selfreg.features.chat import Choice, Conversation, EndpointChatModel
from selfreg.features.chat_dry_run import ChatEstimate, CountingChatModel
from selfreg.features.chat_usage import ChatUsage, estimate_tokens
from selfreg.utils.progress import progress

OPTIONS = ("Yes", "No")


def user(content: str) -> Conversation:
    return [{"role": "user", "content": content}]


class Echo:
    """The least that a user's own model is: it has the three members of `ChatModel`, and fails on some questions."""

    def __init__(self, name: str = "echo") -> None:
        self.name = name
        self.asked: list[str] = []

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        contents = [conversation[-1]["content"] for conversation in conversations]
        self.asked += contents
        return ["" if content == "fail" else content.upper() for content in contents]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        contents = [conversation[-1]["content"] for conversation in conversations]
        self.asked += contents
        sure = {option: 1.0 / (1 + index) for index, option in enumerate(options)}
        return [Choice(None, {}) if content == "fail" else Choice(options[0], sure) for content in contents]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "answers.jsonl"


class TestAnswerCache:
    def test_is_found_by_the_next_process(self, path: Path) -> None:
        cache = AnswerCache(path)
        assert not path.exists()
        cache.add({"a": "né\n\u2028", "b": {"option": "Yes", "probabilities": {"Yes": 1 / 3, "No": 2 / 3}}})
        again = AnswerCache(path)
        assert len(again) == 2
        assert again.find("a") == "né\n\u2028"
        assert again.find("b") == {"option": "Yes", "probabilities": {"Yes": 1 / 3, "No": 2 / 3}}
        assert again.find("c") is None
        assert path.read_bytes().isascii()

    def test_the_last_answer_under_a_key_counts(self, path: Path) -> None:
        cache = AnswerCache(path)
        cache.add({"a": "old"})
        cache.add({"a": "new"})
        assert cache.find("a") == AnswerCache(path).find("a") == "new"

    @pytest.mark.parametrize("torn", [1, 5, 12, 30, 76])
    def test_a_torn_line_is_skipped_and_swallows_nothing(self, path: Path, torn: int) -> None:
        AnswerCache(path).add({"a": "first"})
        line = json.dumps({"key": "b" * 64, "answer": "second"}).encode()
        with path.open("ab") as file:
            file.write(b"\n" + line[:torn])
        cache = AnswerCache(path)
        assert len(cache) == 1
        cache.add({"c": "third"})
        again = AnswerCache(path)
        assert (again.find("a"), again.find("c"), len(again)) == ("first", "third", 2)

    @pytest.mark.parametrize("content", ["a,b\n1,2\n", "[1]", '{"feature": 3}', "PAR1"])
    def test_another_file_is_left_alone(self, path: Path, content: str) -> None:
        path.parent.mkdir()
        path.write_text(content)
        with pytest.raises(ValueError, match=r"answers.jsonl is not a cache of answers \(line 1"):
            AnswerCache(path)
        assert path.read_text() == content

    def test_threads(self, path: Path) -> None:
        cache = AnswerCache(path)

        def add(worker: int) -> None:
            for number in range(20):
                cache.add({f"{worker}-{number}": "x" * 5000})

        threads = [threading.Thread(target=add, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(cache) == len(AnswerCache(path)) == 80

    def test_a_process_killed_at_any_moment(self, path: Path) -> None:
        """Whatever `add` returned from is there."""
        script = (
            "import sys; from selfreg.features.answer_cache import AnswerCache\n"
            "cache = AnswerCache(sys.argv[1])\n"
            "for number in range(len(cache), 100000):\n"
            "    cache.add({str(number): 'x' * 3000}); print(number, flush=True)\n"
        )
        for round_number in range(2):
            with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                told = [int(process.stdout.readline()) for _ in range(5 + 7 * round_number)]
                process.send_signal(signal.SIGKILL)
                told += [int(line) for line in process.stdout]
            cache = AnswerCache(path)
            assert all(cache.find(str(number)) == "x" * 3000 for number in range(told[-1] + 1))

    def test_a_folder_in_its_place(self, tmp_path: Path) -> None:
        cache = AnswerCache(tmp_path / "file" / "answers.jsonl")
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"could not write .*answers.jsonl"):
            cache.add({"a": "b"})


def test_key_tells_all_apart() -> None:
    conversation = [{"role": "system", "content": "s"}, *user("x")]
    keys = {
        answer_key("complete", ["m"], conversation, max_new_tokens=64),
        answer_key("complete", ["m"], conversation, max_new_tokens=65),
        answer_key("complete", ["n"], conversation, max_new_tokens=64),
        answer_key("complete", ["m", "http://a"], conversation, max_new_tokens=64),
        answer_key("choose", ["m"], conversation, options=["Yes", "No"]),
        answer_key("choose", ["m"], conversation, options=["No", "Yes"]),
        answer_key("choose", ["m"], user("x"), options=["No", "Yes"]),
        answer_key("choose", ["m"], user("\ud800"), options=["No", "Yes"]),
    }
    assert len(keys) == 8
    assert answer_key("complete", ["m"], user("x")) == answer_key("complete", ["m"], user("x"))


class TestCached:
    def test_a_model_of_ones_own(self, path: Path) -> None:
        echo = Echo()
        chat = cached(echo, AnswerCache(path))
        assert isinstance(chat, CachedChatModel)
        assert chat.name == "echo"
        assert chat.complete([user("a"), user("b")]) == ["A", "B"]
        first = chat.choose([user("a")], OPTIONS)
        again = cached(echo, AnswerCache(path))
        assert again.complete([user("b"), user("c"), user("a")]) == ["B", "C", "A"]
        assert again.choose([user("a")], OPTIONS) == first
        assert echo.asked == ["a", "b", "a", "c"]
        assert (again.usage.calls, again.usage.cached) == (1, 3)
        assert again.usage.estimated
        assert again.complete([]) == []

    def test_failures_are_not_kept(self, path: Path) -> None:
        echo = Echo()
        chat = cached(echo, AnswerCache(path))
        for _ in range(2):
            assert chat.complete([user("fail")]) == [""]
            assert chat.choose([user("fail")], OPTIONS) == [Choice(None, {})]
        assert len(echo.asked) == 4
        assert (chat.usage.calls, chat.usage.failed) == (0, 4)

    def test_what_has_a_cache_is_not_wrapped(self, path: Path) -> None:
        chat = EndpointChatModel("http://localhost:1/v1", "m")
        with_cache = cached(chat, AnswerCache(path))
        assert isinstance(with_cache, EndpointChatModel)
        assert with_cache is not chat
        assert with_cache.usage is chat.usage
        wrapped = cached(Echo(), AnswerCache(path))
        assert isinstance(cached(wrapped, AnswerCache(path)), CachedChatModel)
        assert cached(wrapped, AnswerCache(path)).usage is wrapped.usage
        assert not isinstance(Echo(), CachingChatModel)


class TestDryRun:
    def test_counts_what_is_missing(self, path: Path) -> None:
        echo = Echo()
        cached(echo, AnswerCache(path)).complete([user("a")], max_new_tokens=10)
        counting = CountingChatModel(echo, AnswerCache(path), count_tokens=len)
        answers = counting.complete([user("a"), user("bb"), user("bb")], max_new_tokens=10)
        assert answers[0] == "A"
        assert answers[1] == answers[2] != ""
        assert counting.estimate == ChatEstimate(1, 2, 2 + 5, 10, estimated=False)
        (choice,) = counting.choose([user("c")], OPTIONS)
        assert choice == Choice("Yes", {"Yes": 1.0, "No": 0.0})
        assert counting.estimate.calls == 2
        assert counting.estimate.prompt_tokens > 7 + 1
        assert counting.name == "echo"
        assert echo.asked == ["a"]

    def test_tokens_are_estimated(self) -> None:
        counting = CountingChatModel(Echo())
        counting.complete([user("é" * 10)])
        assert counting.estimate == ChatEstimate(1, 0, 5 + 5, 64, estimated=True)

    def test_of_an_endpoint(self, path: Path) -> None:
        """No server is there, and none is asked."""
        chat = EndpointChatModel("http://localhost:1/v1", "m")
        cache = AnswerCache(path)
        counting = CountingChatModel(chat, cache)
        counting.choose([user("x")], OPTIONS)
        assert counting.estimate.calls == 1
        assert not path.exists()

    def test_price(self) -> None:
        assert ChatEstimate(1, 0, 2_000_000, 500_000, estimated=True).price(0.5, 4.0) == pytest.approx(3.0)

    def test_bad_questions(self) -> None:
        with pytest.raises(ValueError, match="ends with nothing"):
            CountingChatModel(Echo()).complete([[]])
        with pytest.raises(ValueError, match="two or more"):
            CountingChatModel(Echo()).choose([user("x")], ["Yes"])


class TestUsage:
    def test_threads_lose_nothing(self) -> None:
        usage = ChatUsage()

        def add() -> None:
            for _ in range(2000):
                usage.add(calls=1, prompt_tokens=2, completion_tokens=1)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert usage == ChatUsage(calls=8000, prompt_tokens=16000, completion_tokens=8000)

    def test_status_counts_from_its_start(self) -> None:
        usage = ChatUsage(failed=5, prompt_tokens=1000)
        status = usage.watch()
        usage.add(failed=1, prompt_tokens=1200, completion_tokens=34)
        assert status().startswith("1 failed, 1,234 tokens, ")
        assert status().endswith(" tokens/s")
        usage.add(prompt_tokens=1, estimated=True)
        assert "about 1,235 tokens" in status()

    def test_stands_beside_the_bar(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        with progress("verdicts", 2, "features", status=lambda: "1 failed") as advance:
            advance(2)
        assert "verdicts: 2 features" in caplog.text
        assert "1 failed)" in caplog.text

    def test_estimate(self) -> None:
        assert [estimate_tokens(text) for text in ("", "a", "four", "fives", "\ud800")] == [0, 1, 1, 2, 1]
