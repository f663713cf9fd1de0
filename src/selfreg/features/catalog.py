"""FeatureCatalog: what each feature of an SAE reacts to, with evidence."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from selfreg.activations.extractor import HiddenStateExtractor, check_texts
from selfreg.activations.spec import HiddenStateSpec
from selfreg.activations.store import ActivationStore, StoreShard
from selfreg.features.activations import encode_shard, text_maxima
from selfreg.features.chat import ChatModel
from selfreg.features.selection import UnintendedFeatures
from selfreg.features.spans import Span
from selfreg.sae.fingerprint import sae_fingerprint
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.files import atomic_path, fingerprint_json, fingerprint_strings, read_json, write_json
from selfreg.utils.progress import progress

TABLE_NAME = "features.parquet"
CONFIG_NAME = "catalog.json"
FORMAT_VERSION = 1

_TOKENS_BEFORE, _TOKENS_AFTER = 10, 5
_MAX_WORD = 20


@dataclass(frozen=True)
class FeatureRecord:
    """What is known of one feature.

    Attributes:
        feature (`int`): its number in the SAE.
        density (`float`): share of the tokens on which it is active.
        mean_activation (`float`): mean activation where it is active.
        max_activation (`float`): largest activation.
        spans (`list[Span]`): the texts that activate it most, strongest first, no text twice.
        explanation (`str`, *optional*): a phrase; None where nothing was asked, or the explainer could not tell.
        explanation_verdict (`str`, *optional*): does the phrase describe the spans?
        verdict (`str`, *optional*): is the feature a legitimate reason for a label?
        verdict_probabilities (`dict[str, float]`): of each answer.
        decided_by (`str`, *optional*): who gave the verdict.
    """

    feature: int
    density: float = 0.0
    mean_activation: float = 0.0
    max_activation: float = 0.0
    spans: list[Span] = field(default_factory=list)
    explanation: str | None = None
    explanation_verdict: str | None = None
    verdict: str | None = None
    verdict_probabilities: dict[str, float] = field(default_factory=dict)
    decided_by: str | None = None

    @property
    def explained(self) -> bool:
        return self.explanation is not None and self.explanation_verdict in ("Yes", "Probably")


class FeatureCatalog:
    """The records of all features of an SAE, built from a set of texts.

    Args:
        records: one a feature, in order.
        spec: the hidden states that the SAE was trained on.
        info: what the catalogue was made from.
        sae: the SAE itself, where it is at hand; it is not saved with the catalogue.
    """

    def __init__(
        self,
        records: list[FeatureRecord],
        spec: HiddenStateSpec,
        info: dict[str, Any],
        sae: SAEForFeatureExtraction | None = None,
    ) -> None:
        self.records = records
        self.spec = spec
        self.info = info
        self.sae = sae

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, feature: int) -> FeatureRecord:
        return self.records[feature]

    def __iter__(self) -> Iterator[FeatureRecord]:
        return iter(self.records)

    @classmethod
    def build(
        cls,
        sae: SAEForFeatureExtraction,
        extractor: HiddenStateExtractor,
        texts: Sequence[str],
        *,
        top_k: int = 10,
        store: ActivationStore | None = None,
    ) -> "FeatureCatalog":
        """One streaming pass over texts; never more than features × top_k peaks are held.

        Args:
            sae: the SAE.
            extractor: of the backbone and layer that the SAE was trained on.
            texts: the texts; the same text counts once.
            top_k: texts that are kept for each feature.
            store: the hidden states of these very texts, if they are on disk already.

        Raises:
            ValueError: the SAE and the extractor do not fit, or the store is of other texts or states.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        texts = list(texts)
        check_texts(texts)
        spec = sae.config.hidden_state_spec()
        if spec is not None:
            spec.check_features_fit(extractor.spec, "the SAE", "the extractor")
        fingerprint = fingerprint_strings(texts)
        if store is not None:
            if store.text_fingerprint != fingerprint:
                raise ValueError(f"the store {store.path} was made from other texts: pass its own texts, or no store")
            # The spans are cut by the extractor, so that the template and the length count too.
            store.spec.check_same(extractor.spec, f"the store {store.path}", "the extractor")
        first_of: dict[str, int] = {}
        is_first = torch.tensor([first_of.setdefault(text, i) == i for i, text in enumerate(texts)])
        statistics = _Statistics(sae.config.num_features, top_k)
        shards = store.shards() if store is not None else extractor.iterate(texts)
        with progress("catalogue", len(texts), "texts") as advance:
            for shard in shards:
                statistics.update(sae, shard, is_first)
                advance(shard.end_text - shard.first_text)
        records = statistics.records(_SpanCutter(extractor, texts))
        info = {
            "text_fingerprint": fingerprint,
            "num_texts": len(texts),
            "num_tokens": statistics.num_tokens,
            "top_k": top_k,
            "sae_fingerprint": sae_fingerprint(sae),
        }
        return cls(records, extractor.spec, info, sae)

    def check_sae(self, sae: SAEForFeatureExtraction) -> None:
        """Raises ValueError where the catalogue is of another SAE."""
        if self.info["sae_fingerprint"] != sae_fingerprint(sae):
            raise ValueError("the catalogue was built from another SAE: build it again with this one")

    def explain(
        self,
        chat: ChatModel,
        *,
        features: Sequence[int] | None = None,
        journal: str | os.PathLike[str] | None = None,
    ) -> None:
        """Asks a chat model for a phrase for each feature that has spans, and whether the phrase describes them.

        Args:
            chat: the explainer.
            features: which features; all that have spans if None.
            journal: a file that every answer is appended to at once, so that a later call asks only what is missing.
        """
        from selfreg.features.answers import explain_catalog

        explain_catalog(self, chat, features, journal)

    def judge(
        self,
        chat: ChatModel,
        rubric: str,
        *,
        features: Sequence[int] | None = None,
        journal: str | os.PathLike[str] | None = None,
    ) -> None:
        """Asks a chat model, for each explained feature, whether it is a legitimate reason for a label.

        Args:
            chat: the judge.
            rubric: what is a legitimate reason: a text, or the path of a file.
            features: which features; all that are explained if None.
            journal: as for `explain`.
        """
        from selfreg.features.answers import judge_catalog

        judge_catalog(self, chat, rubric, features, journal)

    def unintended(
        self, sae: SAEForFeatureExtraction | None = None, *, max_features: int | None = None
    ) -> UnintendedFeatures:
        """The features that are explained and whose verdict is neither Yes nor Probably.

        Args:
            sae: the SAE of this catalogue, which holds the directions; not needed in the session that built it.
            max_features: how many at most, the least legitimate first.

        Raises:
            ValueError: nothing has been judged yet, or the SAE is another one, or there is none.
        """
        sae = sae or self.sae
        if sae is None:
            raise ValueError("a catalogue read from disk holds no SAE: pass its own, catalog.unintended(sae)")
        self.check_sae(sae)
        judged = [record for record in self.records if record.explained and record.verdict is not None]
        if not judged:
            raise ValueError("no feature has a verdict yet: call explain and judge first")
        chosen = [record for record in judged if record.verdict not in ("Yes", "Probably")]
        chosen.sort(key=lambda record: (-record.verdict_probabilities.get("No", 0.0), record.feature))
        reasons = [
            f"judged {record.verdict} by {record.decided_by}: {record.explanation}" for record in chosen[:max_features]
        ]
        return UnintendedFeatures.from_ids(sae, [record.feature for record in chosen[:max_features]], reasons=reasons)

    def update(self, feature: int, **changes: Any) -> None:
        """Replaces fields of one record."""
        self.records[feature] = replace(self.records[feature], **changes)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `features.parquet`, one row a feature, and `catalog.json` into a folder; each whole or not at all."""
        rows = [asdict(record) for record in self.records]
        for row in rows:
            row["verdict_probabilities"] = list(row["verdict_probabilities"].items())
        folder = Path(save_directory)
        config = {"format_version": FORMAT_VERSION, "spec": self.spec.to_dict(), **self.info}
        # The table says what it belongs to, so that one of another catalogue beside an old catalog.json is found out.
        schema = _SCHEMA.with_metadata({_OWNER: fingerprint_json(config)})
        with atomic_path(folder / TABLE_NAME) as path:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        write_json(folder / CONFIG_NAME, config)

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike[str]) -> "FeatureCatalog":
        """Reads a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: it is no catalogue.
            ValueError: it is not whole, or of a newer selfreg.
        """
        folder = Path(save_directory)
        for name in (CONFIG_NAME, TABLE_NAME):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no {name}: it is not a feature catalogue")
        info = read_json(folder / CONFIG_NAME)
        table = pq.read_table(folder / TABLE_NAME)
        if (table.schema.metadata or {}).get(_OWNER, b"").decode() != fingerprint_json(info):
            raise ValueError(
                f"{TABLE_NAME} and {CONFIG_NAME} in {folder} are of two catalogues: saving was cut short, save again"
            )
        if info.pop("format_version") > FORMAT_VERSION:
            raise ValueError(f"{folder} is a catalogue of a newer selfreg: upgrade selfreg")
        spec = HiddenStateSpec.from_dict(info.pop("spec"))
        records = []
        for row in table.to_pylist():
            row["spans"] = [Span(**span) for span in row["spans"]]
            row["verdict_probabilities"] = dict(row["verdict_probabilities"])
            records.append(FeatureRecord(**row))
        return cls(records, spec, info)


_OWNER = b"selfreg.catalog"

_SPAN = pa.struct(
    [
        ("text_id", pa.int64()),
        ("position", pa.int64()),
        ("activation", pa.float64()),
        ("before", pa.string()),
        ("peak", pa.string()),
        ("after", pa.string()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("feature", pa.int64()),
        ("density", pa.float64()),
        ("mean_activation", pa.float64()),
        ("max_activation", pa.float64()),
        ("spans", pa.list_(_SPAN)),
        ("explanation", pa.string()),
        ("explanation_verdict", pa.string()),
        ("verdict", pa.string()),
        ("verdict_probabilities", pa.map_(pa.string(), pa.float64())),
        ("decided_by", pa.string()),
    ]
)


class _Statistics:
    """Density, mean and the top texts of every feature, gathered shard by shard.

    Shapes: F features, K texts kept a feature.
    """

    def __init__(self, num_features: int, top_k: int) -> None:
        self.num_features, self.top_k = num_features, top_k
        self.counts_F = torch.zeros(num_features, dtype=torch.long)
        self.sums_F = torch.zeros(num_features, dtype=torch.float64)
        self.values_FK = torch.zeros(num_features, top_k)
        self.texts_FK = torch.full((num_features, top_k), -1, dtype=torch.long)
        self.positions_FK = torch.zeros(num_features, top_k, dtype=torch.long)
        self.num_tokens = 0

    def update(self, sae: SAEForFeatureExtraction, shard: StoreShard, is_first: Tensor) -> None:
        values, indices = encode_shard(sae, shard)
        flat, features = values[values > 0], indices[values > 0]
        self.counts_F += torch.bincount(features, minlength=self.num_features)
        self.sums_F.index_add_(0, features, flat.double())
        self.num_tokens += len(values)
        texts, features, maxima, rows = text_maxima(shard, values, indices, self.num_features)
        # Most pairs can't enter a list that is already full of stronger ones.
        keep = is_first[texts] & (maxima > self.values_FK[features, -1])
        self._merge(features[keep], maxima[keep], texts[keep], shard.positions.long()[rows[keep]])

    def _merge(self, features: Tensor, values: Tensor, texts: Tensor, positions: Tensor) -> None:
        touched = features.unique()
        held = self.texts_FK[touched] >= 0
        old_features = touched.unsqueeze(1).expand_as(held)[held]
        features = torch.cat([old_features, features])
        values = torch.cat([self.values_FK[touched][held], values])
        texts = torch.cat([self.texts_FK[touched][held], texts])
        positions = torch.cat([self.positions_FK[touched][held], positions])
        # Stable sorts from the last key to the first: text, then strength, then feature.
        order = torch.argsort(texts, stable=True)
        order = order[torch.argsort(values[order], descending=True, stable=True)]
        order = order[torch.argsort(features[order], stable=True)]
        features = features[order]
        starts = torch.searchsorted(features, features)
        rank = torch.arange(len(features)) - starts
        best = rank < self.top_k
        rows, columns, chosen = features[best], rank[best], order[best]
        self.values_FK[rows, columns] = values[chosen]
        self.texts_FK[rows, columns] = texts[chosen]
        self.positions_FK[rows, columns] = positions[chosen]

    def records(self, cutter: "_SpanCutter") -> list[FeatureRecord]:
        records = []
        counts, sums = self.counts_F.tolist(), self.sums_F.tolist()
        values_FK, texts_FK, positions_FK = self.values_FK.tolist(), self.texts_FK.tolist(), self.positions_FK.tolist()
        for feature in range(self.num_features):
            peaks = zip(texts_FK[feature], positions_FK[feature], values_FK[feature], strict=True)
            spans = [cutter.cut(text, position, value) for text, position, value in peaks if text >= 0]
            records.append(
                FeatureRecord(
                    feature=feature,
                    density=counts[feature] / self.num_tokens,
                    mean_activation=sums[feature] / counts[feature] if counts[feature] else 0.0,
                    max_activation=spans[0].activation if spans else 0.0,
                    spans=spans,
                )
            )
        return records


class _SpanCutter:
    """Cuts the span around a token out of the text itself, by offsets, so that it reads as it was written."""

    def __init__(self, extractor: HiddenStateExtractor, texts: Sequence[str]) -> None:
        self.extractor, self.texts = extractor, texts
        self._offsets: dict[int, tuple[list[tuple[int, int]], int]] = {}

    def cut(self, text_id: int, position: int, activation: float) -> Span:
        text = self.texts[text_id]
        offsets, start = self._text_offsets(text_id)
        index = position - start
        if not 0 <= index < len(offsets):
            # A token of the template or a special one, which only token_rule="all" lets through.
            return Span(text_id, position, activation, "", "", text[:80])
        begin, end = offsets[index]
        while begin < end and text[begin].isspace():
            begin += 1
        left = _word_start(text, offsets[max(0, index - _TOKENS_BEFORE)][0])
        right = _word_end(text, offsets[min(len(offsets) - 1, index + _TOKENS_AFTER)][1])
        return Span(text_id, position, activation, text[left:begin], text[begin:end], text[end:right])

    def _text_offsets(self, text_id: int) -> tuple[list[tuple[int, int]], int]:
        if text_id not in self._offsets:
            layout = self.extractor.layout
            encoded = self.extractor.tokenizer(self.texts[text_id], return_offsets_mapping=True, verbose=False)
            _, start, end = layout.wrap(encoded["input_ids"])
            offsets = encoded["offset_mapping"][layout.num_leading :][: end - start]
            self._offsets[text_id] = ([tuple(pair) for pair in offsets], start)
        return self._offsets[text_id]


def _word_start(text: str, index: int) -> int:
    for begin in range(index, max(0, index - _MAX_WORD), -1):
        if text[begin - 1].isspace():
            return begin
    return 0 if index <= _MAX_WORD else index


def _word_end(text: str, index: int) -> int:
    for end in range(index, min(len(text), index + _MAX_WORD)):
        if text[end].isspace():
            return end
    return len(text) if len(text) - index <= _MAX_WORD else index
