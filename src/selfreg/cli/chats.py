"""Which chat models answer, what they would cost, and what they did: `features explain`, `score` and `judge`."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfreg.cli.common import errors, say, warn
from selfreg.features.chat import ChatError

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog
    from selfreg.features.chat import ChatModel
    from selfreg.features.chat_endpoint import EndpointChatModel
    from selfreg.features.chat_local import LocalChatModel

_WHO = "Who answers"
_LOCAL = "A chat model on this machine: Hub id, folder or package:NAME."
_MODEL = "Name of the model on that server."
Local = Annotated[str | None, typer.Option(help=_LOCAL, rich_help_panel=_WHO)]
Locals = Annotated[list[str] | None, typer.Option(help=f"{_LOCAL} Again for another judge.", rich_help_panel=_WHO)]
Endpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="An OpenAI-compatible server: http://localhost:8000/v1", rich_help_panel=_WHO),
]
ModelName = Annotated[str | None, typer.Option("--model", metavar="NAME", help=_MODEL, rich_help_panel=_WHO)]
ModelNames = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME", help=f"{_MODEL} Again for another judge.", rich_help_panel=_WHO),
]
KeyVariable = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="VARIABLE",
        help="Environment variable that holds the server's key; none is sent without it.",
        rich_help_panel=_WHO,
    ),
]
Concurrency = Annotated[int, typer.Option(help="Calls to the server at a time.", min=1, rich_help_panel=_WHO)]

_COST = "What it costs"
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Count calls and tokens, ask nothing and change nothing.", rich_help_panel=_COST),
]
Price = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="IN OUT",
        help="With --dry-run: price of a million tokens that are read, and of a million that are written.",
        rich_help_panel=_COST,
    ),
]

ANSWERS_NAME = "answers.jsonl"


def open_chats(
    local: str | Sequence[str] | None,
    endpoint: str | None,
    model: str | Sequence[str] | None,
    api_key_env: str | None,
    concurrency: int,
) -> "list[Callable[[], LocalChatModel | EndpointChatModel]]":
    """What opens each chat model: of several on this machine only one need be in memory.

    Raises:
        ValueError: nobody is named, or a server without a model, a model without a server, or one twice.
    """
    from selfreg.features.chat import EndpointChatModel, LocalChatModel

    locals_, models = _as_list(local), _as_list(model)
    if not locals_ and endpoint is None and not models:
        raise ValueError("who shall answer? Give --local MODEL, or --endpoint URL --model NAME")
    if endpoint is None and models:
        raise ValueError(
            f"--model {models[0]} is the name of a model on a server: give --endpoint URL too, or --local"
        )
    if endpoint is None and api_key_env is not None:
        raise ValueError(f"--api-key-env {api_key_env} is for a server: give --endpoint URL too, or leave it out")
    if endpoint is not None and not models:
        raise ValueError(f"which model of {endpoint} shall answer? Give --model NAME")
    twice = [name for name in dict.fromkeys([*locals_, *models]) if [*locals_, *models].count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: each judge has one vote")
    opened: list[Callable[[], LocalChatModel | EndpointChatModel]] = []
    for name in models:
        assert endpoint is not None
        # Made now, since it costs nothing and tells of a missing key before hours of another judge.
        chat = EndpointChatModel(endpoint, name, api_key_env=api_key_env, concurrency=concurrency)
        opened.append(partial(_itself, chat))
    return [*opened, *(partial(LocalChatModel, name) for name in locals_)]


def open_one(
    local: str | None, endpoint: str | None, model: str | None, api_key_env: str | None, concurrency: int
) -> "LocalChatModel | EndpointChatModel":
    """As `open_chats`, where one answers.

    Raises:
        ValueError: as there, or two are named.
    """
    if local is not None and endpoint is not None:
        raise ValueError("one model answers: give --local MODEL or --endpoint URL --model NAME, not both")
    return open_chats(local, endpoint, model, api_key_env, concurrency)[0]()


def _itself(chat: "EndpointChatModel") -> "EndpointChatModel":
    return chat


def _as_list(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def check_price(price: tuple[float, float] | None, *, dry_run: bool) -> None:
    """Raises ValueError where a price is given for what is no dry run, or one below 0."""
    if price is not None and not dry_run:
        raise ValueError("--price is for --dry-run, which asks nothing: add it, or leave the price out")
    if price is not None and min(price) < 0:
        raise ValueError(f"--price {price[0]:g} {price[1]:g}: a price can't be below 0")


def tell_estimate(
    catalog: "FeatureCatalog",
    folder: Path,
    chat: "LocalChatModel | EndpointChatModel",
    ask: "Callable[[FeatureCatalog, ChatModel], None]",
    price: tuple[float, float] | None,
) -> float:
    """Prints what `ask` would take, and gives its price; the catalogue stays as it is."""
    from selfreg.features.answer_cache import AnswerCache
    from selfreg.features.chat import LocalChatModel
    from selfreg.features.chat_dry_run import CountingChatModel

    copy = type(catalog)(list(catalog.records), catalog.spec, catalog.info)
    count_tokens = chat.count_tokens if isinstance(chat, LocalChatModel) else None
    counting = CountingChatModel(chat, AnswerCache(folder / ANSWERS_NAME), count_tokens=count_tokens)
    with _without_progress():
        ask(copy, counting)
    estimate = counting.estimate
    about = "about " if estimate.estimated else ""
    say(
        f"{chat.name}: about {estimate.calls:,} calls to make ({estimate.cached:,} answered or coming twice), {about}"
        f"{estimate.prompt_tokens:,} tokens to read and up to {estimate.completion_tokens:,} to write; an answer that "
        "is no option takes a call more"
    )
    return 0.0 if price is None else estimate.price(*price)


@contextmanager
def _without_progress() -> Iterator[None]:
    logger = logging.getLogger("selfreg.utils.progress")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def saved(catalog: "FeatureCatalog", folder: Path) -> Iterator[None]:
    """Saves the catalogue whatever happens, and says after a failure in the middle that nothing is lost."""
    answers = folder / ANSWERS_NAME
    records, size = list(catalog.records), _size(answers)
    try:
        yield
    except BaseException as error:
        changed = any(new is not old for new, old in zip(catalog.records, records, strict=True))
        if changed:
            catalog.save_pretrained(folder)
        if changed or _size(answers) > size:
            hint = "what was answered until now is saved: the same command goes on from there"
        else:
            hint = ""
        if isinstance(error, KeyboardInterrupt):
            errors.print()
            warn("stopped; " + (hint or "nothing was answered yet"))
            raise typer.Exit(130) from error
        if isinstance(error, OSError | ChatError | ValueError) and not os.environ.get("SELFREG_TRACEBACK"):
            raise ValueError(f"{error}\n{hint}".rstrip()) from error
        if hint:
            warn(hint)
        raise
    catalog.save_pretrained(folder)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def tell_usage(chat: "LocalChatModel | EndpointChatModel") -> None:
    """What a run took."""
    usage = chat.usage
    about = "about " if usage.estimated else ""
    say(
        f"{chat.name}: {usage.calls:,} calls made, {usage.cached:,} answers were there already; {about}"
        f"{usage.prompt_tokens:,} tokens read, {usage.completion_tokens:,} written"
    )
    if usage.failed:
        warn(f"{usage.failed:,} questions to {chat.name} stay without an answer: the same command asks them again")
