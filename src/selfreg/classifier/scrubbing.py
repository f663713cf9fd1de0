"""The baseline that keeps the attribute from the classifier by keeping its words out of the texts.

The words are taken out of all texts, for training and for measuring, and the plain classifier reads what is left. It
is strong where the attribute is a few words. Where it is not (style, length, topic, or words that hint at it), there
is little to take out, and what remains still tells it.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from selfreg.activations.prompt import check_texts
from selfreg.features.catalog import FeatureCatalog
from selfreg.features.decisions import check_features
from selfreg.features.keywords import keyword_pattern
from selfreg.features.records import FeatureRecord
from selfreg.features.scoring import WORD, stop_words
from selfreg.features.spans import Span

logger = logging.getLogger(__name__)

EMPTY = "…"
"""What a text becomes of which nothing is left."""

_LONGEST_WORD = 30
# Stop words in any list, and the attribute itself where that is somebody's gender, or who is spoken to.
_PERSONS = {
    *("i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves"),
    *("you", "your", "yours", "yourself", "yourselves", "they", "them", "their", "theirs", "themselves"),
    *("he", "him", "his", "himself", "she", "her", "hers", "herself"),
}


def scrub(texts: Sequence[str], keywords: Sequence[str], *, mask: str = "") -> list[str]:
    """Takes keywords out of texts, or puts a mask in place of them.

    Args:
        texts: the texts.
        keywords: whole words or phrases, in any case; of two that begin alike the longer one counts.
        mask: what stands in place of each run of keywords. By default nothing does, because a mask tells that there
            was a keyword: with the words of one group only, it would tell the group as well as they did. On the
            demo's notes, with those of both genders, it made no difference.

    Returns:
        The texts, as many and in order. One of which no letter or digit is left becomes the mask, or `EMPTY`.

    Raises:
        ValueError: no keywords, a mask that holds one, or a text that is empty.
    """
    check_texts(texts)
    # Of phrases that begin alike, the first in the pattern counts.
    ordered = keywords if isinstance(keywords, str) else sorted(keywords, key=len, reverse=True)
    pattern = keyword_pattern(ordered).pattern
    if mask and re.search(pattern, mask, re.IGNORECASE):
        raise ValueError(f"the mask {mask!r} holds a keyword: choose another")
    run = re.compile(rf"([^\S\n]*)(?:{pattern})(?:\s+(?:{pattern}))*([^\S\n]*)", re.IGNORECASE)

    def replace(match: re.Match[str]) -> str:
        before, after = match.groups()
        if mask:
            return f"{before}{mask}{after}"
        # One space between what is left on both sides, and none at an end of the text or before a full stop.
        return before if before and after else ""

    scrubbed = []
    touched = 0
    for text in texts:
        left, count = run.subn(replace, text)
        touched += count > 0
        scrubbed.append(left if re.search(r"\w", left) else mask or EMPTY)
    if touched:
        logger.info("scrubbing: %d of %d texts hold a keyword", touched, len(texts))
    else:
        logger.warning("scrubbing: none of %d texts holds a keyword, so they stay as they are", len(texts))
    return scrubbed


def scrub_words(catalog: FeatureCatalog, features: Sequence[int], *, max_words: int = 20) -> list[str]:
    """The words through which most of the activation of some features goes, for scrubbing without a list of keywords.

    A feature's peak in each text where it is active is put down to the word there. The catalogue keeps the strongest
    of these texts and a sample of the others, in which each stands for as many as were not kept; so that the sum of a
    word estimates that over all texts. Function words do not count, but for personal pronouns, nor do numbers and
    punctuation; nor, in a language without spaces, anything: name its keywords.

    Args:
        catalog: the features' evidence.
        features: their numbers, such as `unintended.feature_ids`.
        max_words: how many at most.

    Returns:
        The words, lower-cased, the one with most activation first.

    Raises:
        ValueError: no features, one that is not there, `max_words` below 1, or no word at the peaks of any of them.
    """
    if not features:
        raise ValueError("no features given: name at least one")
    check_features(features, len(catalog), "scrub_words")
    if max_words < 1:
        raise ValueError(f"max_words={max_words} must be at least 1")
    sums: defaultdict[str, float] = defaultdict(float)
    for feature in features:
        for span, texts in _weighted_spans(catalog[feature]):
            word = _peak_word(span)
            if word is not None:
                sums[word] += texts * span.activation
    if not sums:
        raise ValueError(
            f"none of the {len(features)} features peaks on a word that means something by itself: name keywords"
        )
    return sorted(sums, key=lambda word: (-sums[word], word))[:max_words]


def _weighted_spans(record: FeatureRecord) -> Iterator[tuple[Span, float]]:
    """The spans that activate a feature, and how many texts each stands for."""
    drawn = [span for part in record.quantile_spans for span in part]
    for span in record.spans:
        yield span, 1.0
    for span in drawn:
        yield span, max((record.num_texts - len(record.spans)) / len(drawn), 1.0)


def _peak_word(span: Span) -> str | None:
    """The word that the peak is, or is a part of; None where it means nothing by itself."""
    text = str(span)
    peak = re.search(r"\w", span.peak)
    if peak is None:
        return None
    place = len(span.before) + peak.start()
    found = next(match for match in WORD.finditer(text) if match.start() <= place < match.end())
    word = re.sub(r"['’]s?$", "", found.group().lower())
    if word in _PERSONS:
        return word
    meaningless = word in stop_words() or len(re.findall(r"[^\W\d_]", word)) < 2 or len(word) > _LONGEST_WORD
    return None if meaningless else word
