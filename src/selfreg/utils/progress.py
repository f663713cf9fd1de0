"""One progress bar for every long pass: items done, rate, time left; a log line instead where nobody watches."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers.utils.logging import is_progress_bar_enabled

logger = logging.getLogger(__name__)


class Advance(Protocol):
    def __call__(self, count: int, /) -> None: ...


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(f"{rate:,.0f} {self.unit}/s" if rate else f"- {self.unit}/s")


@contextmanager
def progress(description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Advance]:
    """Shows `description` with a bar over `total` units; yields the function that advances it.

    `transformers.utils.logging.disable_progress_bar()` turns the bar off, as it does in transformers.
    """
    console = Console(stderr=True)
    started, count = time.perf_counter(), 0

    def advance(n: int, /) -> None:
        nonlocal count
        count += n
        bar.advance(task, n)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(unit))
    disable = not (console.is_terminal and is_progress_bar_enabled())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=disable) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield advance
    seconds = time.perf_counter() - started
    if count:
        logger.info("%s: %s %s in %.1f s (%s/s)", description, f"{count:,}", unit, seconds, f"{count / seconds:,.0f}")
