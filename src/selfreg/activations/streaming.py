"""StreamingActivations: hidden states as they come, for corpora whose states no disk would hold."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.spec import HiddenStateSpec
from selfreg.utils.processes import gather_all, processes
from selfreg.utils.sharding import is_sharded

_BLOCK_TOKENS = 16_384
_TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class _Window:
    """Where a buffer begins.

    Attributes:
        passes (`int`): passes over the texts before it.
        texts (`int`): texts of this pass that this process has read before it.
    """

    passes: int = 0
    texts: int = 0


class StreamingActivations(IterableDataset[dict[str, Tensor]]):
    """Runs texts through a backbone while an SAE is trained on the states, which pass through a shuffled buffer.

    A buffer is filled, given out in random order, and filled anew: what is further apart than a buffer is never mixed.
    Shuffle the texts first (`dataset.shuffle(seed=0, buffer_size=10_000)` of a streamed one) where they are ordered.

    Under `accelerate launch` or `torchrun` each process reads its own part of the texts: of a `datasets` dataset what
    `split_dataset_by_node` deals to it, of others every n-th text.

    As an iterable it gives one pass, state by state: `{"hidden_states": [hidden_size]}`. `SAETrainer` takes batches
    instead, pass after pass until `max_steps`, and keeps the place in its checkpoints.

    Args:
        extractor: of the backbone and layer.
        dataset: texts: a `datasets.Dataset` or `datasets.IterableDataset`, or any iterable of strings. Texts without
            content are left out. An iterator that can be read once only has to last for the whole training.
        text_column: of a `datasets` dataset.
        buffer_tokens: states of a buffer, about; it takes `buffer_tokens * hidden_size * 4` bytes.
        seed: of the order within a buffer.

    Raises:
        ValueError: the dataset has no such column, or buffer_tokens is not positive.
    """

    def __init__(
        self,
        extractor: HiddenStateExtractor,
        dataset: Iterable[Any],
        *,
        text_column: str = "text",
        buffer_tokens: int = 131_072,
        seed: int = 0,
    ) -> None:
        import datasets

        if buffer_tokens < 1:
            raise ValueError(f"buffer_tokens={buffer_tokens} must be at least 1")
        self.is_hf = isinstance(dataset, datasets.Dataset | datasets.IterableDataset)
        columns = getattr(dataset, "column_names", None) if self.is_hf else None
        if columns is not None and text_column not in columns:
            raise ValueError(f"the dataset has no column {text_column!r}; it has {', '.join(columns)}")
        self.extractor = extractor
        self.dataset = dataset
        self.text_column = text_column
        self.buffer_tokens = buffer_tokens
        self.seed = seed
        self._window = _Window()
        self._given = 0
        self._held: tuple[_Window, Tensor, _Window] | None = None
        self._reading: tuple[_Window, Iterator[str]] | None = None

    @property
    def spec(self) -> HiddenStateSpec:
        return self.extractor.spec

    def __repr__(self) -> str:
        return f"StreamingActivations(layer {self.spec.layer} of {self.spec.model!r}, {self.buffer_tokens:,} tokens)"

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        window = _Window()
        while window.passes == 0:
            states, following = self._states(window)
            for row in self._order(window, len(states)).tolist():
                yield {"hidden_states": states[row]}
            window = following

    def current_states(self) -> Tensor:
        """The states of the buffer that the next batch comes from, `[n, hidden_size]`, in the order of the texts."""
        return self._states(self._window)[0]

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """States `[batch_size, hidden_size]`, without end; goes on where it was.

        What of a buffer does not fill a batch is left out.

        Raises:
            ValueError: the texts can be read once only and have run out, or a whole pass does not fill a batch.
        """
        fruitless = 0
        while True:
            window = self._window
            states, following = self._states(window)
            order = self._order(window, len(states))
            count = len(states) // batch_size
            if is_sharded(self.extractor.backbone):
                # All have to fill their buffers at the same step, as one can't run the backbone without the others.
                count = min(gather_all(count))
            while self._given < count:
                rows = order[self._given * batch_size : (self._given + 1) * batch_size]
                # Before it is given out: whoever saves the place has trained on all that was given.
                self._given += 1
                fruitless = 0
                yield states[rows]
            self._window, self._given = following, 0
            if following.passes > window.passes:
                fruitless += 1
                if fruitless > 1:
                    raise ValueError(
                        f"a whole pass over the texts of this process gives no batch of {batch_size} hidden states: "
                        "give more texts, a larger buffer_tokens or a smaller batch"
                    )

    def state_dict(self) -> dict[str, int]:
        """The place of this process: a later `load_state_dict` goes on with the very batch that would have come."""
        return {**asdict(self._window), "given": self._given, "processes": processes().num_processes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a place; the texts before it are read again, but not run through the backbone.

        Raises:
            ValueError: it is the place of one of another number of processes.
        """
        if state["processes"] != processes().num_processes:
            raise ValueError(
                f"this is a place in the texts of one of {state['processes']} processes, and there are "
                f"{processes().num_processes}: go on with as many"
            )
        self._window, self._given = _Window(state["passes"], state["texts"]), state["given"]

    def _order(self, window: _Window, count: int) -> Tensor:
        # A sequence of numbers of its own for every buffer: no place in one sequence has to be kept.
        seed = hash((self.seed, processes().process_index, window.passes, window.texts))
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed & (1 << 62) - 1))

    def _states(self, window: _Window) -> tuple[Tensor, _Window]:
        """The states of a buffer, and where the next one begins."""
        if self._held is not None and self._held[0] == window:
            return self._held[1:]
        # Before the next is computed: never two at once.
        self._held = None
        texts = self._texts(window)
        extractor, parts, count, read, ended = self.extractor, [], 0, window.texts, False
        with extractor.in_step.together():
            while count < self.buffer_tokens and not ended:
                prompts, tokens = [], 0
                while tokens < min(_BLOCK_TOKENS, self.buffer_tokens - count):
                    some = list(islice(texts, _TEXTS_AT_ONCE))
                    if not some:
                        ended = True
                        break
                    read += len(some)
                    kept = [text for text in some if not isinstance(text, str) or text.strip()]
                    more = extractor.tokenize(kept) if kept else []
                    prompts += more
                    tokens += sum(len(ids) for ids, _, _ in more)
                if prompts:
                    parts.append(extractor.shard_of(prompts, 0).hidden_states)
                    count += len(parts[-1])
        following = _Window(window.passes + 1) if ended else _Window(window.passes, read)
        self._reading = None if ended else (following, texts)
        states = torch.cat(parts) if parts else torch.empty(0, extractor.hidden_size)
        self._held = (window, states, following)
        return states, following

    def _texts(self, window: _Window) -> Iterator[str]:
        """The texts of this process from there on."""
        if self._reading is not None and self._reading[0] == window:
            return self._reading[1]
        state = processes()
        if not self.is_hf:
            whole = iter(self.dataset)
            if whole is self.dataset and window.passes:
                raise ValueError(
                    "the texts have run out, and an iterator can be read once only: give a list or a dataset, or a "
                    "smaller max_steps"
                )
            return islice(whole, state.process_index + window.texts * state.num_processes, None, state.num_processes)
        import datasets
        from datasets.distributed import split_dataset_by_node

        dataset: Any = self.dataset
        if state.num_processes > 1:
            dataset = split_dataset_by_node(dataset, state.process_index, state.num_processes)
        if isinstance(dataset, datasets.IterableDataset):
            # A streamed dataset that is shuffled has another order in each pass.
            dataset.set_epoch(window.passes)
        rows = iter(dataset.skip(window.texts))
        return (row[self.text_column] for row in rows)
