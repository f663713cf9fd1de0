"""One call of an OpenAI-compatible server: sent, made again while its failure may pass, its answer or error read."""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from huggingface_hub import (
    ChatCompletionInputJSONSchema,
    ChatCompletionInputResponseFormatJSONSchema,
    ChatCompletionOutput,
    InferenceClient,
)
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled

# huggingface_hub exports its HTTP library under this name in all its versions, but does not tell type checkers so.
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from urllib3.exceptions import InvalidHeader, MaxRetryError
from urllib3.util.retry import Retry

from selfreg.features.chat import ChatError, Conversation, as_plain_text
from selfreg.features.chat_usage import estimate_tokens

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0
# A server that asks for no key is sent this, since huggingface_hub would fill the gap with the user's Hub token.
_NO_KEY = "none"
# Of one prompt: content filters, too long a prompt, or a parameter that the server does not have.
_REFUSALS = (400, 413, 422, 501)


@dataclass(frozen=True)
class ServerAnswer:
    """What a server answered.

    Attributes:
        text (`str`): without surrounding white space; empty where the server sent nothing else.
        prompt_tokens (`int`): that it read.
        completion_tokens (`int`): that it wrote.
        estimated (`bool`): the server did not tell the tokens; they are estimated.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    estimated: bool


class CallFailed(Exception):
    """One call got no answer, though others may.

    Attributes:
        error (`Exception`): what to raise where it is not the one call alone.
        refused_with (`int`, *optional*): the status with which the server refused it; None where it was tried again
            and again.
    """

    def __init__(self, error: Exception, refused_with: int | None = None) -> None:
        super().__init__(str(error))
        self.error, self.refused_with = error, refused_with


class ChatServer:
    """The arguments are those of `EndpointChatModel`. Threads may call it at the same time."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None,
        timeout: float,
        max_retries: int,
        concurrency: int,
        backoff_factor: float,
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

    def ask(
        self,
        messages: Conversation,
        max_new_tokens: int,
        *,
        options: Sequence[str] | None = None,
        stop: threading.Event,
    ) -> ServerAnswer:
        """The answer to one conversation, at temperature 0.

        Args:
            messages: the conversation.
            max_new_tokens: that the answer may take.
            options: asks the server to hold the answer to `{"answer": one of them}`.
            stop: once it is set, a failed call is not made again.

        Raises:
            CallFailed: this conversation gets no answer.
            ConnectionError: the server can't be reached, and waiting does not help or did not.
            ChatError: the server refuses every call: wrong key, no such model.
        """
        retry = Retry(
            total=self.max_retries,
            backoff_factor=self.backoff_factor,
            backoff_jitter=self.backoff_factor / 2,  # so that concurrent calls do not come back all at once
            backoff_max=_LONGEST_WAIT,
        )
        while True:
            try:
                return self._call(messages, max_new_tokens, options)
            except _Passing as passing:
                try:
                    retry = retry.increment(error=passing)
                except MaxRetryError:
                    if passing.whole_server:
                        raise passing.final from None
                    raise CallFailed(passing.final) from None
                wait = retry.get_backoff_time()
                if passing.retry_after is not None:
                    # Anything but a number or a date is no reason to fail.
                    with contextlib.suppress(InvalidHeader):
                        wait = min(_LONGEST_WAIT, retry.parse_retry_after(passing.retry_after))
                logger.info("%s; asking again in %.1f s", passing.final, wait)
                _pause(wait, stop)
                if stop.is_set():
                    raise CallFailed(passing.final) from None

    def _call(self, messages: Conversation, max_new_tokens: int, options: Sequence[str] | None) -> ServerAnswer:
        """One request. Raises `_Passing` where the same request may succeed later, and a final error where not."""
        try:
            output = self._client.chat_completion(
                [dict(message) for message in messages],
                model=self.model,
                max_tokens=max_new_tokens,
                temperature=0.0,
                response_format=None if options is None else _answer_format(options),
            )
            self._answered = True
            text = _text_of(output)
        except OfflineModeIsEnabled:
            raise ConnectionError(
                f"HF_HUB_OFFLINE is set, and huggingface_hub then sends nothing, not even to {self.base_url}: unset "
                "it for this run, or use a LocalChatModel"
            ) from None
        except InferenceTimeoutError as error:
            if isinstance(error.__cause__, httpx.ConnectTimeout):
                raise self._unreachable("it does not take the connection") from None
            silent = ConnectionError(
                f"the chat server at {self.base_url} did not answer within {self.timeout} s: raise timeout, or lower "
                f"concurrency={self.concurrency}"
            )
            raise _Passing(silent) from None
        except HfHubHTTPError as error:
            self._answered = True
            # Not chained: the library's message repeats what the server says, and some servers repeat the key.
            refusal = ChatError(self._refusal(error))
            status = error.response.status_code
            if status in _REFUSALS:
                raise CallFailed(refusal, status) from None
            if status in (408, 429) or status >= 500:
                raise _Passing(refusal, error.response.headers.get("Retry-After")) from None
            raise refusal from None
        except httpx.ConnectError as error:
            raise self._unreachable(self._clean(str(error))) from None
        except httpx.HTTPError as error:
            broken = ConnectionError(
                f"the connection to the chat server at {self.base_url} broke ({type(error).__name__})"
            )
            raise _Passing(broken) from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            # How huggingface_hub fails, and `_text_of`, on a body that is cut off or not of the known form.
            unreadable = ChatError(
                f"the chat server at {self.base_url} answered with something else than a chat completion "
                f"({type(error).__name__}): is it an OpenAI-compatible server, and base_url the part before "
                "/chat/completions?"
            )
            raise _Passing(unreadable) from None
        return self._counted(messages, self._without_key(text), output)

    def _unreachable(self, why: str) -> "ConnectionError | _Passing":
        unreachable = ConnectionError(
            f"no chat server answers at {self.base_url} ({why}). Start one, for example `transformers serve`, "
            f"`vllm serve {self.model}` or `ollama serve`, and give its address as base_url (--endpoint)"
        )
        # Before the first answer it is a wrong address, or a server that nobody started: waiting won't help.
        return _Passing(unreachable, whole_server=True) if self._answered else unreachable

    def _counted(self, messages: Conversation, text: str, output: ChatCompletionOutput) -> ServerAnswer:
        # Typed as if a server always told them; a field that it leaves out is None.
        told = cast(object, output.usage)
        counts = (told.get("prompt_tokens"), told.get("completion_tokens")) if isinstance(told, dict) else (None, None)
        prompt_tokens, completion_tokens = counts
        if isinstance(prompt_tokens, int) and isinstance(completion_tokens, int):
            return ServerAnswer(text, prompt_tokens, completion_tokens, estimated=False)
        prompt_tokens = sum(estimate_tokens(message["content"]) for message in messages)
        return ServerAnswer(text, prompt_tokens, estimate_tokens(text), estimated=True)

    def _refusal(self, error: HfHubHTTPError) -> str:
        said = self._clean(error.server_message or "")
        status = error.response.status_code
        hint = ""
        if status in (401, 403):
            where = f"the variable {self.api_key_env}" if self.api_key_env else "api_key_env, which names no variable"
            hint = f"; check the key in {where}"
        elif status == 404:
            hint = "; check the name of the model and base_url (--endpoint)"
        return f"the chat server at {self.base_url} answered {status} for the model {self.model!r}: {said!r}{hint}"

    def _clean(self, message: str) -> str:
        """What a server said, short and without the key."""
        return as_plain_text(self._without_key(message))[:300]

    def _without_key(self, text: str) -> str:
        key = self._client.token
        return text if key is None or key == _NO_KEY else text.replace(key, "***")


class _Passing(Exception):
    """A failure that may pass; never seen by callers, who get the error that it carries where it does not."""

    def __init__(self, final: Exception, retry_after: str | None = None, *, whole_server: bool = False) -> None:
        super().__init__(str(final))
        self.final, self.retry_after, self.whole_server = final, retry_after, whole_server


def _pause(seconds: float, stop: threading.Event) -> None:
    stop.wait(seconds)


class _OpenAIFormat(ChatCompletionInputResponseFormatJSONSchema):
    """A `response_format` that goes out as it is: with a base_url, huggingface_hub rewrites one whose `get` tells the
    type "json_schema" into a form of TGI's that other servers take for "any JSON"."""

    def get(self, _key: str, default: Any = None) -> Any:
        return default


def _answer_format(options: Sequence[str]) -> ChatCompletionInputResponseFormatJSONSchema:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": list(options)}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    # Every field is sent, and a description of null might be refused.
    answer = ChatCompletionInputJSONSchema(name="answer", description="One answer.", schema=schema, strict=True)
    return _OpenAIFormat(type="json_schema", json_schema=answer)


def _text_of(output: ChatCompletionOutput) -> str:
    """The text of an answer. Raises TypeError or LookupError where the body has another form."""
    message = output.choices[0].message
    role, content = cast(str | None, message.role), cast(object, message.content)
    if role not in ("assistant", None) or not (content is None or isinstance(content, str)):
        raise TypeError("not an assistant's text")
    # JSON can spell halves of characters, which can be neither sent again nor kept.
    return (content or "").encode("utf8", "replace").decode("utf8").strip()


def _check_url(base_url: str) -> None:
    if "@" in base_url:
        # Not shown: what stands before it is a key.
        raise ValueError(
            "base_url holds an @, and with it a user name or a password, which would end up in logs and files: put "
            "the key into an environment variable and name that with api_key_env (--api-key-env)"
        )
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url={base_url!r} must be a whole address, such as http://localhost:8000/v1")
    if parts.query or parts.fragment:
        raise ValueError(
            f"base_url of {parts.hostname!r} holds something behind `?` or `#`, which would end up in logs and files: "
            "put a key into an environment variable and name that with api_key_env (--api-key-env)"
        )


def _read_key(variable: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        # Not shown: it may be the key itself.
        raise ValueError(
            "api_key_env (--api-key-env) must be the name of an environment variable, such as MY_API_KEY, and not the "
            "key itself"
        )
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
