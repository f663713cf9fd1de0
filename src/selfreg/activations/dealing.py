"""The shards of a set of texts, dealt out to the processes that are there."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from selfreg.activations.store import StoreShard
from selfreg.utils.processes import gather_all, processes
from selfreg.utils.progress import progress

if TYPE_CHECKING:
    from selfreg.activations.extractor import HiddenStateExtractor

_TOKENIZED_AT_ONCE = 1024

HeldEnd = Callable[[int, int], int | None]
"""Number and first text of a shard -> one past its last text, where it is there already; else None."""


def own_shards(
    extractor: "HiddenStateExtractor",
    texts: Sequence[str],
    description: str,
    *,
    shard_tokens: int = 65_536,
    held_end: HeldEnd = lambda _number, _first: None,
) -> Iterator[tuple[int, StoreShard]]:
    """The shards of `extractor.iterate` that are this process's to compute, with their numbers and a progress bar.

    Every process has to call it. A shard is the same whichever process computes it, and however many there are.

    Args:
        extractor: whose states they are.
        texts, shard_tokens: as for `iterate`.
        description: beside the bar.
        held_end: which of the shards need no computing.
    """
    if processes().num_processes > 1:
        yield from _dealt_shards(extractor, texts, description, shard_tokens, held_end)
        return
    first = number = 0
    with progress(description, len(texts), "texts") as advance:
        while first < len(texts):
            end = held_end(number, first)
            if end is None:
                prompts = extractor.prompts_of_shard(texts, first, shard_tokens)
                yield number, extractor.shard_of(prompts, first, advance)
                end = first + len(prompts)
            else:
                advance(end - first)
            first, number = end, number + 1


def _dealt_shards(
    extractor: "HiddenStateExtractor", texts: Sequence[str], description: str, shard_tokens: int, held_end: HeldEnd
) -> Iterator[tuple[int, StoreShard]]:
    state = processes()
    borders = _borders(extractor, texts, shard_tokens)
    missing: list[int] = []
    if state.is_main_process:
        missing = [number for number, first in enumerate(borders[:-1]) if held_end(number, first) is None]
    # One process looks: what a faster one has written by then must not change what the others take for theirs.
    own = gather_all(missing)[0][state.process_index :: state.num_processes]
    count = sum(borders[number + 1] - borders[number] for number in own)
    bar = progress(f"{description}, process 1 of {state.num_processes}", count, "texts")
    with bar as advance, extractor.in_step.together():
        for number in own:
            first = borders[number]
            prompts = extractor.tokenize(texts[first : borders[number + 1]])
            yield number, extractor.shard_of(prompts, first, advance)


def _borders(extractor: "HiddenStateExtractor", texts: Sequence[str], shard_tokens: int) -> list[int]:
    """The first text of every shard, and behind them the number of texts. Each process counts tokens of its part."""
    state = processes()
    here = range(len(texts))[state.process_index :: state.num_processes]
    lengths = np.empty(len(here), dtype=np.int32)
    for start in range(0, len(here), _TOKENIZED_AT_ONCE):
        part = here[start : start + _TOKENIZED_AT_ONCE]
        prompts = extractor.tokenize([texts[row] for row in part])
        lengths[start : start + len(part)] = [len(ids) for ids, _, _ in prompts]
    counts = np.empty(len(texts), dtype=np.int64)
    for index, gathered in enumerate(gather_all(lengths)):
        counts[index :: state.num_processes] = gathered
    ends = counts.cumsum()
    borders = [0]
    while borders[-1] < len(texts):
        before = int(ends[borders[-1] - 1]) if borders[-1] else 0
        borders.append(min(int(np.searchsorted(ends, before + shard_tokens)) + 1, len(texts)))
    return borders
