"""Which features peak on given words."""

import re
from collections.abc import Sequence

from selfreg.features.spans import Span


def keyword_pattern(keywords: Sequence[str]) -> re.Pattern[str]:
    """Whole words or phrases, any case.

    Raises:
        ValueError: there are none.
    """
    if isinstance(keywords, str):
        raise ValueError(f"keywords must be a list of words, not one string: [{keywords!r}]")
    words = [keyword.strip() for keyword in keywords if keyword.strip()]
    if not words:
        raise ValueError("no keywords given: name at least one word")
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)


def keyword_near_peak(span: Span, pattern: re.Pattern[str]) -> str | None:
    """The keyword at the word of the peak or one of the two words before it; None where there is none."""
    text = str(span)
    start, end = len(span.before), len(span.before) + len(span.peak)
    # The word that the peak is a piece of.
    while start > 0 and text[start - 1].isalnum():
        start -= 1
    while end < len(text) and text[end].isalnum():
        end += 1
    words_before = [match.start() for match in re.finditer(r"\w+", text[:start])]
    begin = words_before[-2] if len(words_before) >= 2 else 0
    match = pattern.search(text[begin:end])
    return match.group() if match else None
