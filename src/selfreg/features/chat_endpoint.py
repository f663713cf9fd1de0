"""EndpointChatModel: a chat model behind an OpenAI-compatible server."""

import copy
import json
import logging
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from selfreg.features.answer_cache import AnswerCache, answer_key
from selfreg.features.chat import (
    ChatError,
    Choice,
    Conversation,
    check_conversations,
    check_options,
    choice_tokens,
    option_question,
)
from selfreg.features.chat_server import CallFailed, ChatServer, ServerAnswer
from selfreg.features.chat_usage import ChatUsage

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# How servers that have no `response_format` refuse it.
_NOT_THERE = (400, 422, 501)
_STREAK = 8
_REASONING = re.compile(r"^\s*<think>.*?(</think>|\Z)", re.DOTALL)


class EndpointChatModel:
    """Asks any OpenAI-compatible server: TGI, vLLM, llama.cpp, Ollama, `transformers serve`, Inference Providers.

    A call that meets a time-out, a broken connection, an unreadable answer or the status 408, 429 or 5xx is made
    again: at once, then after a wait that doubles, or when the server says (`Retry-After`); no wait is over a minute.

    A conversation that the server refuses by itself (400, 413, 422, 501: content filters, too long), or that fails to
    the end, stays without an answer, which is logged and counted in `usage.failed`: the others go on. It is an error
    where nothing was ever answered, since then a setting is wrong; where the key or the model is refused; where the
    server can no longer be reached; and where 8 calls in a row have failed to the end, as with a quota that is spent.

    Args:
        base_url: of the server, such as `http://localhost:8000/v1`.
        model: the name of the model on that server.
        api_key_env: name of the environment variable that holds the key; None: the server asks for none. The Hub
            token of this machine is not sent to a server unless its variable is named here.
        timeout: seconds that the server may stay silent.
        max_retries: how often a failed call is made again.
        concurrency: calls at the same time.
        backoff_factor: seconds; half of the wait before the second retry, which doubles with every further one.

    Attributes:
        usage (`ChatUsage`): what was asked, and what that took.

    Raises:
        ValueError: a setting that can't be, or the variable holds no key.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
        concurrency: int = 4,
        backoff_factor: float = 1.0,
    ) -> None:
        self._server = ChatServer(
            base_url,
            model,
            api_key_env=api_key_env,
            timeout=timeout,
            max_retries=max_retries,
            concurrency=concurrency,
            backoff_factor=backoff_factor,
        )
        self.usage = ChatUsage()
        self._structured, self._streak = _StructuredOutput(), _Streak()
        self._told_of_reasoning = threading.Event()
        self._cache: AnswerCache | None = None

    def __repr__(self) -> str:
        server = self._server
        return f"EndpointChatModel({server.base_url!r}, {server.model!r}, api_key_env={server.api_key_env!r})"

    @property
    def name(self) -> str:
        return self._server.model

    def with_cache(self, cache: AnswerCache) -> "EndpointChatModel":
        """A copy that keeps the answer to every call in `cache`; connection and `usage` stay shared."""
        copied = copy.copy(self)
        copied._cache = cache
        return copied

    def known_answer(self, conversation: Conversation, *, max_new_tokens: int = 64) -> str | None:
        """What `complete` would answer without asking; None where the cache does not hold it."""
        return self._find(self._key(conversation, max_new_tokens))

    def known_choice(self, conversation: Conversation, options: Sequence[str]) -> Choice | None:
        """What `choose` would answer without asking; None where the cache does not hold it, or not its repair."""

        def look_up(messages: Conversation, max_new_tokens: int) -> str:
            known = self._find(self._key(messages, max_new_tokens, options))
            if known is None:
                raise LookupError
            return known

        try:
            return _decide(conversation, options, look_up)
        except LookupError:
            return None

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        """Answers each conversation at temperature 0, without surrounding white space; "" where it failed.

        Raises:
            ConnectionError: the server can't be reached, or stopped answering.
            ChatError: it refused the key or the model, or has never answered in the form of OpenAI's.
        """
        check_conversations(conversations)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        return self._concurrently(
            lambda conversation, stop: self._ask(conversation, max_new_tokens, None, stop), conversations, failed=""
        )

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        """Asks for exactly one of `options`; an answer that is none of them is asked for once more, then undecided.

        The last turn is extended by an instruction that lists the options, and a server that has structured output is
        asked for JSON with one of them. An answer counts where it is one of them but for case, surrounding white
        space, quotes and a full stop: it is never looked for inside prose. A chosen option has the probability 1,
        since servers need not tell more. A conversation that failed is undecided, too.

        Raises:
            ValueError: options that repeat or are empty.
            ConnectionError, ChatError: as `complete`.
        """
        check_options(options)
        check_conversations(conversations)

        def decide(conversation: Conversation, stop: threading.Event) -> Choice:
            return _decide(conversation, options, lambda turns, limit: self._ask(turns, limit, options, stop))

        return self._concurrently(decide, conversations, failed=Choice(None, {}))

    def _concurrently(
        self, call: Callable[[Conversation, threading.Event], _T], conversations: Sequence[Conversation], *, failed: _T
    ) -> list[_T]:
        """Results in order, `failed` for each call that failed."""
        if not conversations:
            return []
        stop = threading.Event()

        def guarded(conversation: Conversation) -> _T | CallFailed:
            if stop.is_set():
                return CallFailed(ChatError("not sent, since another call ended it all"))
            try:
                return call(conversation, stop)
            except CallFailed as failure:
                self.usage.add(failed=1)
                # One prompt may be refused, one call may meet a bad moment; a server that answers nobody any more is
                # not worth the retries of thousands.
                if failure.refused_with is None and self._streak.failed() >= _STREAK:
                    stop.set()
                    raise failure.error from None
                return failure
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(min(self._server.concurrency, len(conversations)), "selfreg-chat") as pool:
            futures = [pool.submit(guarded, conversation) for conversation in conversations]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                # What is on its way is waited for, and its answer kept; nothing is sent any more.
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        outcomes = [future.result() for future in futures]
        failures = [outcome for outcome in outcomes if isinstance(outcome, CallFailed)]
        if failures and not self._excused(failures):
            raise failures[0].error
        for failure in failures:
            logger.warning("a conversation stays without an answer: %s", failure.error)
        return [failed if isinstance(outcome, CallFailed) else outcome for outcome in outcomes]

    def _excused(self, failures: Sequence[CallFailed]) -> bool:
        """Whether these calls failed by themselves, and not by a setting that no call can succeed with."""
        if self.usage.calls:
            return True
        # Answers from an earlier run tell the same of a prompt that is refused: else, once it alone is left, every
        # run would end with an error.
        return self.usage.cached > 0 and all(failure.refused_with is not None for failure in failures)

    def _key(self, messages: Conversation, max_new_tokens: int, options: Sequence[str] | None = None) -> str:
        # Whether the answer came as JSON is no part of it: it is the server that changes, not the question.
        model = [self._server.model, self._server.base_url]
        if options is None:
            return answer_key("complete", model, messages, max_new_tokens=max_new_tokens, temperature=0)
        return answer_key(
            "choose", model, messages, options=list(options), max_new_tokens=max_new_tokens, temperature=0
        )

    def _find(self, key: str) -> str | None:
        return None if self._cache is None else self._cache.find(key)

    def _ask(
        self, messages: Conversation, max_new_tokens: int, options: Sequence[str] | None, stop: threading.Event
    ) -> str:
        """The answer to one call, from the cache or the server."""
        key = self._key(messages, max_new_tokens, options)
        known = self._find(key)
        if known is not None:
            self.usage.add(cached=1)
            return known
        answer = self._send(messages, max_new_tokens, options, stop)
        self._streak.succeeded()
        text = self._without_reasoning(answer.text)
        if text and self._cache is not None:
            self._cache.add({key: text})
        self.usage.add(
            calls=1,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            estimated=answer.estimated,
        )
        return text

    def _without_reasoning(self, text: str) -> str:
        """What a model that reasons in its answer says after that; "" where it did not come so far."""
        answer = _REASONING.sub("", text).strip()
        if answer != text and not self._told_of_reasoning.is_set():
            self._told_of_reasoning.set()
            logger.warning(
                "%s reasons before it answers, which few tokens are left for: turn that off at the server", self.name
            )
        return answer

    def _send(
        self, messages: Conversation, max_new_tokens: int, options: Sequence[str] | None, stop: threading.Event
    ) -> ServerAnswer:
        if options is None or not self._structured.wanted:
            return self._server.ask(messages, max_new_tokens, stop=stop)
        try:
            answer = self._server.ask(messages, max_new_tokens, options=options, stop=stop)
        except CallFailed as failure:
            if failure.refused_with not in _NOT_THERE or self._structured.works:
                raise
            # Of the format, or of this prompt? It is the format where the same prompt passes without it.
            plain = self._server.ask(messages, max_new_tokens, stop=stop)
            self._structured.give_up(f"refuses it ({failure.error})")
            return plain
        if _parse_json(answer.text, options) is not None:
            self._structured.works = True
        elif answer.text and not self._structured.works:
            self._structured.give_up("ignores it")
        return answer


class _Streak:
    """Calls in a row that failed after all their retries, over all threads."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()

    def failed(self) -> int:
        """Counts one more; gives how many it is now."""
        with self._lock:
            self._count += 1
            return self._count

    def succeeded(self) -> None:
        with self._lock:
            self._count = 0


class _StructuredOutput:
    """Whether a server has structured output: found out with the first calls, which may be several at a time."""

    def __init__(self) -> None:
        self.wanted, self.works = True, False
        self._lock = threading.Lock()

    def give_up(self, why: str) -> None:
        with self._lock:
            if self.wanted:
                self.wanted = False
                logger.info("no structured output, since the server %s: answers are read as plain text", why)


def _decide(conversation: Conversation, options: Sequence[str], ask: Callable[[Conversation, int], str]) -> Choice:
    """The option that `ask` (of a conversation and a limit of tokens) answers, with one repair turn."""
    messages, limit = option_question(conversation, options), choice_tokens(options)
    answer = ask(messages, limit)
    option = parse_option(answer, options)
    if option is None:
        repair = f"That is not one of the answers. Write exactly one of: {', '.join(options)}. Write nothing else."
        # Some servers refuse an empty turn.
        messages += [{"role": "assistant", "content": answer or "-"}, {"role": "user", "content": repair}]
        option = parse_option(ask(messages, limit), options)
    if option is None:
        return Choice(None, {})
    return Choice(option, {other: float(other == option) for other in options})


_QUOTES = "\"'`*\u201c\u201d\u2018\u2019\u00ab\u00bb"


def parse_option(answer: str, options: Sequence[str]) -> str | None:
    """The option that `answer` is, but for case, surrounding white space, quotes and a full stop; else None.

    An object of JSON counts where it is `{"answer": option}` and nothing else.
    """
    if answer.lstrip().startswith("{"):
        return _parse_json(answer, options)
    bare = answer.strip().strip(_QUOTES).strip().removesuffix(".").strip(_QUOTES).strip().casefold()
    return next((option for option in options if option.strip().casefold() == bare), None)


def _parse_json(answer: str, options: Sequence[str]) -> str | None:
    try:
        # Pairs, since of an object that answers twice the last would win.
        pairs = json.loads(answer, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    return next((option for option in options if pairs == [("answer", option)]), None)
