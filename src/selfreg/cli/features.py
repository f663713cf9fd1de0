"""`selfreg features`: what each feature of an SAE reacts to, and who says whether a classifier may use it."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from selfreg.cli.common import clear_errors, say, setup, warn
from selfreg.cli.features_view import agreement, export, import_, show
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

_LONGEST = 128
"""Tokens of a text that count towards --max-tokens, where the SAE does not say."""

Which = Annotated[
    str | None, typer.Option("--features", metavar="N,N,...", help="These features only, by their numbers.")
]


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
        from selfreg.utils.devices import default_device

        if (output / CONFIG_NAME).exists():
            raise ValueError(f"{output} holds a catalogue already: choose another folder, or remove it")
        check_output(output)
        sae = load_sae(source, subfolder, revision, model, layer)
        sae.to(default_device())  # type: ignore[arg-type]  # `to` is typed unbound
        columns = [column, *(name for name in (label, group) if name is not None)]
        spec = sae.config.hidden_state_spec()
        # Before the backbone, which takes long to load.
        rows = read_rows(texts, columns, split, max_tokens, spec.max_length if spec else _LONGEST)
        extractor = extractor_of(sae)
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
        if not any(record.explained for record in _chosen(catalog, chosen)):
            # Before a local model is loaded, which the line above does not do yet.
            raise ValueError(f"no feature is explained that could be judged: selfreg features explain {folder} first")
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
            _tell_votes(chat.name, _chosen(catalog, chosen))
            del chat  # before the next judge is loaded
        if dry_run:
            _tell_price(total, price)
            return
        _tell_verdicts([record for record in _chosen(catalog, chosen) if record.explained], folder)


app.command()(show)
app.command()(agreement)
app.command()(export)
app.command(name="import")(import_)
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


def _tell_votes(judge: str, records: Sequence["FeatureRecord"]) -> None:
    """What one judge said, apart from what the votes of all come to."""
    from selfreg.features.records import VERDICTS

    given = [vote.verdict for record in records for vote in record.votes if vote.judge == judge and not vote.person]
    counts = ", ".join(f"{verdict} {given.count(verdict):,}" for verdict in VERDICTS)
    undecided = given.count(None)
    say(f"{judge}: {counts}, undecided {undecided:,}")
    if 2 * undecided > len(given):
        warn(f"{judge} mostly gave no answer that is one of the options: look at its answers, or take another model")


def _tell_price(total: float, price: tuple[float, float] | None) -> None:
    if price is not None:
        say(f"price about {total:,.2f}" if total >= 0.01 or total == 0 else f"price about {total:.2g}")


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
