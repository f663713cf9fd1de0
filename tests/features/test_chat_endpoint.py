import json
import logging
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import InferenceTimeoutError
from huggingface_hub.utils import httpx

from chat_helpers import HANG_UP, KEY, CutShort, Drip, Reply, ScriptedServer, completion, scripted_server
from selfreg.features.answer_cache import AnswerCache
from selfreg.features.chat import Choice, Conversation, EndpointChatModel
from selfreg.features.chat_endpoint import parse_option

OPTIONS = ("Yes", "Probably", "Maybe", "No")


def user(content: str) -> Conversation:
    return [{"role": "user", "content": content}]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as scripted:
        yield scripted


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between calls, which are noted and not waited."""
    noted: list[float] = []
    monkeypatch.setattr("selfreg.features.chat_server._pause", lambda seconds, stop: noted.append(seconds))
    return noted


def endpoint(server: ScriptedServer, **settings: Any) -> EndpointChatModel:
    return EndpointChatModel(server.url, "tiny", **{"backoff_factor": 0.0, "timeout": 10.0, **settings})


class TestEndpointComplete:
    def test_asks_in_openai_form(self, server: ScriptedServer) -> None:
        server.script = [completion("  a phrase \n")]
        chat = endpoint(server)
        conversation = [{"role": "system", "content": "Be brief."}, *user("Or not?")]
        assert chat.complete([conversation], max_new_tokens=7) == ["a phrase"]
        assert server.paths == ["/v1/chat/completions"]
        (body,) = server.bodies
        assert body["model"] == chat.name == "tiny"
        assert body["messages"] == conversation
        assert body["max_tokens"] == 7
        assert body["temperature"] == 0

    def test_order_and_concurrency(self, server: ScriptedServer) -> None:
        server.script = [lambda body: completion(body["messages"][0]["content"])]
        server.delay = 0.05
        questions = [f"question {i}" for i in range(9)]
        assert endpoint(server, concurrency=3).complete([user(q) for q in questions]) == questions
        assert 1 < server.most_active <= 3
        assert endpoint(server).complete([]) == []

    @pytest.mark.parametrize(
        "failure",
        [
            (429, {"error": "slow down"}),
            (429, {"error": "slow down"}, {"Retry-After": "0"}),
            (429, {"error": "slow down"}, {"Retry-After": "soon"}),
            (503, b""),
            (HANG_UP, b""),
            (500, ["not", "a", "dict"]),
            (200, b""),
            (200, b'{"choices": [{"mess'),
            (200, {"error": "overloaded"}),
            (200, {"choices": []}),
            (200, CutShort({"choices": [{"index": 0, "message": {"role": "assistant", "content": "half"}}]})),
            completion("not mine", role="user"),
            completion(["a", "list"]),
        ],
    )
    def test_what_may_pass_is_asked_again(self, server: ScriptedServer, failure: Reply) -> None:
        server.script = [failure, completion("better")]
        assert endpoint(server).complete([user("x")]) == ["better"]
        assert len(server.bodies) == 2

    def test_waits_as_long_as_the_server_says(self, server: ScriptedServer, waits: list[float]) -> None:
        server.script = [
            (429, {}, {"Retry-After": "7"}),
            (429, {}, {"Retry-After": "86400"}),
            (500, {}),
            completion("ok"),
        ]
        assert endpoint(server, backoff_factor=0.5).complete([user("x")]) == ["ok"]
        assert waits[:2] == [7, 60]
        assert 2 <= waits[2] <= 2.25  # 0.5 * 2², and the jitter

    def test_a_slow_drip_is_read_to_the_end(self, server: ScriptedServer) -> None:
        status, body, *_ = completion("slow")
        server.script = [(status, Drip(body, 0.002))]
        assert endpoint(server, timeout=0.5, max_retries=0).complete([user("x")]) == ["slow"]

    def test_an_empty_answer_is_one(self, server: ScriptedServer) -> None:
        server.script = [completion(None)]
        chat = endpoint(server)
        assert chat.complete([user("x")]) == [""]
        assert (chat.usage.calls, chat.usage.failed) == (1, 0)

    def test_tokens_that_the_server_tells(self, server: ScriptedServer) -> None:
        server.script = [completion("ok", usage={"prompt_tokens": 30, "completion_tokens": 2, "total_tokens": 32})]
        chat = endpoint(server)
        chat.complete([user("x"), user("y")])
        assert (chat.usage.calls, chat.usage.prompt_tokens, chat.usage.completion_tokens) == (2, 60, 4)
        assert not chat.usage.estimated

    def test_tokens_that_it_does_not_tell(self, server: ScriptedServer) -> None:
        server.script = [completion("four")]
        chat = endpoint(server)
        chat.complete([user("é" * 10)])
        assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (5, 1)
        assert chat.usage.estimated

    def test_gives_up(self, server: ScriptedServer) -> None:
        server.script = [(500, {"error": "out of order"})]
        with pytest.raises(RuntimeError, match=rf"{server.url} answered 500 for the model 'tiny'.*out of order"):
            endpoint(server, max_retries=2).complete([user("x")])
        assert len(server.bodies) == 3

    def test_unreadable_to_the_end(self, server: ScriptedServer) -> None:
        server.script = [(200, b"<html>")]
        with pytest.raises(RuntimeError, match="something else than a chat completion"):
            endpoint(server, max_retries=1).complete([user("x")])

    def test_wrong_model_is_asked_once(self, server: ScriptedServer) -> None:
        server.script = [(404, {"error": {"message": "no model tiny"}})]
        with pytest.raises(RuntimeError, match=r"answered 404.*no model tiny.*check the name of the model"):
            endpoint(server).complete([user("x")])
        assert len(server.bodies) == 1

    def test_time_out(self, server: ScriptedServer) -> None:
        server.script = [completion("late")]
        server.delay = 0.5
        with pytest.raises(ConnectionError, match=r"did not answer within 0.1 s"):
            endpoint(server, timeout=0.1, max_retries=1).complete([user("x")])
        assert len(server.bodies) == 2

    def test_unreachable_is_told_at_once(self, server: ScriptedServer, waits: list[float]) -> None:
        server.stop()
        with pytest.raises(ConnectionError, match=rf"{server.url} .*Start one, for example .transformers serve"):
            endpoint(server).complete([user("x"), user("y")])
        assert waits == []

    def test_a_server_that_answered_before_is_waited_for(self, server: ScriptedServer, waits: list[float]) -> None:
        server.script = [completion("ok")]
        chat = endpoint(server, max_retries=3)
        chat.complete([user("x")])
        server.stop()
        with pytest.raises(ConnectionError, match=server.url):
            chat.complete([user("x")])
        assert len(waits) == 3

    def test_a_connection_that_is_never_taken(
        self, server: ScriptedServer, waits: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As behind a firewall."""
        chat = endpoint(server)

        def never(*_arguments: Any, **_settings: Any) -> None:
            raise InferenceTimeoutError("timed out") from httpx.ConnectTimeout("timed out")

        monkeypatch.setattr("huggingface_hub.InferenceClient.chat_completion", never)
        with pytest.raises(ConnectionError, match=f"no chat server answers at {server.url}"):
            chat.complete([user("x")])
        assert waits == []

    def test_offline_mode(self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
            endpoint(server).complete([user("x")])


class TestEndpointChoose:
    @pytest.mark.parametrize("answer", ["Probably", " probably.\n", '"Probably"', "'PROBABLY'.", "**Probably**"])
    def test_a_plain_answer(self, server: ScriptedServer, answer: str) -> None:
        server.script = [completion(answer)]
        (choice,) = endpoint(server).choose([user("Is it?")], OPTIONS)
        assert choice == Choice("Probably", {"Yes": 0.0, "Probably": 1.0, "Maybe": 0.0, "No": 0.0})
        question = server.bodies[0]["messages"][-1]["content"]
        assert question.startswith("Is it?\n\n")
        assert "Yes, Probably, Maybe, No" in question
        assert server.bodies[0]["temperature"] == 0

    def test_repaired(self, server: ScriptedServer) -> None:
        server.script = [completion("It is hard to say: Yes and No."), completion("Maybe")]
        (choice,) = endpoint(server).choose([user("Is it?")], OPTIONS)
        assert choice.option == "Maybe"
        roles = [message["role"] for message in server.bodies[1]["messages"]]
        assert roles == ["user", "assistant", "user"]

    @pytest.mark.parametrize("answer", ["Yes and No.", "", None, "Yes, because", "Final answer: Yes", "Nope"])
    def test_undecided_and_never_a_guess(self, server: ScriptedServer, answer: str | None) -> None:
        server.script = [completion(answer)]
        assert endpoint(server).choose([user("Is it?")], OPTIONS) == [Choice(None, {})]
        assert len(server.bodies) == 2

    def test_parse_option_gives_the_spelling_of_the_option(self) -> None:
        assert parse_option("yes", ["YES", "NO"]) == "YES"
        assert parse_option("yes!", ["YES", "NO"]) is None

    @pytest.mark.parametrize(
        "answer",
        [
            '{"answer": "Yes", "why": "so"}',
            '{"answer": "Yes", "answer": "No"}',
            '{"answer": "yes"}',
            '{"answer": ["Yes"]}',
            '{"reply": "Yes"}',
            '{"answer": "Yes"',
            '{"answer": "Yes"} {"answer": "No"}',
            '{"a":' * 100_000,
        ],
    )
    def test_json_is_read_strictly(self, answer: str) -> None:
        assert parse_option(answer, OPTIONS) is None
        assert parse_option(' {"answer":\n"Yes"} ', OPTIONS) == "Yes"


def answers_in_json(body: dict[str, Any]) -> Reply:
    """A server that has structured output."""
    return completion('{"answer": "Maybe"}' if "response_format" in body else "No")


class TestStructuredOutput:
    def test_honoured(self, server: ScriptedServer) -> None:
        server.script = [answers_in_json]
        chat = endpoint(server, concurrency=1)
        assert [choice.option for choice in chat.choose([user("x"), user("y")], OPTIONS)] == ["Maybe", "Maybe"]
        for body in server.bodies:
            assert body["response_format"]["type"] == "json_schema"
            assert None not in body["response_format"]["json_schema"].values()
            schema = body["response_format"]["json_schema"]["schema"]
            assert schema["properties"]["answer"]["enum"] == list(OPTIONS)

    @pytest.mark.parametrize("status", [400, 422, 501])
    def test_refused(self, server: ScriptedServer, status: int, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        server.script = [
            lambda body: (status, {"error": "response_format?"}) if "response_format" in body else completion("No")
        ]
        chat = endpoint(server, concurrency=1)
        assert [choice.option for choice in chat.choose([user("x"), user("y")], OPTIONS)] == ["No", "No"]
        assert ["response_format" in body for body in server.bodies] == [True, False, False]
        chat.choose([user("z")], OPTIONS)
        assert caplog.text.count("no structured output") == 1
        assert (chat.usage.calls, chat.usage.failed) == (3, 0)

    def test_refused_to_several_at_once_is_told_once(
        self, server: ScriptedServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        server.script = [lambda body: (400, {}) if "response_format" in body else completion("No")]
        server.delay = 0.05
        assert (
            endpoint(server).choose([user(str(i)) for i in range(8)], OPTIONS)
            == [Choice("No", {"Yes": 0.0, "Probably": 0.0, "Maybe": 0.0, "No": 1.0})] * 8
        )
        assert caplog.text.count("no structured output") == 1

    def test_ignored(self, server: ScriptedServer) -> None:
        server.script = [completion("No")]
        chat = endpoint(server, concurrency=1)
        assert [choice.option for choice in chat.choose([user("x"), user("y")], OPTIONS)] == ["No", "No"]
        assert ["response_format" in body for body in server.bodies] == [True, False]

    def test_one_bad_answer_does_not_end_it_where_it_works(self, server: ScriptedServer) -> None:
        server.script = [completion('{"answer": "Yes"}'), completion("well"), completion('{"answer": "No"}')]
        chat = endpoint(server, concurrency=1)
        assert [choice.option for choice in chat.choose([user("x"), user("y")], OPTIONS)] == ["Yes", "No"]
        assert all("response_format" in body for body in server.bodies)

    def test_a_refused_prompt_is_not_taken_for_it(self, server: ScriptedServer) -> None:
        def reply(body: dict[str, Any]) -> Reply:
            return (400, {"error": "filtered"}) if "evil" in str(body["messages"]) else answers_in_json(body)

        server.script = [reply]
        chat = endpoint(server, concurrency=1)
        choices = chat.choose([user("evil"), user("x"), user("evil"), user("y")], OPTIONS)
        assert [choice.option for choice in choices] == [None, "Maybe", None, "Maybe"]
        # Asked without it once, before it was known to work.
        assert ["response_format" in body for body in server.bodies] == [True, False, True, True, True]


def filters(body: dict[str, Any]) -> Reply:
    """A server with a content filter."""
    if "evil" in str(body["messages"]):
        return 400, {"error": {"message": f"content filter {KEY}"}}
    return completion("ok")


class TestEndpointFailures:
    def test_one_refused_prompt(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("A_KEY", KEY)
        server.script = [filters]
        chat = endpoint(server, api_key_env="A_KEY")
        assert chat.complete([user("a"), user("evil"), user("b")]) == ["ok", "", "ok"]
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "answered 400" in record.getMessage()
        assert "content filter ***" in record.getMessage()
        assert (chat.usage.calls, chat.usage.failed) == (2, 1)
        assert len(server.bodies) == 3

    @pytest.mark.parametrize("status", [400, 413, 422])
    def test_all_refused_is_a_wrong_setting(self, server: ScriptedServer, status: int) -> None:
        server.script = [(status, {"error": "max_tokens?"})]
        with pytest.raises(RuntimeError, match=rf"answered {status} .*max_tokens"):
            endpoint(server).complete([user("a"), user("b")])

    def test_one_that_fails_to_the_end(self, server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
        server.script = [lambda body: (500, {}) if "evil" in str(body["messages"]) else completion("ok")]
        chat = endpoint(server, max_retries=2)
        assert chat.complete([user("evil"), user("a")]) == ["", "ok"]
        assert len(server.bodies) == 4
        assert "stays without an answer" in caplog.text

    @pytest.mark.parametrize("status", [401, 403, 404, 402])
    def test_what_cannot_get_better_ends_it_at_once(self, server: ScriptedServer, status: int) -> None:
        server.script = [completion("ok"), (status, {"error": "no"})]
        chat = endpoint(server, concurrency=1)
        with pytest.raises(RuntimeError, match=f"answered {status}"):
            chat.complete([user(str(i)) for i in range(20)])
        assert len(server.bodies) < 5

    def test_others_do_not_wait_on_when_it_ends(self, server: ScriptedServer) -> None:
        def reply(body: dict[str, Any]) -> Reply:
            return (429, {}, {"Retry-After": "60"}) if body["messages"][0]["content"] == "slow" else (401, {})

        server.script = [reply]
        chat = endpoint(server, concurrency=2)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="answered 401"):
            chat.complete([user("slow"), user("wrong")])
        assert time.monotonic() - began < 20

    def test_the_server_goes_away(self, server: ScriptedServer, waits: list[float], tmp_path: Path) -> None:
        server.script = [completion("ok")]
        chat = endpoint(server, concurrency=1, max_retries=2).with_cache(AnswerCache(tmp_path / "a.jsonl"))
        chat.complete([user("a")])
        server.stop()
        with pytest.raises(ConnectionError, match=server.url):
            chat.complete([user("a"), user("b"), user("c")])
        assert len(waits) == 2
        assert len(AnswerCache(tmp_path / "a.jsonl")) == 1


class TestEndpointCache:
    def test_every_call_is_kept_by_itself(self, server: ScriptedServer, tmp_path: Path) -> None:
        """An answer that could not be parsed is there before its repair fails."""
        server.script = [completion("hm"), (401, {})]
        path = tmp_path / "answers.jsonl"
        with pytest.raises(RuntimeError, match="401"):
            endpoint(server).with_cache(AnswerCache(path)).choose([user("x")], OPTIONS)
        server.script = [completion("Yes")]
        chat = endpoint(server).with_cache(AnswerCache(path))
        assert chat.known_choice(user("x"), OPTIONS) is None
        assert chat.choose([user("x")], OPTIONS)[0].option == "Yes"
        assert [len(body["messages"]) for body in server.bodies] == [1, 3, 3]
        assert (chat.usage.calls, chat.usage.cached) == (1, 1)
        again = endpoint(server).with_cache(AnswerCache(path))
        known = again.known_choice(user("x"), OPTIONS)
        assert known is not None
        assert known.option == "Yes"

    def test_killed_again_and_again(self, server: ScriptedServer, tmp_path: Path) -> None:
        """No call that was answered is made again, be it one of four at a time or a first answer before its repair."""
        answered: dict[str, float] = {}
        repeated: list[str] = []
        killed = 0.0

        def reply(body: dict[str, Any]) -> Reply:
            messages = json.dumps(body["messages"])
            with server.lock:
                # What was sent in the last second before a kill may not have reached the disk.
                if messages in answered and answered[messages] < killed - 1.0:
                    repeated.append(messages)
                answered[messages] = time.monotonic()
            return completion("hm" if len(body["messages"]) == 1 else "Yes")

        server.script = [reply]
        server.delay = 0.1
        script = (
            "import sys; from selfreg.features.answer_cache import AnswerCache\n"
            "from selfreg.features.chat import EndpointChatModel\n"
            "chat = EndpointChatModel(sys.argv[1], 'tiny').with_cache(AnswerCache(sys.argv[2]))\n"
            "questions = [[{'role': 'user', 'content': f'question {i}'}] for i in range(60)]\n"
            "choices = chat.choose(questions, ['Yes', 'No'])\n"
            "print(sum(choice.option == 'Yes' for choice in choices))\n"
        )
        command = [sys.executable, "-c", script, server.url, str(tmp_path / "answers.jsonl")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
        rng = random.Random(0)
        for _ in range(2):
            before = len(server.bodies)
            with subprocess.Popen(command, env=environment) as process:
                while len(server.bodies) == before and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.uniform(1.2, 2.0))
                process.kill()
                process.wait()
                killed = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "60\n"
        assert repeated == []
        assert len(answered) == 120  # each question and its repair

    def test_answers_in_json_and_plain_are_the_same_question(self, server: ScriptedServer, tmp_path: Path) -> None:
        """Whether the server has structured output is found out anew by each process."""
        server.script = [completion("No")]
        path = tmp_path / "answers.jsonl"
        questions = [user(str(i)) for i in range(9)]
        first = endpoint(server).with_cache(AnswerCache(path)).choose(questions, OPTIONS)
        assert endpoint(server).with_cache(AnswerCache(path)).choose(questions, OPTIONS) == first
        assert len(server.bodies) == 9

    def test_failures_are_asked_again(self, server: ScriptedServer, tmp_path: Path) -> None:
        server.script = [filters]
        path = tmp_path / "answers.jsonl"
        questions = [user("evil"), user("a")]
        assert endpoint(server).with_cache(AnswerCache(path)).complete(questions) == ["", "ok"]
        # The one that is refused is all that is left: no reason to end every run with an error.
        assert endpoint(server).with_cache(AnswerCache(path)).complete(questions) == ["", "ok"]
        assert len(server.bodies) == 3
        server.script = [completion("tame")]
        assert endpoint(server).with_cache(AnswerCache(path)).complete(questions) == ["tame", "ok"]

    def test_what_the_answer_depends_on(self, server: ScriptedServer, tmp_path: Path) -> None:
        server.script = [completion("Yes")]
        cache = AnswerCache(tmp_path / "answers.jsonl")
        chat = endpoint(server).with_cache(cache)
        chat.complete([user("x")])
        chat.complete([user("x")], max_new_tokens=65)
        chat.choose([user("x")], OPTIONS)
        chat.choose([user("x")], OPTIONS[::-1])
        EndpointChatModel(server.url, "other").with_cache(cache).complete([user("x")])
        EndpointChatModel(server.url + "/", "tiny").with_cache(cache).complete([user("x")])
        assert len(server.bodies) == len(cache) == 6

    def test_copies_share_what_they_count(self, server: ScriptedServer, tmp_path: Path) -> None:
        server.script = [completion("ok")]
        chat = endpoint(server)
        chat.with_cache(AnswerCache(tmp_path / "answers.jsonl")).complete([user("x")])
        assert chat.usage.calls == 1
        assert chat.complete([user("x")]) == ["ok"]
        assert chat.usage.calls == 2

    def test_the_key_is_not_in_the_file(
        self, server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("A_KEY", KEY)
        server.script = [completion(f"your key is {KEY}")]
        path = tmp_path / "answers.jsonl"
        chat = endpoint(server, api_key_env="A_KEY").with_cache(AnswerCache(path))
        assert chat.complete([user("x")]) == ["your key is ***"]
        chat.choose([user("x")], OPTIONS)
        assert KEY not in path.read_text()
        assert KEY not in repr(chat) + repr(chat.usage) + str(vars(chat))

    def test_half_a_character(self, server: ScriptedServer, tmp_path: Path) -> None:
        server.script = [completion("\ud83d"), completion("Yes")]
        chat = endpoint(server).with_cache(AnswerCache(tmp_path / "answers.jsonl"))
        assert chat.choose([user("x")], OPTIONS)[0].option == "Yes"
        assert server.bodies[1]["messages"][1]["content"] == "?"


class TestEndpointKey:
    def test_is_sent_and_shown_nowhere(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG")
        monkeypatch.setenv("A_KEY", f" {KEY}\n")
        # Some servers repeat the key that they refuse.
        server.script = [(429, {"error": f"busy, {KEY}"}), (401, {"error": {"message": f"wrong key {KEY}"}})]
        chat = endpoint(server, api_key_env="A_KEY")
        with pytest.raises(RuntimeError, match="check the key in the variable A_KEY") as caught:
            chat.complete([user("x")])
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        shown = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(chat) + str(vars(chat))
        assert KEY not in shown
        assert "A_KEY" in repr(chat)

    @pytest.mark.parametrize("value", [None, "", " \n"])
    def test_missing(self, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
        monkeypatch.delenv("A_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("A_KEY", value)
        with pytest.raises(ValueError, match=r"variable A_KEY .*holds no key"):
            EndpointChatModel("http://localhost:8000/v1", "tiny", api_key_env="A_KEY")

    @pytest.mark.parametrize("value", [f"{KEY}é", f"{KEY} {KEY}", f"{KEY}\n{KEY}"])
    def test_impossible(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("A_KEY", value)
        with pytest.raises(ValueError, match=r"variable A_KEY .*can't be a key") as caught:
            EndpointChatModel("http://localhost:8000/v1", "tiny", api_key_env="A_KEY")
        assert KEY not in "".join(traceback.format_exception(caught.value))

    def test_the_hub_token_stays_at_home(self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_private")
        server.script = [completion("ok")]
        endpoint(server).complete([user("x")])
        assert "hf_private" not in str(server.headers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "whole address"),
        ({"base_url": "http://me:secret@host/v1"}, "user name or a password"),
        ({"base_url": "http://host/v1?key=secret"}, r"behind `\?`"),
        ({"model": ""}, "name of a model"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_retries": -1}, "max_retries=-1"),
    ],
)
def test_bad_endpoint_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        EndpointChatModel(**{"base_url": "http://localhost:8000/v1", "model": "tiny", **settings})
    assert "secret" not in str(caught.value)


def test_a_server_that_answers_nobody_any_more_ends_the_job(server: ScriptedServer) -> None:
    server.script = [completion("fine"), (429, {"error": "quota is spent"})]
    chat = EndpointChatModel(server.url, "m", max_retries=1, backoff_factor=0.0, concurrency=1)
    assert chat.complete([user("a")]) == ["fine"]
    with pytest.raises(RuntimeError, match="quota is spent"):
        chat.complete([user(str(number)) for number in range(100)])
    assert chat.usage.failed == 8
    assert len(server.bodies) == 1 + 8 * 2


def test_calls_that_fail_now_and_then_end_nothing(server: ScriptedServer) -> None:
    bad, good = (500, {"error": "down"}), completion("fine")
    server.script = [good, *[bad, bad, good] * 20]
    chat = EndpointChatModel(server.url, "m", max_retries=1, backoff_factor=0.0, concurrency=1)
    assert chat.complete([user(str(number)) for number in range(41)]) == ["fine", *["", "fine"] * 20]


def test_reasoning_is_no_answer(server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.script = [
        completion("<think>\nhm\n</think>\n\nwords for illness"),
        completion("<think>so the user"),
        completion("words for health"),
    ]
    chat = EndpointChatModel(server.url, "m", concurrency=1).with_cache(AnswerCache(tmp_path / "a.jsonl"))
    questions = [user("a"), user("b")]
    assert chat.complete(questions) == ["words for illness", ""]
    assert caplog.text.count("m reasons before it answers") == 1
    # What it did not come to say is not kept.
    assert chat.complete(questions) == ["words for illness", "words for health"]


@pytest.mark.parametrize("url", ["user:s3cret@localhost:8000/v1", "htp://u:s3cret@h", "http://u:s3cret@h/v1"])
def test_credentials_in_an_address_are_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="base_url holds an @") as error:
        EndpointChatModel(url, "m")
    assert "s3cret" not in str(error.value)


def test_a_key_in_place_of_its_variable_is_not_shown() -> None:
    with pytest.raises(ValueError, match="must be the name of an environment variable") as error:
        EndpointChatModel("http://h/v1", "m", api_key_env="sk-abc123")
    assert "abc123" not in str(error.value)
