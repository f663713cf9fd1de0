"""EndpointChatModel: a chat model behind an OpenAI-compatible server."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled

# huggingface_hub exports its HTTP library under this name in all its versions, but does not tell type checkers so.
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from urllib3.exceptions import InvalidHeader, MaxRetryError
from urllib3.util.retry import Retry

from selfreg.features.chat import Choice, Conversation, Message, as_plain_text, check_conversations, check_options

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_LONGEST_WAIT = 60.0
# A server that asks for no key is sent this, since huggingface_hub would fill the gap with the user's Hub token.
_NO_KEY = "none"


class EndpointChatModel:
    """Asks any OpenAI-compatible server: TGI, vLLM, llama.cpp, Ollama, `transformers serve`, Inference Providers.

    A call that meets a time-out, a broken connection, an unreadable answer or the status 408, 429 or 5xx is made
    again: at once, then after a wait that doubles, or when the server says (`Retry-After`); no wait is over a minute.

    Args:
        base_url: of the server, such as `http://localhost:8000/v1`.
        model: the name of the model on that server.
        api_key_env: name of the environment variable that holds the key; None: the server asks for none. The Hub
            token of this machine is not sent to a server unless its variable is named here.
        timeout: seconds that the server may stay silent.
        max_retries: how often a failed call is made again.
        concurrency: calls at the same time.
        backoff_factor: seconds; half of the wait before the second retry, which doubles with every further one.

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
        _check_url(base_url)
        if not model:
            raise ValueError(f"model={model!r} must be the name of a model on {base_url}")
        if timeout <= 0 or max_retries < 0 or concurrency < 1 or backoff_factor < 0:
            raise ValueError(
                f"timeout={timeout} must be above 0, max_retries={max_retries} and backoff_factor={backoff_factor} "
                f"at least 0, concurrency={concurrency} at least 1"
            )
        self.base_url, self.model, self.api_key_env = base_url, model, api_key_env
        self.timeout, self.max_retries, self.concurrency = timeout, max_retries, concurrency
        self.backoff_factor = backoff_factor
        key = _NO_KEY if api_key_env is None else _read_key(api_key_env)
        # The client is the only holder of the key.
        self._client = InferenceClient(base_url=base_url, api_key=key, timeout=timeout)
        self._answered = False

    def __repr__(self) -> str:
        return f"EndpointChatModel({self.base_url!r}, {self.model!r}, api_key_env={self.api_key_env!r})"

    @property
    def name(self) -> str:
        return self.model

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        """Answers each conversation at temperature 0, without surrounding white space.

        Raises:
            ConnectionError: the server can't be reached, or stopped answering.
            RuntimeError: it refused the call, or its answers are not in the form of OpenAI's.
        """
        check_conversations(conversations)
        return self._concurrently(lambda conversation: self._ask(conversation, max_new_tokens), conversations)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        """Asks for exactly one of `options`; an answer that is none of them is asked for once more, then undecided.

        The last turn is extended by an instruction that lists the options. An answer counts where it is one of them
        but for case, surrounding white space, quotes and a full stop: it is never looked for inside prose. A chosen
        option has the probability 1, since servers need not tell more.

        Raises:
            ValueError: options that repeat or are empty.
            ConnectionError, RuntimeError: as `complete`.
        """
        check_options(options)
        check_conversations(conversations)
        return self._concurrently(lambda conversation: self._choose_one(conversation, options), conversations)

    def _concurrently(self, call: Callable[[Conversation], _T], conversations: Sequence[Conversation]) -> list[_T]:
        if not conversations:
            return []
        # On the first error, map drops the calls that have not begun.
        with ThreadPoolExecutor(min(self.concurrency, len(conversations)), "selfreg-chat") as pool:
            return list(pool.map(call, conversations))

    def _choose_one(self, conversation: Conversation, options: Sequence[str]) -> Choice:
        listed = ", ".join(options)
        question = f"{conversation[-1]['content']}\n\nAnswer with exactly one of: {listed}. Write nothing else."
        messages: list[Message] = [*conversation[:-1], {"role": "user", "content": question}]
        # A token is a byte at the least.
        max_new_tokens = 8 + max(len(option.encode()) for option in options)
        answer = self._ask(messages, max_new_tokens)
        option = parse_option(answer, options)
        if option is None:
            repair = f"That is not one of the answers. Write exactly one of: {listed}. Write nothing else."
            # Some servers refuse an empty turn.
            turns: list[Message] = [
                {"role": "assistant", "content": answer or "-"},
                {"role": "user", "content": repair},
            ]
            option = parse_option(self._ask([*messages, *turns], max_new_tokens), options)
        if option is None:
            return Choice(None, {})
        return Choice(option, {other: float(other == option) for other in options})

    def _ask(self, messages: Conversation, max_new_tokens: int) -> str:
        """One call, made again as long as its failure may pass."""
        retry = Retry(
            total=self.max_retries,
            backoff_factor=self.backoff_factor,
            backoff_jitter=self.backoff_factor / 2,  # so that concurrent calls do not come back all at once
            backoff_max=_LONGEST_WAIT,
        )
        while True:
            try:
                return self._call(messages, max_new_tokens)
            except _Passing as passing:
                try:
                    retry = retry.increment(error=passing)
                except MaxRetryError:
                    raise passing.final from None
                wait = retry.get_backoff_time()
                if passing.retry_after is not None:
                    # Anything but a number or a date is no reason to fail.
                    with contextlib.suppress(InvalidHeader):
                        wait = min(_LONGEST_WAIT, retry.parse_retry_after(passing.retry_after))
                logger.info("%s; asking again in %.1f s", passing.final, wait)
                time.sleep(wait)

    def _call(self, messages: Conversation, max_new_tokens: int) -> str:
        """One request. Raises `_Passing` where the same request may succeed later, and a final error where not."""
        try:
            output = self._client.chat_completion(
                [dict(message) for message in messages],
                model=self.model,
                max_tokens=max_new_tokens,
                temperature=0.0,
            )
            self._answered = True
            content = output.choices[0].message.content
        except OfflineModeIsEnabled:
            raise ConnectionError(
                f"HF_HUB_OFFLINE is set, and huggingface_hub then sends nothing, not even to {self.base_url}: unset "
                "it for this run, or use a LocalChatModel"
            ) from None
        except InferenceTimeoutError:
            silent = ConnectionError(
                f"the chat server at {self.base_url} did not answer within {self.timeout} s: raise timeout, or lower "
                f"concurrency={self.concurrency}"
            )
            raise _Passing(silent) from None
        except HfHubHTTPError as error:
            self._answered = True
            # Not chained: the library's message repeats what the server says, and some servers repeat the key.
            refusal = RuntimeError(self._refusal(error))
            status = error.response.status_code
            if status in (408, 429) or status >= 500:
                raise _Passing(refusal, error.response.headers.get("Retry-After")) from None
            raise refusal from None
        except httpx.ConnectError as error:
            unreachable = ConnectionError(
                f"no chat server answers at {self.base_url} ({self._clean(str(error))}). Start one, for example "
                f"`transformers serve`, `vllm serve {self.model}` or `ollama serve`, and give its address as base_url"
            )
            # Before the first answer it is a wrong address, or a server that nobody started: waiting won't help.
            if self._answered:
                raise _Passing(unreachable) from None
            raise unreachable from None
        except httpx.HTTPError as error:
            broken = ConnectionError(
                f"the connection to the chat server at {self.base_url} broke ({type(error).__name__})"
            )
            raise _Passing(broken) from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            # How huggingface_hub fails, and the line after it, on a body that is cut off or not of the known form.
            unreadable = RuntimeError(
                f"the chat server at {self.base_url} answered with something else than a chat completion "
                f"({type(error).__name__}): is it an OpenAI-compatible server, and base_url the part before "
                "/chat/completions?"
            )
            raise _Passing(unreadable) from None
        return (content or "").strip()

    def _refusal(self, error: HfHubHTTPError) -> str:
        said = self._clean(error.server_message or "")
        status = error.response.status_code
        hint = ""
        if status in (401, 403):
            where = f"the variable {self.api_key_env}" if self.api_key_env else "api_key_env, which names no variable"
            hint = f"; check the key in {where}"
        elif status == 404:
            hint = "; check the name of the model and base_url"
        return f"the chat server at {self.base_url} answered {status} for the model {self.model!r}: {said!r}{hint}"

    def _clean(self, message: str) -> str:
        """What a server said, short and without the key."""
        key = self._client.token
        if key is not None and key != _NO_KEY:
            message = message.replace(key, "***")
        return as_plain_text(message)[:300]


class _Passing(Exception):
    """A failure that may pass; never seen by callers, who get the error that it carries where it does not."""

    def __init__(self, final: Exception, retry_after: str | None = None) -> None:
        super().__init__(str(final))
        self.final, self.retry_after = final, retry_after


_QUOTES = "\"'`*\u201c\u201d\u2018\u2019\u00ab\u00bb"


def parse_option(answer: str, options: Sequence[str]) -> str | None:
    """The option that `answer` is, but for case, surrounding white space, quotes and a full stop; else None."""
    bare = answer.strip().strip(_QUOTES).strip().removesuffix(".").strip(_QUOTES).strip().casefold()
    return next((option for option in options if option.strip().casefold() == bare), None)


def _check_url(base_url: str) -> None:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url={base_url!r} must be a whole address, such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"base_url of {parts.hostname!r} holds a user name or a password, which would end up in logs and files: "
            "put the key into an environment variable and name that with api_key_env"
        )


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"the environment variable {variable} (api_key_env) holds no key: set it, or leave it out")
    if not (key.isascii() and key.isprintable()) or " " in key:
        # Such a key can't stand in a header, and the error of the HTTP library would show it.
        raise ValueError(
            f"the environment variable {variable} (api_key_env) holds white space or characters that are not ASCII: "
            "it can't be a key"
        )
    return key
