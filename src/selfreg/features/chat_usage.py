"""What a chat model was asked and what that took, counted while it works."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_BYTES_PER_TOKEN = 4


@dataclass
class ChatUsage:
    """A running count, shared by a chat model and its copies with a cache. Threads may add to it at the same time.

    Attributes:
        calls (`int`): answers that the model gave; a repair turn is one of its own.
        cached (`int`): answers that were on disk already.
        failed (`int`): conversations that stay without an answer.
        prompt_tokens (`int`): read by the model.
        completion_tokens (`int`): written by the model.
        estimated (`bool`): some of the tokens are estimated by `estimate_tokens`, since the server did not tell them.
    """

    calls: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def add(
        self,
        *,
        calls: int = 0,
        cached: int = 0,
        failed: int = 0,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        estimated: bool = False,
    ) -> None:
        """Adds to the counts; `estimated` says so of the tokens that are added with it."""
        with self._lock:
            self.calls += calls
            self.cached += cached
            self.failed += failed
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens
            self.estimated |= estimated

    def watch(self) -> Callable[[], str]:
        """The `status` for a bar that starts now: failures, tokens and tokens a second from here on."""
        started = time.perf_counter()
        failed, tokens = self.failed, self.prompt_tokens + self.completion_tokens

        def status() -> str:
            new = self.prompt_tokens + self.completion_tokens - tokens
            rate = new / max(time.perf_counter() - started, 1e-9)
            about = "about " if self.estimated else ""
            return f"{self.failed - failed:,} failed, {about}{new:,} tokens, {rate:,.0f} tokens/s"

        return status


def estimate_tokens(text: str) -> int:
    """Tokens of a text by its length in UTF-8, where the tokenizer is not at hand: a quarter of its bytes."""
    return -(-len(text.encode("utf8", "surrogatepass")) // _BYTES_PER_TOKEN)
