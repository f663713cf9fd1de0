"""The span of text around the token that activates a feature most."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from tokenizers import Encoding

from selfreg.activations.extractor import HiddenStateExtractor

_TOKENS_BEFORE, _TOKENS_AFTER = 10, 5
_MAX_WORD = 20
# Peaks that are cut together: their texts are tokenised in one call, which the tokenizer spreads over threads.
_BATCH, _BATCH_CHARACTERS = 1 << 14, 1 << 21


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a text, cut around one token (the peak).

    Attributes:
        text_id (`int`): index of the text in the texts that the catalogue was built from.
        position (`int`): index of the peak token among the tokens of the prompt.
        activation (`float`): activation of the feature at the peak, never below 0.
        before (`str`): context before the peak.
        peak (`str`): what the peak token stands for in the text, whole characters.
        after (`str`): context after the peak.
    """

    text_id: int
    position: int
    activation: float
    before: str
    peak: str
    after: str

    def marked(self, left: str = "<<", right: str = ">>") -> str:
        """The span as one string, with the peak between `left` and `right`."""
        return f"{self.before}{left}{self.peak}{right}{self.after}"

    def __str__(self) -> str:
        return f"{self.before}{self.peak}{self.after}"


Cut = tuple[str, str, str]
"""What stands before a peak, the peak, and what stands after it."""


def cut_spans(
    extractor: HiddenStateExtractor, texts: Sequence[str], peaks: Sequence[tuple[int, int]]
) -> Iterator[Cut]:
    """Cuts the spans around tokens out of the texts themselves, by offsets, so that they read as they were written.

    Args:
        extractor: whose tokens they are.
        texts: the texts.
        peaks: text and position in its prompt of each, sorted by text.

    Yields:
        The pieces around each peak, in order.
    """
    layout = extractor.layout
    start = 0
    while start < len(peaks):
        # The peaks of the next texts, so many that neither they nor their texts take much memory.
        ids: list[int] = []
        characters = 0
        for text_id in dict.fromkeys(text_id for text_id, _ in peaks[start : start + _BATCH]):
            if ids and characters > _BATCH_CHARACTERS:
                break
            ids.append(text_id)
            characters += len(texts[text_id])
        end = bisect_right(peaks, (ids[-1], 1 << 62), lo=start)
        encoded = extractor.tokenizer([texts[i] for i in ids], return_attention_mask=False, verbose=False)
        # Of the few tokens that are asked for, the encodings tell the offsets faster than as lists of all of them.
        encodings = cast(list[Encoding], encoded.encodings)
        cutters = {}
        for text_id, tokens, encoding in zip(ids, encoded["input_ids"], encodings, strict=True):
            _, first, last = layout.wrap(tokens)
            cutters[text_id] = _Cutter(texts[text_id], encoding, layout.first_token(tokens), last - first, first)
        for text_id, position in peaks[start:end]:
            yield cutters[text_id].cut(position)
        start = end


class _Cutter:
    """Cuts one text.

    Args:
        text: the text.
        encoding: its tokens, with the special ones around them.
        leading: tokens before those that count: special ones, and in a conversation all before the last reply.
        count: tokens that count and are in the prompt.
        start: position of the first of them there.
    """

    def __init__(self, text: str, encoding: Encoding, leading: int, count: int, start: int) -> None:
        self.text, self.start = text, start
        self._encoding, self._leading, self._count = encoding, leading, count
        self._blanks = [match.start() for match in re.finditer(r"\s", text)]

    def cut(self, position: int) -> Cut:
        index = position - self.start
        if not 0 <= index < self._count:
            # A token of the template or a special one, which only token_rule="all" lets through.
            return "", "", self.text[:80]
        begin, end = self._offsets(index)
        while begin < end and self.text[begin].isspace():
            begin += 1
        left = self._word_start(self._offsets(max(0, index - _TOKENS_BEFORE))[0])
        right = self._word_end(self._offsets(min(self._count - 1, index + _TOKENS_AFTER))[1])
        return self.text[left:begin], self.text[begin:end], self.text[end:right]

    def _offsets(self, index: int) -> tuple[int, int]:
        """First and one past the last character of a token; nothing at the beginning for one that stands for none."""
        return self._encoding.token_to_chars(index + self._leading) or (0, 0)

    def _word_start(self, index: int) -> int:
        """Back to where the word begins, unless it is longer than any word."""
        before = bisect_left(self._blanks, index) - 1
        start = self._blanks[before] + 1 if before >= 0 else 0
        return start if index - start < _MAX_WORD or (start == 0 and index <= _MAX_WORD) else index

    def _word_end(self, index: int) -> int:
        after = bisect_left(self._blanks, index)
        end = self._blanks[after] if after < len(self._blanks) else len(self.text)
        return end if end - index <= _MAX_WORD else index
