"""The span of text around the token that activates a feature most."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from selfreg.activations.extractor import HiddenStateExtractor

_TOKENS_BEFORE, _TOKENS_AFTER = 10, 5
_MAX_WORD = 20
# Texts whose offsets are in memory at a time.
_BATCH = 512


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
        # The peaks of the next texts, a batch of texts at a time.
        ids = sorted({text_id for text_id, _ in peaks[start : start + _BATCH]})
        end = bisect_right(peaks, (ids[-1], 1 << 62), lo=start)
        encoded = extractor.tokenizer([texts[i] for i in ids], return_offsets_mapping=True, verbose=False)
        cutters = {}
        for text_id, tokens, offsets in zip(ids, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            _, first, last = layout.wrap(tokens)
            cutters[text_id] = _Cutter(texts[text_id], offsets[layout.num_leading :][: last - first], first)
        for text_id, position in peaks[start:end]:
            yield cutters[text_id].cut(position)
        start = end


class _Cutter:
    """Cuts one text.

    Args:
        text: the text.
        offsets: first and one past the last character of each of its tokens.
        start: position of its first token in the prompt.
    """

    def __init__(self, text: str, offsets: Sequence[tuple[int, int]], start: int) -> None:
        self.text, self.offsets, self.start = text, offsets, start
        self._blanks = [match.start() for match in re.finditer(r"\s", text)]

    def cut(self, position: int) -> Cut:
        index = position - self.start
        if not 0 <= index < len(self.offsets):
            # A token of the template or a special one, which only token_rule="all" lets through.
            return "", "", self.text[:80]
        begin, end = self.offsets[index]
        while begin < end and self.text[begin].isspace():
            begin += 1
        left = self._word_start(self.offsets[max(0, index - _TOKENS_BEFORE)][0])
        right = self._word_end(self.offsets[min(len(self.offsets) - 1, index + _TOKENS_AFTER)][1])
        return self.text[left:begin], self.text[begin:end], self.text[end:right]

    def _word_start(self, index: int) -> int:
        """Back to where the word begins, unless it is longer than any word."""
        before = bisect_left(self._blanks, index) - 1
        start = self._blanks[before] + 1 if before >= 0 else 0
        return start if index - start < _MAX_WORD or (start == 0 and index <= _MAX_WORD) else index

    def _word_end(self, index: int) -> int:
        after = bisect_left(self._blanks, index)
        end = self._blanks[after] if after < len(self._blanks) else len(self.text)
        return end if end - index <= _MAX_WORD else index
