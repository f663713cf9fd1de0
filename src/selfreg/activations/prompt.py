"""Which tokens the backbone sees (template), which of them count (token rule), how they become one state (pooling).

The extractor and the classifier share these functions, so that a text has the same states in both.
Shapes: B texts, T tokens, D hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfreg.activations.conversation import CHAT, ReplyFrame

Prompt = tuple[list[int], int, int]
"""Token ids, first and one past the last token of the text."""

Pooling = Literal["last", "mean", "cls"]
TokenRule = Literal["text_no_sinks", "text", "all"]

SINK_FACTOR = 10.0
"""A token is an attention sink where the norm of its hidden state is over this many times the reference norm."""

REFERENCE_TEXT = (
    "The weather was mild that morning, so they walked along the river to the old market, bought bread, apples and "
    "a newspaper, and talked about what the town would look like in twenty years."
)
"""Plain prose whose median token norm is the yardstick for attention sinks.

A yardstick taken from each text itself would fail on texts of one token, where the sink is the median."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError where `value` is not one of the arguments of the Literal type `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, get_args(choices)))}")


@dataclass(frozen=True)
class PromptLayout:
    """The fixed tokens around a text, and what the tokenizer adds by itself.

    A template's two sides are tokenised apart from the text, so that a text has the same tokens in every template and
    the classifier can wrap what any tokenizer call gives it (`pipeline` knows of no template).

    Attributes:
        prefix (`tuple[int, ...]`), suffix (`tuple[int, ...]`): tokens of the template, before and after the text.
        num_leading (`int`), num_trailing (`int`): special tokens that the tokenizer puts at the start (a BOS, `[CLS]`)
            and at the end (`[SEP]`) of every text.
        keep_special (`bool`): whether those stay; not where the template brings its own special tokens, or there
            would be two BOS.
        max_length (`int`): tokens of a whole prompt. Longer texts lose their end, the template stays.
        frame (`ReplyFrame`, *optional*): of conversations (template `"{chat}"`). The text is then the last reply;
            where all is too long, what was said before it loses its beginning first.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    num_leading: int
    num_trailing: int
    keep_special: bool
    max_length: int
    frame: ReplyFrame | None = None

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, template: str | None, max_length: int
    ) -> "PromptLayout":
        """
        Raises:
            ValueError: the template has not exactly one `{text}`, or it leaves no room for a text; or it is
                `"{chat}"` and the tokenizer has no chat template.
        """
        probe = tokenizer(REFERENCE_TEXT, return_special_tokens_mask=True)["special_tokens_mask"]
        if 0 not in probe:
            raise ValueError("the tokenizer makes no token of plain English text; is it the backbone's own?")
        num_leading, num_trailing = probe.index(0), probe[::-1].index(0)
        prefix: tuple[int, ...] = ()
        suffix: tuple[int, ...] = ()
        keep_special = True
        frame = ReplyFrame.from_tokenizer(tokenizer) if template == CHAT else None
        if template is not None and frame is None:
            if template.count("{text}") != 1:
                raise ValueError(f"template {template!r} must hold {{text}} exactly once")
            before, after = template.split("{text}")
            prefix, suffix = (
                tuple(tokenizer(side, add_special_tokens=False)["input_ids"]) if side else ()
                for side in (before, after)
            )
            special = set(tokenizer.all_special_ids)
            keep_special = not special.intersection(prefix + suffix)
        layout = cls(prefix, suffix, num_leading, num_trailing, keep_special, max_length, frame)
        if layout.text_room < 1:
            raise ValueError(f"max_length={max_length} leaves no room for a text: the template alone takes it all")
        return layout

    @property
    def text_room(self) -> int:
        """Tokens of a prompt that are left for the text."""
        special = (self.num_leading + self.num_trailing) if self.keep_special else 0
        around = len(self.prefix) + len(self.suffix)
        if self.frame is not None:
            around = len(self.frame.header) + len(self.frame.gap) + len(self.frame.footer)
        return self.max_length - around - special

    def wrap(self, token_ids: list[int]) -> tuple[list[int], int, int]:
        """From what `tokenizer(text)` gives to the prompt, and the first and one past the last token of the text."""
        if self.frame is not None:
            return self._wrap_conversation(token_ids, self.frame)
        end = len(token_ids) - self.num_trailing
        text = token_ids[self.num_leading : end][: self.text_room]
        head = token_ids[: self.num_leading] if self.keep_special else []
        tail = token_ids[end:] if self.keep_special else []
        start = len(head) + len(self.prefix)
        return [*head, *self.prefix, *text, *self.suffix, *tail], start, start + len(text)

    def first_token(self, token_ids: list[int]) -> int:
        """Where the text begins in what `tokenizer(text)` gives; in a conversation the last reply."""
        if self.frame is None:
            return self.num_leading
        end = len(token_ids) - self.num_trailing
        return self.num_leading + self.frame.locate(token_ids[self.num_leading : end])[0]

    def _wrap_conversation(self, token_ids: list[int], frame: ReplyFrame) -> tuple[list[int], int, int]:
        end = len(token_ids) - self.num_trailing
        head, inner, tail = token_ids[: self.num_leading], token_ids[self.num_leading : end], token_ids[end:]
        first, last = frame.locate(inner)
        before, reply, after = inner[:first], inner[first:last], inner[last:]
        room = self.max_length - len(head) - len(after) - len(tail)
        # The reply is what is judged: what was said before gives way to it, down to the header.
        opening = min(first, len(frame.header) + len(frame.gap))
        kept = min(first, max(room - len(reply), opening))
        before, reply = before[first - kept :], reply[: max(room - kept, 0)]
        start = len(head) + len(before)
        return [*head, *before, *reply, *after, *tail], start, start + len(reply)


class PromptBatch(NamedTuple):
    """Prompts of one forward pass, padded on the right.

    Attributes:
        input_ids (`[B, T]`), attention_mask (`[B, T]`): for the backbone.
        text_mask (`[B, T]`, bool): the tokens of the text itself.
    """

    input_ids: Tensor
    attention_mask: Tensor
    text_mask: Tensor


def collate_prompts(prompts: Sequence[Prompt], pad_id: int) -> PromptBatch:
    """Pads wrapped prompts (see `PromptLayout.wrap`) to the longest."""
    longest = max(len(ids) for ids, _, _ in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    text_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (ids, start, end) in enumerate(prompts):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        text_mask[row, start:end] = True
    return PromptBatch(input_ids, attention_mask, text_mask)


def wrap_batch(layout: PromptLayout, input_ids: Tensor, attention_mask: Tensor, pad_id: int) -> PromptBatch:
    """Wraps a batch as a tokenizer pads it, on either side, into prompts padded on the right."""
    rows = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)]
    batch = collate_prompts([layout.wrap(row) for row in rows], pad_id)
    return PromptBatch(*(tensor.to(input_ids.device) for tensor in batch))


def select_tokens(
    hidden_states: Tensor, batch: PromptBatch, token_rule: TokenRule, reference_norm: float
) -> tuple[Tensor, Tensor]:
    """Applies the token rule.

    `"all"` keeps every token but padding; `"text"` the tokens of the text; `"text_no_sinks"` those of them that are no
    attention sinks (norm over `SINK_FACTOR * reference_norm`).

    A text that holds nothing but sinks (one token, as a rule) keeps its last one, scaled down to the reference norm:
    without a state there is no prediction, and at full size it would drown everything learned.

    Returns:
        the hidden states (`[B, T, D]`) and which of them count (`[B, T]`, bool).
    """
    if token_rule == "all":
        return hidden_states, batch.attention_mask.bool()
    if token_rule == "text":
        return hidden_states, batch.text_mask
    norms = torch.linalg.vector_norm(hidden_states.float(), dim=-1)
    keep = batch.text_mask & (norms <= SINK_FACTOR * reference_norm)
    rows = (~keep.any(dim=1) & batch.text_mask.any(dim=1)).nonzero().flatten()
    if len(rows):
        last = _last_true(batch.text_mask[rows])
        hidden_states = hidden_states.clone()
        scale = (reference_norm / norms[rows, last]).unsqueeze(-1).to(hidden_states.dtype)
        hidden_states[rows, last] = hidden_states[rows, last] * scale
        keep[rows, last] = True
    return hidden_states, keep


def pool_hidden_states(hidden_states: Tensor, keep: Tensor, pooling: Pooling) -> Tensor:
    """One state a text: `[B, T, D]` and the tokens that count `[B, T]` -> `[B, D]`.

    `"mean"`: over the tokens that count. `"last"`: the last of them. `"cls"`: the first token of the prompt, which is
    what encoders like BERT train for this use, whether the token rule keeps it or not.
    """
    if pooling == "cls":
        return hidden_states[:, 0]
    if pooling == "last":
        return hidden_states[torch.arange(len(keep), device=keep.device), _last_true(keep)]
    weights = keep.to(hidden_states.dtype)
    return torch.einsum("btd,bt->bd", hidden_states, weights) / weights.sum(dim=1, keepdim=True)


def _last_true(mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def batches_of(prompts: Sequence[Prompt], batch_tokens: int, pad_id: int) -> Iterator[tuple[list[int], PromptBatch]]:
    """Prompts of like length share a batch: sorted by length, and cut where one would pass `batch_tokens`.

    Yields:
        which prompts a batch holds, and the batch.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row][0]))
    rows: list[int] = []
    for row in order:
        if rows and len(prompts[row][0]) * (len(rows) + 1) > batch_tokens:
            yield rows, collate_prompts([prompts[r] for r in rows], pad_id)
            rows = []
        rows.append(row)
    if rows:
        yield rows, collate_prompts([prompts[r] for r in rows], pad_id)


def check_texts(texts: Sequence[Any]) -> None:
    """Raises ValueError where there are no texts, or one is empty or not a string; names the row."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, not one string: put it into a list")
    if len(texts) == 0:
        raise ValueError("there are no texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {index} is {text!r}, not a string")
        if not text.strip():
            raise ValueError(f"text {index} is empty: leave out texts without content")
