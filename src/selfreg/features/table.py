"""Records of features as one table, a row each, which `datasets` and the Hub's viewer read as it is."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pyarrow as pa

from selfreg.features.records import VERDICTS, FeatureRecord, Neighbour, Score, Vote
from selfreg.features.spans import Span

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
# Lists of pairs, and not maps, which the Hub's viewer does not show.
_SHARES = pa.list_(pa.struct([("name", pa.string()), ("share", pa.float64())]))
_PROBABILITIES = pa.list_(pa.struct([("verdict", pa.string()), ("probability", pa.float64())]))
_SCORE = pa.struct(
    [
        ("balanced_accuracy", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("positives", pa.int64()),
        ("negatives", pa.int64()),
    ]
)
_VOTE = pa.struct(
    [
        ("judge", pa.string()),
        ("verdict", pa.string()),
        ("probabilities", _PROBABILITIES),
        ("reason", pa.string()),
        ("label", pa.string()),
        ("person", pa.bool_()),
        ("at", pa.string()),
        ("rubric", pa.string()),
    ]
)
SCORE_NAMES = ("detection", "fuzzing", "probe")
"""Every score that an explanation can have: a column each."""

SCHEMA = pa.schema(
    [
        ("feature", pa.int64()),
        ("explanation", pa.string()),
        ("explanation_verdict", pa.string()),
        ("explained_by", pa.string()),
        ("verdict", pa.string()),
        ("verdict_probabilities", _PROBABILITIES),
        ("label_verdicts", pa.list_(pa.struct([("label", pa.string()), ("verdict", pa.string())]))),
        ("reason", pa.string()),
        ("decided_by", pa.string()),
        ("decided_at", pa.string()),
        *[(f"{name}_score", _SCORE) for name in SCORE_NAMES],
        ("density", pa.float64()),
        ("mean_activation", pa.float64()),
        ("max_activation", pa.float64()),
        ("num_texts", pa.int64()),
        ("label_shares", _SHARES),
        ("group_shares", _SHARES),
        ("spans", pa.list_(_SPAN)),
        ("quantile_spans", pa.list_(pa.list_(_SPAN))),
        ("near_misses", pa.list_(_SPAN)),
        ("silent_spans", pa.list_(_SPAN)),
        ("nearest", pa.list_(pa.struct([("feature", pa.int64()), ("cosine", pa.float64())]))),
        ("promoted_tokens", pa.list_(pa.string())),
        ("votes", pa.list_(_VOTE)),
    ]
)


def to_table(records: Sequence[FeatureRecord]) -> pa.Table:
    """One row a record."""
    return pa.Table.from_pylist([_row(record) for record in records], schema=SCHEMA)


def from_table(table: pa.Table) -> list[FeatureRecord]:
    """The records of a table that `to_table` made."""
    return [_record(row) for row in table.to_pylist()]


def _row(record: FeatureRecord) -> dict[str, Any]:
    row = _fields(record)
    for name in ("spans", "near_misses", "silent_spans", "nearest"):
        row[name] = [_fields(item) for item in row[name]]
    row["quantile_spans"] = [[_fields(span) for span in part] for part in record.quantile_spans]
    row["label_shares"] = _pairs(record.label_shares, "name", "share")
    row["group_shares"] = _pairs(record.group_shares, "name", "share")
    row["verdict_probabilities"] = _pairs(record.verdict_probabilities, "verdict", "probability")
    row["label_verdicts"] = _pairs(record.label_verdicts, "label", "verdict")
    row["votes"] = [
        {**_fields(vote), "probabilities": _pairs(vote.probabilities, "verdict", "probability")}
        for vote in record.votes
    ]
    scores = row.pop("scores")
    for name in SCORE_NAMES:
        row[f"{name}_score"] = _fields(scores[name]) if name in scores else None
    return row


def _record(row: dict[str, Any]) -> FeatureRecord:
    wrong = {pair["verdict"] for pair in [*row["label_verdicts"], *row["votes"]]}
    wrong |= {row["verdict"], row["explanation_verdict"]}
    wrong -= {None, *VERDICTS}
    if wrong:
        raise ValueError(f"feature {row['feature']} has a verdict {wrong.pop()!r}: known are {', '.join(VERDICTS)}")
    for name in ("spans", "near_misses", "silent_spans"):
        row[name] = [Span(**span) for span in row[name]]
    row["quantile_spans"] = [[Span(**span) for span in part] for part in row["quantile_spans"]]
    row["nearest"] = [Neighbour(**near) for near in row["nearest"]]
    for name, keys in {
        "label_shares": ("name", "share"),
        "group_shares": ("name", "share"),
        "verdict_probabilities": ("verdict", "probability"),
        "label_verdicts": ("label", "verdict"),
    }.items():
        row[name] = {pair[keys[0]]: pair[keys[1]] for pair in row[name]}
    row["votes"] = [
        Vote(**{**vote, "probabilities": {pair["verdict"]: pair["probability"] for pair in vote["probabilities"]}})
        for vote in row["votes"]
    ]
    scores = {name: row.pop(f"{name}_score") for name in SCORE_NAMES}
    row["scores"] = {name: Score(**score) for name, score in scores.items() if score is not None}
    return FeatureRecord(**row)


def _fields(item: Any) -> dict[str, Any]:
    """As `dataclasses.asdict`, without going into the values: they are copied one by one where they hold more."""
    return {field.name: getattr(item, field.name) for field in fields(item)}


def _pairs(values: dict[str, Any], key: str, value: str) -> list[dict[str, Any]]:
    return [{key: name, value: content} for name, content in values.items()]
