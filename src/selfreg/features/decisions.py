"""A person's verdicts: on disk at once, undone, and taken to a spreadsheet and back."""

import csv
import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from selfreg.features.records import VERDICTS, FeatureRecord, VerdictName, Vote
from selfreg.features.table import SCORE_NAMES
from selfreg.features.votes import settled_record
from selfreg.utils.files import atomic_path

LOG_NAME = "decisions.jsonl"

_COLUMNS = (
    "feature",
    "explanation",
    *SCORE_NAMES,
    "density",
    "verdict",
    "decided_by",
    "reason",
    "split_vote",
    "promoted_tokens",
    "spans",
    "person_verdict",
    "person_reason",
)
_SPANS_SHOWN = 5
# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def check_verdict(verdict: str) -> VerdictName:
    """`verdict` in its own spelling, whatever case it was given in.

    Raises:
        ValueError: it is none.
    """
    for known in get_args(VerdictName):
        if verdict.strip().casefold() == known.casefold():
            return known
    raise ValueError(f"verdict {verdict!r} is not known: it must be one of {', '.join(VERDICTS)}")


def with_vote(record: FeatureRecord, vote: Vote) -> FeatureRecord:
    """The record with a vote in the place of the same judge's earlier one on the same label, and what it comes to."""
    return settled_record(replace(record, votes=[*_without(record, vote), vote]))


def without_vote(record: FeatureRecord, vote: Vote) -> FeatureRecord:
    """The record without the vote of the same judge on the same label."""
    return settled_record(replace(record, votes=_without(record, vote)))


def _without(record: FeatureRecord, vote: Vote) -> list[Vote]:
    who = (vote.person, vote.judge, vote.label)
    return [other for other in record.votes if (other.person, other.judge, other.label) != who]


class DecisionLog:
    """What persons decided, a line each, appended at once, in the folder of a catalogue.

    Args:
        folder: of the catalogue.
        sae_fingerprint: of the SAE that the catalogue is of.
    """

    def __init__(self, folder: str | os.PathLike[str], sae_fingerprint: str) -> None:
        self.path = Path(folder) / LOG_NAME
        self.sae_fingerprint = sae_fingerprint

    def add(self, feature: int, vote: Vote, *, undone: bool = False) -> None:
        """Appends a vote, or that it is taken back."""
        line = {"sae": self.sae_fingerprint, "feature": feature, "undone": undone, "vote": asdict(vote)}
        with self.path.open("a", encoding="utf8") as file:
            # A leading newline keeps a line that was cut short by a kill from swallowing this one.
            file.write("\n" + json.dumps(line))
            file.flush()
            os.fsync(file.fileno())

    def apply(self, records: list[FeatureRecord]) -> None:
        """Brings the records, in place, to what was decided.

        Raises:
            ValueError: the decisions are of a catalogue of another SAE, or of a feature that is not there.
        """
        if not self.path.exists():
            return
        # Of each feature, person and label: the last line, and when the latest of all of them was decided.
        last: dict[tuple[int, str, str | None], tuple[Vote, bool]] = {}
        latest: dict[tuple[int, str, str | None], str] = {}
        for text in self.path.read_text(encoding="utf8").split("\n"):
            try:
                line: dict[str, Any] = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line["sae"] != self.sae_fingerprint:
                raise ValueError(
                    f"{self.path} holds verdicts on the features of another SAE: move the file away, or build the "
                    "catalogue of that SAE again"
                )
            vote = Vote(**line["vote"])
            check_features([line["feature"]], len(records), str(self.path))
            key = (line["feature"], vote.judge, vote.label)
            last[key] = (vote, line["undone"])
            latest[key] = max(latest.get(key, ""), vote.at)
        for key, (vote, undone) in last.items():
            record = records[key[0]]
            saved = [other for other in record.votes if other not in _without(record, vote)]
            if any(other.at > latest[key] for other in saved):
                continue  # decided again since, by other means than this file
            records[key[0]] = (without_vote if undone else with_vote)(record, vote)


def check_features(features: Iterable[int], count: int, where: str) -> None:
    """Raises ValueError where a feature is not one of `count`; names up to ten of those."""
    unknown = [feature for feature in features if not 0 <= feature < count]
    if unknown:
        raise ValueError(f"{where}: features {unknown[:10]} are not there: the catalogue has 0 to {count - 1}")


def write_csv(records: Iterable[FeatureRecord], path: str | os.PathLike[str]) -> int:
    """Writes records that have spans as a spreadsheet with two empty columns for a person; gives how many."""
    from selfreg.features.votes import settle

    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for record in records:
            if not record.spans:
                continue
            row = {
                "feature": record.feature,
                "explanation": record.explanation,
                **{name: _rounded(record, name) for name in SCORE_NAMES},
                "density": f"{record.density:.6f}",
                "verdict": record.verdict,
                "decided_by": record.decided_by,
                "reason": record.reason,
                "split_vote": "yes" if settle(record.votes).split else "",
                "promoted_tokens": " ".join(record.promoted_tokens),
                "spans": "\n".join(span.marked().replace("\n", " ") for span in record.spans[:_SPANS_SHOWN]),
                # Empty, though somebody may have decided: whoever fills the file in, it is taken for theirs.
                "person_verdict": None,
                "person_reason": None,
            }
            writer.writerow({name: _harmless(value) for name, value in row.items()})
            count += 1
    return count


def _rounded(record: FeatureRecord, name: str) -> str | None:
    return f"{record.scores[name].balanced_accuracy:.3f}" if name in record.scores else None


def _harmless(value: Any) -> Any:
    """Spans come from strangers, and a spreadsheet runs what looks like a formula."""
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value


def read_csv(path: str | os.PathLike[str], count: int) -> dict[int, tuple[VerdictName, str | None]]:
    """Verdict and reason of each feature whose `person_verdict` is filled in.

    Args:
        path: a file that `write_csv` wrote and a person filled in; only `feature` and `person_verdict` are needed.
        count: features of the catalogue.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a line has a verdict or a feature that is not known, or a feature comes
            twice; nothing is taken from the file then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found: dict[int, tuple[VerdictName, str | None]] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason}): save it as CSV UTF-8") from error
    with io.StringIO(text, newline="") as file:
        header = text.partition("\n")[0]
        # What Excel writes where the comma is the decimal sign.
        reader = csv.DictReader(file, delimiter=";" if ";" in header and "," not in header else ",")
        missing = {"feature", "person_verdict"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {' and '.join(sorted(missing))}: it has {reader.fieldnames}")
        for row in reader:
            if not (row["person_verdict"] or "").strip():
                continue
            where = f"{path}, line {reader.line_num}"
            try:
                feature = int(row["feature"])
            except ValueError:
                raise ValueError(f"{where}: feature {row['feature']!r} is not a number") from None
            check_features([feature], count, where)
            where = f"{path}, feature {feature}"
            if feature in found:
                raise ValueError(f"{where}: it stands in the file twice")
            try:
                verdict = check_verdict(row["person_verdict"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            found[feature] = (verdict, (row.get("person_reason") or "").strip() or None)
    return found
