"""The `selfreg` command."""

from typing import Annotated

import typer

from selfreg.cli.common import console
from selfreg.cli.features import app as features_app
from selfreg.cli.push import push
from selfreg.cli.recipes import demo, run
from selfreg.cli.sae import app as sae_app

app = typer.Typer(
    help="Controllable text classification: keep a classifier on LLM hidden states away from what it must not use.",
    no_args_is_help=True,
    # Else help is broken into lines where its docstring is.
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        from selfreg import __version__

        console.print(f"selfreg {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(run)
app.command()(demo)
app.command()(push)
app.add_typer(sae_app, name="sae")
app.add_typer(features_app, name="features")
