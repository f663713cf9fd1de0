"""Conversations as a backbone's chat template writes them, and the last reply in their tokens.

Pairs of replies come as TRL has them: columns `chosen` and `rejected` with an optional `prompt`, each a string or a
list of messages `{"role": …, "content": …}`; without a prompt, message lists hold the whole conversation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

CHAT = "{chat}"
"""The template that stands for the tokenizer's own chat template."""

_ROLES = ("system", "user", "assistant", "tool")
_PROBE = "The weather was mild."


@dataclass(frozen=True)
class ReplyFrame:
    """The tokens that a chat template puts around a reply.

    Attributes:
        header (`tuple[int, ...]`): before it, such as `<|im_start|>assistant`, without white space at its end.
        gap (`tuple[int, ...]`): that white space.
        footer (`tuple[int, ...]`): after it, such as `<|im_end|>`.
    """

    header: tuple[int, ...]
    gap: tuple[int, ...]
    footer: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "ReplyFrame":
        """
        Raises:
            ValueError: there is no chat template, or it does not write a reply as it was given.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                f"template={CHAT!r} needs a tokenizer with a chat template, and {tokenizer.name_or_path!r} has none: "
                "set tokenizer.chat_template, or use template='{text}' for conversations as plain text"
            )
        user = {"role": "user", "content": "Hello."}
        asked = _apply(tokenizer, [user])
        answered = _apply(tokenizer, [user, {"role": "assistant", "content": _PROBE}])
        start = answered.rfind(_PROBE)
        if not answered.startswith(asked) or start < len(asked):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} does not write a reply after what was asked, as it "
                f"was given: it makes {answered!r}"
            )
        if not answered[len(asked) : start].strip():
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} puts nothing before a reply by which it could be "
                f"found in the tokens: it makes {answered!r}; set a chat_template that names the assistant, or use "
                "template='{text}'"
            )
        header, footer = answered[len(asked) : start], answered[start + len(_PROBE) :]

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

        return cls(ids(header.rstrip()), ids(header[len(header.rstrip()) :]), ids(footer))

    def locate(self, ids: list[int]) -> tuple[int, int]:
        """First and one past the last token of the last reply; all of them where no header is found."""
        start, end = 0, len(ids)
        size = len(self.header)
        for first in range(end - size, -1, -1):
            if size and tuple(ids[first : first + size]) == self.header:
                start = first + size
                if tuple(ids[start : start + len(self.gap)]) == self.gap:
                    start += len(self.gap)
                break
        size = len(self.footer)
        if size and end - size >= start and tuple(ids[end - size :]) == self.footer:
            end -= size
        return start, end


def render_pair(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], template: str | None) -> tuple[str, str]:
    """The two sides of a pair as texts, the chosen one first.

    Args:
        tokenizer: of the backbone.
        row: `chosen`, `rejected` and, where there is one, `prompt`.
        template: `CHAT`, or another one, in which strings are joined as they are.

    Raises:
        ValueError: a side is missing or empty, or messages meet a template that is no chat.
    """
    sides = []
    for name in ("chosen", "rejected"):
        messages = conversation(row, name)
        if template == CHAT:
            sides.append(render(tokenizer, messages))
        elif isinstance(row[name], str):
            sides.append("".join(message["content"] for message in messages))
        else:
            raise ValueError(
                f"{name!r} is a list of messages, which the template {template!r} can't write: make the extractor "
                f"with template={CHAT!r}"
            )
    return sides[0], sides[1]


def check_pair(row: Mapping[str, Any]) -> None:
    """Raises ValueError where a side is missing, or both are the same."""
    if row.get("chosen") == row.get("rejected"):
        raise ValueError("'chosen' and 'rejected' are the same: there is nothing to prefer; leave the pair out")
    for name in ("chosen", "rejected"):
        conversation(row, name)


def conversation(row: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    """The messages of one side of a pair, prompt and reply.

    Raises:
        ValueError: see `render_pair`.
    """
    prompt, reply = _messages(row.get("prompt"), "prompt", "user"), _messages(row.get(name), name, "assistant")
    if not reply or not str(reply[-1]["content"] or "").strip():
        raise ValueError(f"the side {name!r} is missing or empty: leave the pair out")
    return [*prompt, *reply]


def render(tokenizer: PreTrainedTokenizerBase, messages: Iterable[Mapping[str, str]]) -> str:
    """A conversation as the chat template writes it, without the special token that the tokenizer adds itself."""
    text = _apply(tokenizer, [dict(message) for message in messages])
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)
    return text


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text


def _messages(value: Any, name: str, role: str) -> list[dict[str, str]]:
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = [dict(message) for message in value]
    for message in messages:
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"{name!r} holds {message!r}, which is no message: a message is {{'role': one of {', '.join(_ROLES)}, "
                "'content': text}"
            )
    return messages
