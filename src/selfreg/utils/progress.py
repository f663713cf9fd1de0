"""One progress bar for every long pass: items done, rate, time left; a log line instead where nobody watches."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from transformers.utils.logging import disable_progress_bar, is_progress_bar_enabled

from selfreg.utils.processes import is_main_process

logger = logging.getLogger(__name__)


_only_own = False


def show_only_own_bars() -> None:
    """For the command line, where transformers' bars over the shards of small files would bury the run's own lines."""
    global _only_own
    _only_own = True
    disable_progress_bar()


class Advance(Protocol):
    def __call__(self, count: int, /) -> None: ...


@contextmanager
def progress(
    description: str, total: int, unit: str, *, done: int = 0, status: Callable[[], str] | None = None
) -> Iterator[Advance]:
    """Shows `description` with a bar over `total` units; yields the function that advances it.

    What `status` returns is shown beside the bar, anew whenever the bar is drawn, and at the end in the log.

    `transformers.utils.logging.disable_progress_bar()` turns the bar off, as it does in transformers.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class StatusColumn(ProgressColumn):
        def render(self, _task: Task) -> Text:
            return Text(status() if status is not None else "")

    console = Console(stderr=True)
    started, count = time.perf_counter(), 0

    def rate() -> str:
        each_second = count / max(time.perf_counter() - started, 1e-9)
        return f"{each_second:,.0f} {unit}/s" if each_second >= 10 else f"{each_second:.2g} {unit}/s"

    def advance(n: int, /) -> None:
        nonlocal count
        count += n
        bar.update(task, advance=n, rate=rate())

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
    if status is not None:
        columns.append(StatusColumn())
    disable = not (is_main_process() and console.is_terminal and (_only_own or is_progress_bar_enabled()))
    with Progress(*columns, console=console, disable=disable) as bar:
        task = bar.add_task(description, total=total, completed=done, rate="")
        yield advance
    if count and is_main_process():
        seconds = time.perf_counter() - started
        told = rate() if status is None else f"{rate()}, {status()}"
        logger.info("%s: %s %s in %.1f s (%s)", description, f"{count:,}", unit, seconds, told)
