"""Answers of chat models on disk, each there as soon as it was given, so that none has to be asked for twice."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from selfreg.features.chat import ChatModel, Choice, Conversation
from selfreg.features.chat_usage import ChatUsage, estimate_tokens


class AnswerCache:
    """A file of answers, one JSON object a line, to which every answer is appended at once and flushed to the disk.

    A process may be killed at any moment: what it had added is found by the next one, and the line that it was writing
    is skipped. Threads may share one object, and processes one file, though each sees only what was there when it
    opened the file and what it added itself.

    Args:
        path: the file; made, with its folder, when the first answer is added.

    Raises:
        ValueError: the file is there, and holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._answers: dict[str, Any] = {}
        self._lock = threading.Lock()
        if self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._answers)

    def __repr__(self) -> str:
        return f"AnswerCache({str(self.path)!r}, {len(self)} answers)"

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    self._answers[entry["key"]] = entry["answer"]
                except (ValueError, TypeError, LookupError):
                    # The last line of a process that was killed while writing it; the answer is asked for again.
                    if _LINE_START.startswith(line.strip()) or line.startswith(_LINE_START):
                        continue
                    raise ValueError(
                        f"{self.path} is not a cache of answers (line {number} begins with {line[:20]!r}): name "
                        "another file, or one that does not exist yet"
                    ) from None

    def find(self, key: str) -> Any | None:
        """The answer kept under `key`, as it was added; None where there is none."""
        return self._answers.get(key)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps answers by their keys; they are on the disk when this returns.

        Raises:
            OSError: the file could not be written; names it.
        """
        if not answers:
            return
        lines = [json.dumps({"key": key, "answer": answer}) for key, answer in answers.items()]
        # A leading newline keeps a line that was cut short by a kill from swallowing this one.
        data = "".join("\n" + line for line in lines).encode("ascii")
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                message = f"could not write {self.path}: {error.strerror or error}"
                raise type(error)(error.errno, message) from error
            self._answers.update(answers)


_LINE_START = b'{"key": "'


def answer_key(kind: str, model: Sequence[str], conversation: Conversation, **parameters: Any) -> str:
    """SHA-256, as hex, over all that an answer depends on.

    Args:
        kind: of call, "complete" or "choose".
        model: the model's name, and whatever else tells it from others of that name.
        conversation: with all its turns.
        parameters: such as `options` or `max_new_tokens`; values of JSON.
    """
    turns = [[message["role"], message["content"]] for message in conversation]
    text = json.dumps([kind, list(model), turns, parameters], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@runtime_checkable
class CachingChatModel(Protocol):
    """A `ChatModel` that keeps each answer as soon as it has it, and counts what it is asked."""

    @property
    def name(self) -> str: ...

    @property
    def usage(self) -> ChatUsage: ...

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]: ...

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]: ...

    def with_cache(self, cache: AnswerCache) -> "CachingChatModel":
        """A copy that keeps its answers in `cache`, and takes from there those that it holds already."""
        ...

    def known_answer(self, conversation: Conversation, *, max_new_tokens: int = 64) -> str | None:
        """What `complete` would answer without asking; None where the cache does not hold it."""
        ...

    def known_choice(self, conversation: Conversation, options: Sequence[str]) -> Choice | None:
        """What `choose` would answer without asking; None where the cache does not hold it."""
        ...


def cached(chat: ChatModel, cache: AnswerCache) -> CachingChatModel:
    """`chat`, with its answers kept in `cache`: by the model itself where it can, else around it."""
    return chat.with_cache(cache) if isinstance(chat, CachingChatModel) else CachedChatModel(chat, cache)


class CachedChatModel:
    """Any chat model with its answers kept in a cache; it is passed only what is missing there, in one call.

    An empty answer or an undecided choice may be how the model tells of a failure: it is not kept, but asked again.
    Its tokens are estimated.

    Args:
        chat: the model; its name must tell it from others that share the cache.
        cache: where its answers are kept.
    """

    def __init__(self, chat: ChatModel, cache: AnswerCache) -> None:
        self.chat, self.cache, self.usage = chat, cache, ChatUsage()

    def __repr__(self) -> str:
        return f"CachedChatModel({self.chat!r}, {self.cache!r})"

    @property
    def name(self) -> str:
        return self.chat.name

    def with_cache(self, cache: AnswerCache) -> "CachedChatModel":
        copied = CachedChatModel(self.chat, cache)
        copied.usage = self.usage
        return copied

    def known_answer(self, conversation: Conversation, *, max_new_tokens: int = 64) -> str | None:
        return self.cache.find(self._complete_key(conversation, max_new_tokens))

    def known_choice(self, conversation: Conversation, options: Sequence[str]) -> Choice | None:
        return load_choice(self.cache.find(self._choose_key(conversation, options)))

    def _complete_key(self, conversation: Conversation, max_new_tokens: int) -> str:
        return answer_key("complete", [self.name], conversation, max_new_tokens=max_new_tokens)

    def _choose_key(self, conversation: Conversation, options: Sequence[str]) -> str:
        return answer_key("choose", [self.name], conversation, options=list(options))

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        known = [self.known_answer(conversation, max_new_tokens=max_new_tokens) for conversation in conversations]
        missing = [conversation for conversation, answer in zip(conversations, known, strict=True) if answer is None]
        answers = self.chat.complete(missing, max_new_tokens=max_new_tokens) if missing else []
        asked = list(zip(missing, answers, strict=True))
        self.cache.add({self._complete_key(c, max_new_tokens): answer for c, answer in asked if answer})
        self._count(missing, answers, len(known))
        rest = iter(answers)
        return [next(rest) if answer is None else answer for answer in known]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        known = [self.known_choice(conversation, options) for conversation in conversations]
        missing = [conversation for conversation, choice in zip(conversations, known, strict=True) if choice is None]
        choices = self.chat.choose(missing, options) if missing else []
        asked = list(zip(missing, choices, strict=True))
        self.cache.add({self._choose_key(c, options): dump_choice(choice) for c, choice in asked if choice.option})
        self._count(missing, [choice.option or "" for choice in choices], len(known))
        rest = iter(choices)
        return [next(rest) if choice is None else choice for choice in known]

    def _count(self, asked: Sequence[Conversation], answers: Sequence[str], total: int) -> None:
        failed = sum(not answer for answer in answers)
        self.usage.add(
            calls=len(asked) - failed,
            cached=total - len(asked),
            failed=failed,
            prompt_tokens=sum(estimate_tokens(turn["content"]) for conversation in asked for turn in conversation),
            completion_tokens=sum(map(estimate_tokens, answers)),
            estimated=bool(asked),
        )


def dump_choice(choice: Choice) -> dict[str, Any]:
    """A choice as JSON."""
    return {"option": choice.option, "probabilities": choice.probabilities}


def load_choice(value: dict[str, Any] | None) -> Choice | None:
    """The choice that `dump_choice` was given; None for None."""
    return None if value is None else Choice(value["option"], value["probabilities"])
