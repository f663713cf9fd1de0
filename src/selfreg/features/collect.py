"""One streaming pass over hidden states that gathers, for every feature, the evidence of what it reacts to.

Shapes: N tokens and T texts of a chunk, F features, G labels or groups, K peaks kept a feature, S sampled texts,
P pairs of a text and a feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfreg.activations.store import StoreShard
from selfreg.features.activations import EncodedChunk, encoded_chunks
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.processes import gather_all, processes

NUM_QUANTILES = 4
PER_QUANTILE = 5
NUM_MISSES, NUM_SILENT = 8, 5

_SAMPLED_TEXTS, _SAMPLED_TOKENS = 4096, 1 << 20
_OCCURRENCES = 256
_MOST_NAMES = 200
# Candidates that wait before they are sorted into the lists: sorting few at a time costs more than it saves.
_WAITING = 1 << 17
# Sums are kept in whole parts of this size, so that they are the same in whatever order they are taken. To 6e-8, and
# up to 5e11.
_PART = 2.0**-24


class Peaks:
    """The best K (text, position) of every feature by some rank, in order of rank; the earlier among equals.

    Attributes:
        ranks (`[F, K]`, float64): -inf where there is none.
        texts, positions, tokens (`[F, K]`, int64), values (`[F, K]`).
    """

    def __init__(self, num_features: int, count: int) -> None:
        self.ranks = torch.full((num_features, count), -torch.inf, dtype=torch.float64)
        self.texts = torch.full((num_features, count), -1, dtype=torch.long)
        self.positions = torch.zeros(num_features, count, dtype=torch.long)
        self.tokens = torch.zeros(num_features, count, dtype=torch.long)
        self.values = torch.zeros(num_features, count)
        self._waiting: list[tuple[Tensor, ...]] = []
        self._num_waiting = 0

    def offer(self, features: Tensor, ranks: Tensor, *rest: Tensor) -> None:
        """Candidates `[P]`, in the order of their texts: feature, rank, text, position, token, value."""
        # Most can't enter a list that is already full of better ones.
        keep = ranks > self.ranks[features, -1]
        kept = tuple(tensor[keep] for tensor in (features, ranks.double(), *rest))
        self._waiting.append(kept)
        self._num_waiting += len(kept[0])
        if self._num_waiting > _WAITING:
            self.settle()

    def merge(self, others: Sequence["Peaks"]) -> None:
        """Takes in what others found in other texts. Nothing may wait any more."""
        lists = [self, *others]
        texts = torch.cat([peaks.texts for peaks in lists], dim=1)
        # Among equals the earlier text first, as one pass over all texts has it.
        by_text = torch.argsort(texts, dim=1, stable=True)
        ranks = torch.cat([peaks.ranks for peaks in lists], dim=1).gather(1, by_text)
        order = torch.argsort(ranks, dim=1, descending=True, stable=True)[:, : self.ranks.shape[1]]
        order = by_text.gather(1, order)
        for name in ("ranks", "texts", "positions", "tokens", "values"):
            columns = torch.cat([getattr(peaks, name) for peaks in lists], dim=1)
            setattr(self, name, columns.gather(1, order))

    def settle(self) -> None:
        """Sorts what waits into the lists."""
        if not self._num_waiting:
            return
        new = [torch.cat(tensors) for tensors in zip(*self._waiting, strict=True)]
        self._waiting, self._num_waiting = [], 0
        held = (self.ranks, self.texts, self.positions, self.tokens, self.values)
        touched = new[0].unique()
        full = self.texts[touched] >= 0
        features = torch.cat([touched.unsqueeze(1).expand_as(full)[full], new[0]])
        columns = [torch.cat([old[touched][full], more]) for old, more in zip(held, new[1:], strict=True)]
        # Stable, so that among equals the earlier text comes first: held before new, and new in the order of texts.
        order = torch.argsort(columns[0], descending=True, stable=True)
        order = order[torch.argsort(features[order], stable=True)]
        features = features[order]
        place = torch.arange(len(features)) - torch.searchsorted(features, features)
        best = place < self.ranks.shape[1]
        for old, column in zip(held, columns, strict=True):
            old[features[best], place[best]] = column[order][best]


class TextSample:
    """The tokens of some texts, drawn at random, and which features are active in them: where features are silent.

    Args:
        priorities: `[num_texts]`, a random order of the texts.
        count: texts to keep, those with the lowest priorities.
        num_features: F.
    """

    def __init__(self, priorities: NDArray[np.int64], count: int, num_features: int) -> None:
        self._priorities = priorities
        self._count = count
        self._active: list[NDArray[np.uint8]] = []
        self._texts: list[NDArray[np.int64]] = []
        self._tokens: list[NDArray[np.int64]] = []
        self._positions: list[NDArray[np.int64]] = []
        self._firsts: list[int] = []
        self._num_features = num_features

    def add(self, chunk: EncodedChunk, shard: StoreShard, active_TF: Tensor, counts: Tensor) -> None:
        """Keeps the sampled texts of a chunk; `counts [T]` is 0 for texts that don't count."""
        priorities = self._priorities[chunk.first_text : chunk.first_text + chunk.num_texts]
        chosen = (priorities < self._count) & (counts.numpy() > 0)
        if not chosen.any():
            return
        self._firsts.append(chunk.first_text)
        self._active.append(np.packbits(active_TF.numpy()[chosen], axis=1))
        number = np.full(len(chosen), -1)
        number[chosen] = np.arange(chosen.sum())
        texts = number[chunk.texts_N.numpy()]
        rows = texts >= 0
        self._texts.append(np.stack([texts[rows], chunk.texts_N.numpy()[rows] + chunk.first_text]))
        self._tokens.append(shard.token_ids[chunk.rows].numpy()[rows].astype(np.int64))
        self._positions.append(shard.positions[chunk.rows].numpy()[rows].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        # Other processes have the priorities.
        return {name: value for name, value in self.__dict__.items() if name != "_priorities"}

    def merge(self, others: Sequence["TextSample"]) -> None:
        """Takes in what others sampled of other texts, before `finish`."""
        for other in others:
            self._firsts += other._firsts
            self._active += other._active
            self._texts += other._texts
            self._tokens += other._tokens
            self._positions += other._positions
        # As one pass over all texts meets them.
        order = np.argsort(self._firsts, kind="stable")
        for pieces in (self._firsts, self._active, self._texts, self._tokens, self._positions):
            pieces[:] = [pieces[place] for place in order]

    def finish(self) -> None:
        """Numbers the texts, and sorts the tokens, so that those of a kind are found at once."""
        empty = np.zeros(0, dtype=np.int64)
        self._num_texts = 0
        for texts, active in zip(self._texts, self._active, strict=True):
            texts[0] += self._num_texts
            self._num_texts += len(active)
        packed = np.concatenate(self._active) if self._active else np.zeros((0, 0), dtype=np.uint8)
        # Read a feature at a time from here on.
        self.active = np.ascontiguousarray(packed.T)
        self.numbers, self.text_ids = np.concatenate([*self._texts, np.zeros((2, 0), dtype=np.int64)], axis=1)
        self.tokens = np.concatenate([*self._tokens, empty])
        self.positions = np.concatenate([*self._positions, empty])
        self.first_rows = np.searchsorted(self.numbers, np.arange(self._num_texts + 1))
        # By token, and of each token the first place in every text.
        order = np.lexsort((self.numbers, self.tokens))
        keys = self.tokens[order] * (self._num_texts + 1) + self.numbers[order]
        self.order = order[np.append(True, keys[1:] != keys[:-1])[: len(order)]]
        kinds, starts = np.unique(self.tokens[self.order], return_index=True)
        ends = np.minimum(np.append(starts[1:], len(self.order)), starts + _OCCURRENCES)
        self.ranges = {
            token: (start, end)
            for token, start, end in zip(kinds.tolist(), starts.tolist(), ends[: len(kinds)].tolist(), strict=True)
        }

    def silent(self, feature: int) -> NDArray[np.bool_]:
        """In which of the sampled texts the feature is silent, `[S]`."""
        if not self._num_texts:
            return np.zeros(0, dtype=bool)
        return (self.active[feature // 8] >> (7 - feature % 8)) & 1 == 0

    def near_misses(self, silent: NDArray[np.bool_], tokens: Sequence[int], count: int) -> list[tuple[int, int]]:
        """Texts and positions of some of `tokens` where the feature is silent; no text twice, tokens in turn."""
        found: list[list[int]] = []
        for token in dict.fromkeys(tokens):
            start, end = self.ranges.get(token, (0, 0))
            rows = self.order[start:end]
            rows = rows[silent[self.numbers[rows]]]
            if len(rows):
                found.append(rows.tolist())
        misses: dict[int, tuple[int, int]] = {}
        turns = [iter(rows_of_token) for rows_of_token in found]
        while turns and len(misses) < count:
            for rows_left in list(turns):
                # The next text of this token that no other has taken.
                row = next((row for row in rows_left if int(self.text_ids[row]) not in misses), None)
                if row is None:
                    turns.remove(rows_left)
                elif len(misses) < count:
                    text = int(self.text_ids[row])
                    misses[text] = (text, int(self.positions[row]))
        return list(misses.values())

    def silent_peaks(
        self, silent: NDArray[np.bool_], feature: int, count: int, taken: set[int]
    ) -> list[tuple[int, int]]:
        """A token of each of some texts where the feature is silent, both drawn; none of the texts is in `taken`."""
        candidates = np.nonzero(silent)[0]
        if not len(candidates):
            return []
        # Multiples of large primes stand for chance: the same in every run, others for every feature.
        draws = (feature * 1_000_003 + np.arange(4 * count) * 15_485_863) % len(candidates)
        peaks: list[tuple[int, int]] = []
        for number in dict.fromkeys(candidates[draws].tolist()):
            first, end = int(self.first_rows[number]), int(self.first_rows[number + 1])
            text = int(self.text_ids[first])
            if text not in taken and len(peaks) < count:
                row = first + (feature * 7_919 + number * 104_729) % (end - first)
                peaks.append((text, int(self.positions[row])))
        return peaks


@dataclass
class Shares:
    """In what share of the texts of each label (or group) a feature is active.

    Attributes:
        names (`list[str]`): G.
        codes (`[num_texts]`, int64): of each text; -1 where it is not known.
        active_GF, totals_G: counts of texts.
    """

    names: list[str]
    codes: Tensor
    active_GF: Tensor
    totals_G: Tensor

    @classmethod
    def of(cls, kind: str, values: Sequence[Any] | None, num_features: int) -> "Shares | None":
        if values is None:
            return None
        names = sorted({str(value) for value in values if value is not None})
        if len(names) > _MOST_NAMES:
            raise ValueError(
                f"there are {len(names):,} different {kind}, such as {names[0]!r}: shares are kept for up to "
                f"{_MOST_NAMES}; name a column with fewer"
            )
        index = {name: i for i, name in enumerate(names)}
        codes = torch.tensor([-1 if value is None else index[str(value)] for value in values])
        # float64: float32 counts no further than 16 million.
        counts = torch.zeros(len(names), num_features, dtype=torch.float64)
        return cls(names, codes, counts, torch.zeros(len(names), dtype=torch.float64))

    def update(self, first_text: int, active_TF: Tensor, counted_T: Tensor) -> None:
        codes = self.codes[first_text : first_text + len(active_TF)]
        member_GT = (codes.unsqueeze(0) == torch.arange(len(self.names)).unsqueeze(1)) & counted_T
        self.active_GF += member_GT.float() @ active_TF.float()
        self.totals_G += member_GT.sum(dim=1)

    def __getstate__(self) -> dict[str, Any]:
        # Other processes have the codes.
        return {name: value for name, value in self.__dict__.items() if name != "codes"}

    def merge(self, others: Sequence["Shares"]) -> None:
        """Takes in what others counted in other texts."""
        for other in others:
            self.active_GF += other.active_GF
            self.totals_G += other.totals_G

    def table(self) -> NDArray[np.float64]:
        """`[F, G]`, 0 where a label has no text that counts."""
        shares = self.active_GF / self.totals_G.clamp_min(1).unsqueeze(1)
        return shares.T.contiguous().numpy()


class Evidence:
    """What one pass gathers; `update` shard by shard, then `finish`.

    Args:
        num_features: F.
        is_first: `[num_texts]`, whether a text is the first of its kind: the others don't count as texts.
        top_k: strongest texts that are kept for each feature.
        mean_tokens: of a text, about; decides how many are sampled for silence.
        labels, groups: of each text.
    """

    def __init__(
        self,
        num_features: int,
        is_first: Tensor,
        *,
        top_k: int,
        mean_tokens: float,
        labels: Sequence[Any] | None = None,
        groups: Sequence[Any] | None = None,
    ) -> None:
        self.num_features, self.is_first = num_features, is_first
        self.counts_F = torch.zeros(num_features, dtype=torch.long)
        self._parts_F = torch.zeros(num_features, dtype=torch.long)
        self.texts_F = torch.zeros(num_features, dtype=torch.long)
        self.num_tokens = 0
        self.top = Peaks(num_features, top_k)
        # Drawn from all texts that activate a feature; enough that something is left without the strongest.
        self.drawn = Peaks(num_features, top_k + NUM_QUANTILES * PER_QUANTILE)
        self.labels, self.groups = Shares.of("labels", labels, num_features), Shares.of("groups", groups, num_features)
        priorities = np.random.default_rng(0).permutation(len(is_first))
        self._priorities = torch.from_numpy(priorities)
        sampled = int(min(_SAMPLED_TEXTS, max(1, _SAMPLED_TOKENS / mean_tokens)))
        self.sample = TextSample(priorities, sampled, num_features)

    def update(self, sae: SAEForFeatureExtraction, shard: StoreShard) -> None:
        """Encodes a shard and takes from it what enters the lists."""
        for chunk in encoded_chunks(sae, shard):
            self._update(chunk, shard)

    def _update(self, chunk: EncodedChunk, shard: StoreShard) -> None:
        values, keys = chunk.values_NK.flatten(), chunk.keys.flatten()
        active = values > 0
        flat = chunk.indices_NK.flatten()[active]
        self.counts_F += torch.bincount(flat, minlength=self.num_features)
        sums = torch.bincount(flat, values[active].double(), minlength=self.num_features)
        self._parts_F += (sums / _PART).round().long()
        self.num_tokens += len(chunk.texts_N)
        maxima_TF = chunk.maxima()
        counted_T = self.is_first[chunk.first_text : chunk.first_text + chunk.num_texts]
        # The earliest token among those that reach the maximum.
        at_peak = (values == maxima_TF.view(-1)[keys]).nonzero().squeeze(1)
        rows = torch.full((maxima_TF.numel(),), len(chunk.texts_N), dtype=torch.long)
        rows.scatter_reduce_(0, keys[at_peak], at_peak // chunk.values_NK.shape[1], "amin")
        maxima_TF[~counted_T] = 0
        active_TF = maxima_TF > 0
        self.texts_F += active_TF.sum(dim=0)
        tokens_T = torch.bincount(chunk.texts_N, minlength=chunk.num_texts)
        self.sample.add(chunk, shard, active_TF, tokens_T * counted_T)
        for shares in (self.labels, self.groups):
            if shares is not None:
                shares.update(chunk.first_text, active_TF, counted_T)
        pairs = active_TF.view(-1).nonzero().squeeze(1)
        features = pairs % self.num_features
        texts = pairs // self.num_features + chunk.first_text
        maxima = maxima_TF.view(-1)[pairs]
        for peaks, ranks in ((self.top, maxima), (self.drawn, -self._priorities[texts])):
            keep = ranks > peaks.ranks[features, -1]
            row = rows[pairs[keep]] + chunk.rows.start
            positions, tokens = shard.positions[row].long(), shard.token_ids[row].long()
            peaks.offer(features[keep], ranks[keep], texts[keep], positions, tokens, maxima[keep])

    @property
    def sums_F(self) -> Tensor:
        """Of the activations of each feature, `[F]`, float64."""
        return self._parts_F.double() * _PART

    def finish(self) -> None:
        """After the last shard, in every process: all then have what one pass over all texts would have found."""
        self.top.settle()
        self.drawn.settle()
        own = processes().process_index
        gathered: list[Evidence] = gather_all(self)
        others = [evidence for number, evidence in enumerate(gathered) if number != own]
        if others:
            self._merge(others)
        self.sample.finish()

    def __getstate__(self) -> dict[str, Any]:
        # Other processes have what comes from the texts alone.
        return {name: value for name, value in self.__dict__.items() if name not in ("is_first", "_priorities")}

    def _merge(self, others: Sequence["Evidence"]) -> None:
        for other in others:
            self.counts_F += other.counts_F
            self._parts_F += other._parts_F
            self.texts_F += other.texts_F
            self.num_tokens += other.num_tokens
        self.top.merge([other.top for other in others])
        self.drawn.merge([other.drawn for other in others])
        self.sample.merge([other.sample for other in others])
        for name in ("labels", "groups"):
            shares: Shares | None = getattr(self, name)
            if shares is not None:
                shares.merge([getattr(other, name) for other in others])
