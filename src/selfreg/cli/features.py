"""`selfreg features`: what each feature of an SAE reacts to, and who says whether a classifier may use it."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from selfreg.cli.chats import (
    ANSWERS_NAME,
    Concurrency,
    DryRun,
    Endpoint,
    KeyVariable,
    Local,
    Locals,
    ModelName,
    ModelNames,
    Price,
    check_price,
    open_chats,
    open_one,
    saved,
    tell_estimate,
    tell_usage,
)
from selfreg.cli.common import clear_errors, console, say, setup
from selfreg.cli.inputs import (
    CatalogFolder,
    Column,
    LayerOption,
    MaxTokens,
    Model,
    Revision,
    Split,
    Subfolder,
    Texts,
    check_output,
    extractor_of,
    load_sae,
    open_catalog,
    read_rows,
)
from selfreg.cli.review import review

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog
    from selfreg.features.chat import ChatModel
    from selfreg.features.records import FeatureRecord
    from selfreg.features.rubric import Rubric

app = typer.Typer(
    help="The features of an SAE, with evidence: explain them, score that, judge by a rubric, decide yourself.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Which = Annotated[
    str | None, typer.Option("--features", metavar="N,N,...", help="These features only, by their numbers.")
]

_TABLE_LIMIT = 20


@app.command()
def build(
    source: Annotated[str, typer.Argument(metavar="SAE", help="A folder or a Hub id, of any library that is known.")],
    texts: Texts,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the catalogue.")],
    column: Column = "text",
    split: Split = "train",
    max_tokens: MaxTokens = None,
    top_k: Annotated[int, typer.Option(help="Strongest texts that are kept of a feature.", min=1)] = 10,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Tell how active features are by label.")] = None,
    group: Annotated[str | None, typer.Option(metavar="COLUMN", help="The same by group.")] = None,
    subfolder: Subfolder = "",
    revision: Revision = None,
    model: Model = None,
    layer: LayerOption = None,
) -> None:
    """Collect what activates each feature of an SAE: the first step, and all others stand on it.

    Of each feature are kept the texts that activate it most, some of each strength, texts with the same words where it
    is silent, how often it is active, its nearest features and the tokens that it promotes. It takes one pass of your
    texts through the backbone, and no chat model. Started again after a kill it goes on where it was.

    Example: selfreg features build my-sae chats.jsonl -o catalog --label toxic --max-tokens 500000
    """
    with clear_errors():
        setup()
        from selfreg.features.catalog import CONFIG_NAME, FeatureCatalog

        if (output / CONFIG_NAME).exists():
            raise ValueError(f"{output} holds a catalogue already: choose another folder, or remove it")
        check_output(output)
        sae = load_sae(source, subfolder, revision, model, layer)
        extractor = extractor_of(sae)
        columns = [column, *(name for name in (label, group) if name is not None)]
        rows = read_rows(texts, columns, split, max_tokens, extractor.spec.max_length)
        found = [row[column] for row in rows]
        store = extractor.extract(found, output / ".work" / "states")
        catalog = FeatureCatalog.build(
            sae,
            extractor,
            found,
            top_k=top_k,
            store=store,
            labels=None if label is None else [row[label] for row in rows],
            groups=None if group is None else [row[group] for row in rows],
        )
        catalog.save_pretrained(output)
        shutil.rmtree(output / ".work", ignore_errors=True)
        active = sum(bool(record.spans) for record in catalog)
        tokens, num_texts = catalog.info["num_tokens"], catalog.info["num_texts"]
        say(f"{output}  {active:,} of {len(catalog):,} features active, on {tokens:,} tokens of {num_texts:,} texts")


@app.command()
def explain(
    folder: CatalogFolder,
    local: Local = None,
    endpoint: Endpoint = None,
    model: ModelName = None,
    api_key_env: KeyVariable = None,
    concurrency: Concurrency = 4,
    features: Which = None,
    dry_run: DryRun = False,
    price: Price = None,
) -> None:
    """Ask a chat model what the texts of each feature have in common.

    It is shown the strongest texts and some where the feature is silent, answers with a phrase, and is asked whether
    the phrase describes the texts: two calls a feature. Every answer is on disk at once (answers.jsonl in the
    catalogue), so that after a kill the same command asks only what is missing.

    Example: selfreg features explain catalog --endpoint http://localhost:8000/v1 --model NAME --dry-run
    """
    with clear_errors():
        setup()
        check_price(price, dry_run=dry_run)
        catalog = open_catalog(folder)
        chosen = _numbers(features, catalog)
        chat = open_one(local, endpoint, model, api_key_env, concurrency)
        if dry_run:
            _tell_price(
                tell_estimate(catalog, folder, chat, lambda copy, asked: copy.explain(asked, features=chosen), price),
                price,
            )
            return
        with saved(catalog, folder):
            catalog.explain(chat, features=chosen, cache=folder / ANSWERS_NAME)
        tell_usage(chat)
        asked = [record for record in _chosen(catalog, chosen) if record.spans]
        good = sum(record.explained for record in asked)
        none = sum(record.explanation is None for record in asked)
        say(
            f"{good:,} of {len(asked):,} features explained; for {len(asked) - good - none:,} the phrase does not "
            f"describe the texts, for {none:,} there is none"
        )


@app.command()
def score(
    folder: CatalogFolder,
    free: Annotated[bool, typer.Option("--free", help="Only the score that needs no chat model.")] = False,
    local: Local = None,
    endpoint: Endpoint = None,
    model: ModelName = None,
    api_key_env: KeyVariable = None,
    concurrency: Concurrency = 4,
    features: Which = None,
    examples: Annotated[int, typer.Option(help="Texts of each kind that are asked about, of a feature.", min=1)] = 5,
    dry_run: DryRun = False,
    price: Price = None,
) -> None:
    """Score the explanations: do they foretell what activates the feature?

    Detection: which of some texts, that the explainer was not shown, activate it. Fuzzing: is the marked word the one.
    Both ask a chat model, up to 20 short questions a feature (4 times --examples). Probe: does a linear model on the
    words of the explanation tell such texts apart; it is free. All are balanced accuracies: 1 is best, 0.5 is chance.

    Example: selfreg features score catalog --free
    """
    with clear_errors():
        setup()
        check_price(price, dry_run=dry_run)
        catalog = open_catalog(folder)
        chosen = _numbers(features, catalog)
        if free:
            if dry_run or any(value is not None for value in (local, endpoint, model)):
                raise ValueError("--free asks no chat model: leave the options of chat models and --dry-run out")
            with saved(catalog, folder):
                catalog.score(features=chosen)
        else:
            chat = open_one(local, endpoint, model, api_key_env, concurrency)
            if dry_run:

                def ask(copy: "FeatureCatalog", counting: "ChatModel") -> None:
                    copy.score(counting, features=chosen, max_examples=examples)

                _tell_price(tell_estimate(catalog, folder, chat, ask, price), price)
                return
            with saved(catalog, folder):
                catalog.score(chat, features=chosen, cache=folder / ANSWERS_NAME, max_examples=examples)
            tell_usage(chat)
        _tell_scores(_chosen(catalog, chosen))


@app.command()
def judge(
    folder: CatalogFolder,
    rubric: Annotated[str, typer.Option(help="Name of a rubric that comes with selfreg, a YAML file, or a text.")],
    local: Locals = None,
    endpoint: Endpoint = None,
    model: ModelNames = None,
    api_key_env: KeyVariable = None,
    concurrency: Concurrency = 4,
    features: Which = None,
    reasons: Annotated[bool, typer.Option(help="Ask for a reason too; about twice the calls.")] = True,
    dry_run: DryRun = False,
    price: Price = None,
) -> None:
    """Ask chat models by a rubric whether each explained feature is a legitimate reason for a label.

    Each judge has a vote, and the majority decides; an even split is left to you (see `review`), whose vote outranks
    theirs. One call a feature and judge, two with reasons, and with a rubric per label so many for each label. Every
    answer is on disk at once, so that after a kill the same command asks only what is missing.

    Example: selfreg features judge catalog --rubric toxic_chat --endpoint URL --model ONE --model TWO
    """
    with clear_errors():
        setup()
        check_price(price, dry_run=dry_run)
        catalog = open_catalog(folder)
        chosen = _numbers(features, catalog)
        what = _rubric(rubric)
        chats = open_chats(local, endpoint, model, api_key_env, concurrency)
        total = 0.0
        for opened in chats:
            chat = opened()
            if dry_run:

                def ask(copy: "FeatureCatalog", counting: "ChatModel") -> None:
                    copy.judge(counting, what, features=chosen, reasons=reasons)

                total += tell_estimate(catalog, folder, chat, ask, price)
                continue
            with saved(catalog, folder):
                catalog.judge(chat, what, features=chosen, cache=folder / ANSWERS_NAME, reasons=reasons)
            tell_usage(chat)
        if dry_run:
            _tell_price(total, price)
            return
        _tell_verdicts([record for record in _chosen(catalog, chosen) if record.explained], folder)


@app.command()
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


@app.command()
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


@app.command()
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
        count = open_catalog(folder).to_csv(file)
        say(f"{file}  {count:,} features")
        say(f"fill in person_verdict, then: selfreg features import {folder} {file} --by NAME")


@app.command(name="import")
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


app.command()(review)


def _numbers(features: str | None, catalog: "FeatureCatalog") -> list[int] | None:
    from selfreg.features.decisions import check_features

    if features is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", features):
        raise ValueError(f"--features {features}: give their numbers with commas between them, such as 1,5,9")
    numbers = [int(number) for number in features.split(",")]
    check_features(numbers, len(catalog), "--features")
    return numbers


def _chosen(catalog: "FeatureCatalog", features: Sequence[int] | None) -> list["FeatureRecord"]:
    return list(catalog) if features is None else [catalog[feature] for feature in dict.fromkeys(features)]


def _rubric(source: str) -> "Rubric":
    from selfreg.features.rubric import SHIPPED_RUBRICS, FreeTextRubric, Rubric

    rubric = Rubric.load(source)
    # A text, or a name that is misspelt?
    if isinstance(rubric, FreeTextRubric) and len(source.split()) == 1 and rubric.free_text == source.strip():
        raise ValueError(
            f"there is no rubric {source!r}: give one that comes with selfreg ({', '.join(SHIPPED_RUBRICS)}), the "
            "path of a YAML or text file, or the text itself"
        )
    return rubric


def _tell_price(total: float, price: tuple[float, float] | None) -> None:
    if price is not None:
        say(f"price at the most {total:,.2f}" if total >= 0.01 or total == 0 else f"price at the most {total:.2g}")


def _tell_scores(records: Sequence["FeatureRecord"]) -> None:
    from selfreg.features.table import SCORE_NAMES

    for name in SCORE_NAMES:
        found = [record.scores[name].balanced_accuracy for record in records if name in record.scores]
        if found:
            say(f"{name}: mean balanced accuracy {sum(found) / len(found):.3f} over {len(found):,} explanations")


def _tell_verdicts(records: Sequence["FeatureRecord"], folder: Path) -> None:
    from selfreg.features.review import evenly_split

    legitimate = sum(record.legitimate for record in records)
    no_verdict = [record for record in records if record.verdict is None]
    split = sum(map(evenly_split, no_verdict))
    say(
        f"of {len(records):,} explained features {legitimate:,} legitimate, "
        f"{len(records) - legitimate - len(no_verdict):,} not, {len(no_verdict) - split:,} undecided, {split:,} split"
    )
    if no_verdict:
        say(f"to decide those yourself: selfreg features review {folder}")


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
