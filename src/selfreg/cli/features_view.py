"""`selfreg features show`, `agreement`, `export` and `import`: what is known, on the screen and in a spreadsheet."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from selfreg.cli.common import clear_errors, console, say, setup, warn
from selfreg.cli.inputs import CatalogFolder, open_catalog

if TYPE_CHECKING:
    from selfreg.features.records import FeatureRecord

_TABLE_LIMIT = 20


def show(
    folder: CatalogFolder,
    features: Annotated[
        list[int] | None, typer.Argument(metavar="[FEATURE]...", help="Show all evidence on these.", min=0)
    ] = None,
    unintended: Annotated[bool, typer.Option("--unintended", help="Only those judged not legitimate.")] = False,
    split: Annotated[bool, typer.Option("--split", help="Only those that judges disagree on.")] = False,
    undecided: Annotated[bool, typer.Option("--undecided", help="Only explained ones without a verdict.")] = False,
    limit: Annotated[
        int | None, typer.Option(help=f"So many at most; {_TABLE_LIMIT} in a table, if left out.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, as JSON, for programs.")] = False,
) -> None:
    """Show the features of a catalogue as a table, or all evidence on some of them.

    Features that nothing activates are left out, and those with a verdict or an explanation come first. Detection,
    fuzzing and probe are the scores of the explanation (0.5 is chance), density is the share of tokens. An explanation
    that does not describe the texts is dim.

    Example: selfreg features show catalog 17 42
    """
    with clear_errors():
        setup()
        from selfreg.cli.record_view import feature_table, record_view
        from selfreg.features.decisions import check_features
        from selfreg.features.review import Selection, select

        flags: dict[Selection, bool] = {"unintended": unintended, "split": split, "undecided": undecided}
        named = [name for name, given in flags.items() if given]
        if len(named) + bool(features) > 1:
            raise ValueError("name features, or give one of --unintended, --split, --undecided")
        catalog = open_catalog(folder)
        if features:
            check_features(features, len(catalog), str(folder))
            records = [catalog[feature] for feature in dict.fromkeys(features)]
        elif named:
            records = select(catalog, named[0])
        else:
            records = sorted(select(catalog, "all"), key=_known_first)
        if as_json:
            sys.stdout.write(json.dumps([asdict(record) for record in records[:limit]], indent=2) + "\n")
            return
        if features:
            for record in records[:limit]:
                console.print(record_view(record, width=console.width), highlight=False, emoji=False)
                console.print()
            return
        if not records:
            say("there are none")
            return
        shown = records[: limit or _TABLE_LIMIT]
        console.print(feature_table(shown), highlight=False, emoji=False)
        if len(shown) < len(records):
            say(f"{len(shown):,} of {len(records):,}; --limit shows more, and their numbers all evidence on some")


def agreement(folder: CatalogFolder) -> None:
    """How far judges, models and persons, agree on what is legitimate, and on which features they do not.

    Cohen's kappa of every two: 1 where they are always of one mind, 0 where they agree no more than by chance; with a
    95 % interval and the number of questions that both decided. Then the features with a split vote, for `review`.

    Example: selfreg features agreement catalog
    """
    with clear_errors():
        setup()
        from selfreg.cli.record_view import printable

        catalog = open_catalog(folder)
        pairs = catalog.agreement()
        if not pairs:
            say("no two judges have decided on the same features: give `judge` several models, or decide in `review`")
            return
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name in ("judge", "and"):
            table.add_column(name, overflow="fold")
        for name in ("kappa", "95 % interval", "agree on", "n"):
            table.add_column(name, justify="right", no_wrap=True)
        for pair in pairs:
            kappa = "undefined" if pair.kappa is None else f"{pair.kappa:.2f}"
            interval = "–" if pair.low is None or pair.high is None else f"{pair.low:.2f} to {pair.high:.2f}"
            names = Text(printable(pair.first)), Text(printable(pair.second))
            table.add_row(*names, kappa, interval, f"{100 * pair.observed:.0f} %", f"{pair.features:,}")
        console.print(table, highlight=False, emoji=False)
        if any(pair.kappa is None for pair in pairs):
            say("undefined: both gave one and the same answer throughout")
        records = catalog.split_votes()
        noun = "feature" if len(records) == 1 else "features"
        say(f"{len(records):,} {noun} with a split vote" + (":" if records else ""))
        if records:
            console.print(_split_table(records[:_TABLE_LIMIT]), highlight=False, emoji=False)
        if len(records) > _TABLE_LIMIT:
            say(f"the {_TABLE_LIMIT} most evenly split; `selfreg features show {folder} --split --limit N` shows more")


def export(
    folder: CatalogFolder, file: Annotated[Path, typer.Argument(metavar="FILE.csv", help="File that is written.")]
) -> None:
    """Write the features as a spreadsheet, with columns for your verdicts.

    Fill in person_verdict (Yes, Probably, Maybe or No: is it a legitimate reason?) and, if you like, person_reason;
    then take it back with `import`.

    Example: selfreg features export catalog features.csv
    """
    with clear_errors():
        setup()
        if file.exists():
            raise ValueError(f"{file} is there already, and may hold verdicts: choose another name, or remove it")
        count = open_catalog(folder).to_csv(file)
        say(f"{file}  {count:,} features")
        say(f"fill in person_verdict, then: selfreg features import {folder} {file} --by NAME")


def import_(
    folder: CatalogFolder,
    file: Annotated[Path, typer.Argument(metavar="FILE.csv", help="File of `export`, filled in.")],
    by: Annotated[str, typer.Option(metavar="NAME", help="Who decided.")],
) -> None:
    """Take a person's verdicts from a spreadsheet; they outrank those of models.

    Only the columns feature and person_verdict are needed, and lines without a verdict are left out. Where a line is
    wrong nothing is taken. The same person's earlier verdicts on these features go.

    Example: selfreg features import catalog features.csv --by Ada
    """
    with clear_errors():
        setup()
        from selfreg.features.decisions import read_csv
        from selfreg.features.review import DecisionMaker

        catalog = open_catalog(folder)
        decisions = DecisionMaker(catalog, folder, by=by)
        found = read_csv(file, len(catalog))
        for feature, (verdict, reason) in found.items():
            decisions.decide(feature, verdict, reason=reason)
        catalog.save_pretrained(folder)
        say(f"{len(found):,} {'verdict' if len(found) == 1 else 'verdicts'} of {by} taken from {file}")
        if not found:
            warn("person_verdict is empty in all lines: fill it in with Yes, Probably, Maybe or No")


def _known_first(record: "FeatureRecord") -> tuple[bool, bool, bool, int]:
    return not record.votes, not record.explained, record.explanation is None, record.feature


def _split_table(records: Sequence["FeatureRecord"]) -> Table:
    from selfreg.cli.record_view import explanation_text, printable

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, expand=True)
    table.add_column("feature", justify="right", no_wrap=True)
    table.add_column("explanation", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("votes", ratio=1)
    for record in records:
        votes = [
            f"{printable(vote.judge)}{'' if vote.label is None else f', {printable(vote.label)}'}: "
            f"{vote.verdict or 'undecided'}"
            for vote in record.votes
        ]
        table.add_row(str(record.feature), explanation_text(record), Text("; ".join(votes)))
    return table
