"""What the explainer and the judge need of a chat model, whichever it is, and text from strangers made safe for it."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    from selfreg.features.chat_endpoint import EndpointChatModel as EndpointChatModel
    from selfreg.features.chat_local import LocalChatModel as LocalChatModel


class Message(TypedDict):
    """One turn: `role` is "user", "assistant" or, where the model has it, "system"."""

    role: str
    content: str


Conversation: TypeAlias = Sequence[Message]


class ChatError(RuntimeError):
    """A chat server refused a call, or answered with something else than it should."""


@dataclass(frozen=True)
class Choice:
    """The answer to a question with a fixed set of answers.

    Attributes:
        option (`str`, *optional*): the option chosen, spelt as it was given; None where the model did not decide.
        probabilities (`dict[str, float]`): of each option, summing to 1; empty where the model did not decide.
    """

    option: str | None
    probabilities: dict[str, float]


class ChatModel(Protocol):
    """A chat model: what it is called, and the two things it is asked to do. Answers come in the order asked."""

    @property
    def name(self) -> str:
        """Stands beside every answer that is kept, to tell who gave it."""
        ...

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        """Answers each conversation, whose last turn is the user's, in at most `max_new_tokens` tokens."""
        ...

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        """Answers each conversation with one of `options`."""
        ...


def check_conversations(conversations: Sequence[Conversation]) -> None:
    """Raises ValueError where a conversation does not end with a turn of the user."""
    for index, conversation in enumerate(conversations):
        if not conversation or conversation[-1]["role"] != "user":
            last = repr(conversation[-1]["role"]) if conversation else "nothing"
            raise ValueError(f"conversation {index} ends with {last}: a chat model answers a turn of the role 'user'")


def check_options(options: Sequence[str]) -> None:
    """Raises ValueError where `options` are not two or more distinct answers."""
    distinct = {option.strip().casefold() for option in options}
    if isinstance(options, str) or len(options) < 2 or len(distinct) < len(options) or "" in distinct:
        raise ValueError(f"options={options!r} must be two or more different answers, none of them empty")


def option_question(conversation: Conversation, options: Sequence[str]) -> list[Message]:
    """`conversation` with an instruction behind its last turn to write one of `options`."""
    instruction = f"Answer with exactly one of: {', '.join(options)}. Write nothing else."
    return [*conversation[:-1], {"role": "user", "content": f"{conversation[-1]['content']}\n\n{instruction}"}]


def choice_tokens(options: Sequence[str]) -> int:
    """Tokens that a written answer to `option_question` may take, bare or in JSON. A token is a byte at least."""
    return 32 + max(len(json.dumps(option)) for option in options)


# What a chat template or a fence may be made of: `<|im_end|>`, `</s>`, `<start_of_turn>`, `<<SYS>>`, `[/INST]`, ```.
_CONTROL_STARTS = re.compile(r"<(?=\S)|\[(?=\|)|\[(?=/?\w*[A-Z_]\w*\])")
_BACKTICKS = re.compile(r"`{2,}")
_JOINERS = "\u200c\u200d"  # format characters that words and emoji are spelt with


def as_plain_text(text: str) -> str:
    """`text` on one line, without anything that could end a fence or open a turn where it stands in a prompt.

    Control and format characters go (a reader would not see them, a model would), white space becomes single spaces,
    and the marks that control tokens begin with are followed by a space, which leaves them readable but nothing to a
    tokenizer. It is for every text that the project did not write; applying it twice changes nothing more.
    """
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if (category == "Cf" and character not in _JOINERS) or "\U000e0100" <= character <= "\U000e01ef":
            # The latter are variation selectors beyond those of emoji: marks that nobody sees, but a model reads.
            continue
        # Zl, Zp: line ends of Unicode. Cs: halves of a character, which can't be encoded. Co: for private use.
        kept.append(" " if category in ("Cc", "Zl", "Zp", "Cs", "Co") else character)
    line = re.sub(r"\s+", " ", "".join(kept))
    return _BACKTICKS.sub("`", _CONTROL_STARTS.sub(lambda match: match[0] + " ", line))


# Imported on first use: the one needs torch and transformers, the other a network client.
_LOCATIONS = {
    "EndpointChatModel": "selfreg.features.chat_endpoint",
    "LocalChatModel": "selfreg.features.chat_local",
}


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LOCATIONS[name]), name)
