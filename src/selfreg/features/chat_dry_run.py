"""What a run would ask of a chat model, counted without asking."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfreg.features.answer_cache import AnswerCache, answer_key, cached
from selfreg.features.chat import (
    ChatModel,
    Choice,
    Conversation,
    check_conversations,
    check_options,
    choice_tokens,
    option_question,
)
from selfreg.features.chat_usage import estimate_tokens

# What a chat template puts around a turn: for ChatML its two marks, the role and two line ends.
_TOKENS_OF_A_TURN = 5
_PLACEHOLDER = "a phrase that nobody has written yet, of about the length that they have"


@dataclass(frozen=True)
class ChatEstimate:
    """What a run would take.

    Attributes:
        calls (`int`): answers that are not there yet. An unparsable answer to `choose` takes one more each.
        cached (`int`): answers that are there.
        prompt_tokens (`int`): that the model would read.
        completion_tokens (`int`): that it would write at the most.
        estimated (`bool`): the tokens of the prompts are estimated from the length of the texts.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    estimated: bool

    def price(self, per_million_prompt: float, per_million_completion: float) -> float:
        """The price at the most, in the currency of the two rates, which are those of a million tokens."""
        return (self.prompt_tokens * per_million_prompt + self.completion_tokens * per_million_completion) / 1e6


class CountingChatModel:
    """Stands in for a chat model and asks it nothing: it counts the questions, and answers with what is in the cache.

    What is not there is answered with a placeholder, or with the first option, so that the run goes on to its next
    questions; where these quote the placeholder, their length is an estimate. A question that comes again is counted
    as cached.

    Args:
        chat: the model that the run would ask.
        cache: where its answers are kept.
        count_tokens: of a text, such as `LocalChatModel.count_tokens`; None: a quarter of its bytes, an estimate.
    """

    def __init__(
        self,
        chat: ChatModel,
        cache: AnswerCache | None = None,
        *,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        self._chat = chat
        self._known = None if cache is None else cached(chat, cache)
        self._count_tokens = count_tokens or estimate_tokens
        self._estimated = count_tokens is None
        self._asked: set[str] = set()
        self._calls = self._cached = self._prompt_tokens = self._completion_tokens = 0

    @property
    def name(self) -> str:
        return self._chat.name

    @property
    def estimate(self) -> ChatEstimate:
        """What was asked until now."""
        return ChatEstimate(self._calls, self._cached, self._prompt_tokens, self._completion_tokens, self._estimated)

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        check_conversations(conversations)
        answers = []
        for conversation in conversations:
            known = None
            if self._known is not None:
                known = self._known.known_answer(conversation, max_new_tokens=max_new_tokens)
            key = answer_key("complete", [self.name], conversation, max_new_tokens=max_new_tokens)
            self._count(key, conversation, max_new_tokens, known=known is not None)
            answers.append(_PLACEHOLDER if known is None else known)
        return answers

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        check_options(options)
        check_conversations(conversations)
        first = Choice(options[0], {option: float(option == options[0]) for option in options})
        choices = []
        for conversation in conversations:
            known = None if self._known is None else self._known.known_choice(conversation, options)
            key = answer_key("choose", [self.name], conversation, options=list(options))
            question = option_question(conversation, options)
            self._count(key, question, choice_tokens(options), known=known is not None)
            choices.append(known or first)
        return choices

    def _count(self, key: str, conversation: Conversation, completion_tokens: int, *, known: bool) -> None:
        if known or key in self._asked:
            self._cached += 1
            return
        self._asked.add(key)
        self._calls += 1
        self._prompt_tokens += sum(self._count_tokens(turn["content"]) + _TOKENS_OF_A_TURN for turn in conversation)
        self._completion_tokens += completion_tokens
