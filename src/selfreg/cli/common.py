"""What all commands share: where they print, and how a user's mistake is told."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.logging import RichHandler

from selfreg.features.chat import ChatError

console = Console()
errors = Console(stderr=True)


def setup() -> None:
    """Of the project's own, and of nothing else, warnings on stderr (SELFREG_LOG_LEVEL for more) and progress bars."""
    # Before it is imported: it reads it then.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from selfreg.utils.progress import show_only_own_bars

    show_only_own_bars()
    handler = RichHandler(console=errors, show_time=False, show_path=False, markup=False)
    logging.getLogger("selfreg").addHandler(handler)
    logging.getLogger("selfreg").setLevel(os.environ.get("SELFREG_LOG_LEVEL", "WARNING").upper())
    if not errors.is_terminal:
        # Where bars are not drawn, a line at the end of each long pass takes their place.
        logging.getLogger("selfreg.utils.progress").setLevel(logging.INFO)


@contextmanager
def clear_errors() -> Iterator[None]:
    """A user's mistake is one message, not a traceback; SELFREG_TRACEBACK=1 shows it all the same."""
    try:
        _check_alone()
        yield
    except (ValueError, OSError, ChatError) as error:
        if os.environ.get("SELFREG_TRACEBACK"):
            raise
        errors.print("[bold red]error[/bold red] ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True, emoji=False)
        raise typer.Exit(1) from error


def _check_alone() -> None:
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise ValueError(
            f"the selfreg command works in one process, and this is one of {count}: start a Python script with "
            "accelerate launch or torchrun (docs/scaling.md)"
        )


def say(line: str) -> None:
    """A line as it is: a name or label may hold what rich takes for markup."""
    console.print(line, highlight=False, soft_wrap=True, emoji=False, markup=False)


def warn(line: str) -> None:
    """On stderr, as the warnings of the library are."""
    errors.print("[bold yellow]warning[/bold yellow] ", end="")
    errors.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)
