"""From what a pass over hidden states gathered to the records of all features."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.features.collect import NUM_MISSES, NUM_QUANTILES, NUM_SILENT, PER_QUANTILE, Evidence, Peaks, Shares
from selfreg.features.directions import nearest_features, promoted_tokens, unembedding_of
from selfreg.features.records import FeatureRecord
from selfreg.features.spans import Cut, Span, cut_spans

_Peak = tuple[int, int, float]
"""Text, position in its prompt, activation."""


def build_records(
    evidence: Evidence, directions_FD: Tensor, extractor: HiddenStateExtractor, texts: Sequence[str]
) -> list[FeatureRecord]:
    """One record a feature, in order.

    Args:
        evidence: finished.
        directions_FD: decoder directions.
        extractor: whose tokens the peaks are.
        texts: the texts that they were found in.
    """
    top, drawn = _peaks(evidence.top), _peaks(evidence.drawn)
    tokens = evidence.top.tokens.tolist()
    chosen: list[tuple[list[_Peak], list[list[_Peak]], list[_Peak], list[_Peak]]] = []
    for feature in range(evidence.num_features):
        if not top[feature]:
            chosen.append(([], [], [], []))
            continue
        quantiles = _quantiles(drawn[feature], {text for text, _, _ in top[feature]})
        silent = evidence.sample.silent(feature)
        of_peaks = tokens[feature][: len(top[feature])]
        misses = evidence.sample.near_misses(silent, of_peaks, NUM_MISSES)
        others = evidence.sample.silent_peaks(silent, feature, NUM_SILENT, {text for text, _ in misses})
        chosen.append((top[feature], quantiles, [(*peak, 0.0) for peak in misses], [(*peak, 0.0) for peak in others]))
    cuts = _cut_all(chosen, extractor, texts)

    def spans(peaks: Sequence[_Peak]) -> list[Span]:
        return [Span(text, position, value, *cuts[text, position]) for text, position, value in peaks]

    alive = [feature for feature, peaks in enumerate(top) if peaks]
    nearest = nearest_features(directions_FD, alive)
    unembedding = unembedding_of(extractor.backbone, extractor.hidden_size, extractor.spec.revision)
    promoted = (
        promoted_tokens(directions_FD, alive, unembedding, extractor.tokenizer) if unembedding is not None else {}
    )
    counts, sums, num_texts = evidence.counts_F.tolist(), evidence.sums_F.tolist(), evidence.texts_F.tolist()
    labels, groups = _shares(evidence.labels), _shares(evidence.groups)
    return [
        FeatureRecord(
            feature=feature,
            density=counts[feature] / evidence.num_tokens,
            mean_activation=sums[feature] / counts[feature] if counts[feature] else 0.0,
            max_activation=strongest[0][2] if strongest else 0.0,
            num_texts=num_texts[feature],
            label_shares=labels[feature] if labels else {},
            group_shares=groups[feature] if groups else {},
            spans=spans(strongest),
            quantile_spans=[spans(part) for part in quantiles],
            near_misses=spans(misses),
            silent_spans=spans(others),
            nearest=nearest.get(feature, []),
            promoted_tokens=promoted.get(feature, []),
        )
        for feature, (strongest, quantiles, misses, others) in enumerate(chosen)
    ]


def _peaks(peaks: Peaks) -> list[list[_Peak]]:
    return [
        [(text, position, value) for text, position, value in zip(*row, strict=True) if text >= 0]
        for row in zip(peaks.texts.tolist(), peaks.positions.tolist(), peaks.values.tolist(), strict=True)
    ]


def _quantiles(drawn: list[_Peak], shown: set[int]) -> list[list[_Peak]]:
    """Some peaks of each quarter of the drawn ones, the weakest quarter first, without the texts in `shown`."""
    ordered = sorted(drawn, key=lambda peak: (peak[2], peak[0]))
    size = len(ordered)
    borders = [size * part // NUM_QUANTILES for part in range(NUM_QUANTILES + 1)]
    parts = []
    for start, end in pairwise(borders):
        left = [peak for peak in ordered[start:end] if peak[0] not in shown]
        count = min(len(left), PER_QUANTILE)
        # Spread evenly over what is left of the quarter.
        parts.append([left[(2 * i + 1) * len(left) // (2 * count)] for i in range(count)])
    return parts


def _cut_all(
    chosen: Sequence[tuple[list[_Peak], list[list[_Peak]], list[_Peak], list[_Peak]]],
    extractor: HiddenStateExtractor,
    texts: Sequence[str],
) -> dict[tuple[int, int], Cut]:
    """The pieces around every peak; many features peak on the same token, which is cut once."""
    wanted: set[tuple[int, int]] = set()
    for strongest, quantiles, misses, others in chosen:
        for part in (strongest, *quantiles, misses, others):
            wanted.update((text, position) for text, position, _ in part)
    peaks = sorted(wanted)
    return dict(zip(peaks, cut_spans(extractor, texts, peaks), strict=True))


def _shares(shares: Shares | None) -> list[dict[str, float]] | None:
    if shares is None:
        return None
    return [dict(zip(shares.names, row, strict=True)) for row in shares.table().tolist()]
