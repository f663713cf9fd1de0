"""`selfreg features review`: one feature at a time, one key for a verdict."""

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import RenderableType
from rich.text import Text

from selfreg.cli.common import clear_errors, console, say, setup
from selfreg.cli.inputs import CatalogFolder, open_catalog

if TYPE_CHECKING:
    from selfreg.features.records import FeatureRecord
    from selfreg.features.review import ReviewSession

_VERDICTS = {"y": "Yes", "p": "Probably", "m": "Maybe", "n": "No"}
_COMMANDS = {"s": "skip", "b": "back", "u": "undo", "q": "quit", "?": "help"}
_HELP = """Is this feature a legitimate reason for a label?

y  Yes        p  Probably    the classifier may use it
m  Maybe      n  No          it must not
s  skip: decide nothing      b  back to the feature before
u  undo the last verdict     q  quit; all verdicts are saved already

The word in reverse is where the feature is most active; the number before a text says how much."""
_MOST_SPANS, _FEWEST_SPANS = 12, 3
# Beside the view of a feature: its place, an empty line, the keys and the cursor.
_OTHER_LINES = 4
_CTRL_D = "\x04"


def review(
    folder: CatalogFolder,
    only: Annotated[
        Literal["split", "undecided", "unintended", "all"] | None,
        typer.Option(help="Only these; `all` shows those again that you have decided."),
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="NAME", help="Who decides; your login name, if left out.")] = None,
) -> None:
    """Decide yourself, feature by feature, with the evidence on the screen: one key for a verdict.

    First come the features that judges disagree on, then explained ones without a verdict, then those that the judges
    are least sure of, then the rest, the most active first. Each verdict is on disk (decisions.jsonl in the catalogue)
    before the next feature is shown, outranks those of models, and can be undone. Quit when you like: what you have
    decided is not shown again.

    Example: selfreg features review catalog --only split --by Ada
    """
    with clear_errors():
        setup()
        from selfreg.features.review import DecisionMaker, ReviewSession, review_order, select

        catalog = open_catalog(folder)
        by = _login_name() if by is None else by
        decisions = DecisionMaker(catalog, folder, by=by)
        records = review_order(catalog.records, by=by) if only is None else select(catalog, only)
        if not records:
            say("there is nothing to decide" + ("; --only all shows what you have decided" if only is None else ""))
            return
        session = ReviewSession(decisions, [record.feature for record in records])
        try:
            _walk(session)
        except (KeyboardInterrupt, EOFError):
            console.print()
        _finish(session, folder, by)


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # before Python 3.13 a KeyError
        raise ValueError("who decides? Give --by NAME") from None


def _walk(session: "ReviewSession") -> None:
    told = ""
    while True:
        _show(session, told)
        key = _read_key()
        told = ""
        if key in _VERDICTS and not session.done:
            verdict = _VERDICTS[key]
            feature = session.feature
            session.decide(verdict)
            told = f"feature {feature}: {verdict}"
        elif key == "s" and not session.done:
            session.skip()
        elif key == "b":
            told = "" if session.back() else "this is the first one"
        elif key == "u":
            told = "undone" if session.undo() else "there is nothing to undo"
        elif key == "q" or (session.done and key in ("\r", "\n")):
            return
        else:
            told = _HELP if key == "?" else "y, p, m, n, s, b, u, q or ?"


def _read_key() -> str:
    try:
        key = typer.getchar()
    except OSError:
        raise ValueError("review needs a terminal; without one use `selfreg features export` and `import`") from None
    if key in ("", _CTRL_D):
        raise EOFError
    return key.lower()


def _show(session: "ReviewSession", told: str) -> None:
    if console.is_terminal:
        console.clear()
    else:
        console.print()
    if told:
        console.print(Text(told, style="yellow"))
        console.print()
    if session.done:
        console.print(Text("that was the last one:  u undo  b back  q quit", style="bold"))
        return
    place = f"{session.position + 1:,} of {len(session.features):,}, {session.num_decided:,} decided"
    console.print(Text(place, style="dim"))
    lines = _OTHER_LINES + (len(told.splitlines()) + 1 if told else 0)
    console.print(
        _fitting_view(session.record, console.height - lines, width=console.width), highlight=False, emoji=False
    )
    console.print()
    console.print(_key_line())


def _fitting_view(record: "FeatureRecord", height: int, *, width: int) -> RenderableType:
    """The view of a feature with as many texts as fit on the screen."""
    from selfreg.cli.record_view import record_view

    for max_spans in range(_MOST_SPANS, _FEWEST_SPANS, -1):
        view = record_view(record, width=width, max_spans=max_spans)
        if len(console.render_lines(view)) <= height:
            return view
    return record_view(record, width=width, max_spans=_FEWEST_SPANS)


def _key_line() -> Text:
    line = Text("legitimate?")
    for key, word in {**_VERDICTS, **_COMMANDS}.items():
        line.append(" " if key != "s" else "  ").append(key, style="bold").append(f" {word}", style="dim")
    return line


def _finish(session: "ReviewSession", folder: Path, by: str) -> None:
    count = session.num_decided
    if session.changed:
        # As it is on disk now, and not as it was when it was opened: a judge may have saved votes meanwhile. Reading
        # it takes in the verdicts, which are beside it.
        open_catalog(folder).save_pretrained(folder)
    say(f"{count:,} decided by {by}, saved in {folder}; {session.num_open:,} of {len(session.features):,} left")
