"""What an SAE is trained and measured on: batches of hidden states from a store or any dataset that holds them."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from selfreg.activations.store import ActivationStore, StatesBatch
from selfreg.activations.streaming import StreamingActivations
from selfreg.sae.configuration import SAEConfig
from selfreg.utils.processes import gather_over, largest_over, one_batch, together


class StatesDataset(Protocol):
    """A map-style dataset whose rows hold `hidden_states` `[hidden_size]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def gather_states(dataset: StatesDataset, indices: Sequence[int]) -> Tensor:
    """The states of the rows `indices`, `[len(indices), hidden_size]`.

    Raises:
        ValueError: a state holds a value that is not finite; names the row.
    """
    if isinstance(dataset, ActivationStore):
        return dataset.gather(indices)
    states = collate_states([dataset[int(index)] for index in indices])["hidden_states"]
    broken = (~torch.isfinite(states)).flatten(1).any(dim=1).nonzero().flatten()
    if len(broken):
        raise ValueError(f"row {int(indices[int(broken[0])])} of the dataset holds a hidden state that is not finite")
    return states


def collate_states(rows: Sequence[Any]) -> dict[str, Tensor]:
    """A batch from rows, or from a `StatesBatch`.

    Raises:
        ValueError: the rows hold no `hidden_states`.
    """
    if isinstance(rows, StatesBatch):
        return {"hidden_states": rows.hidden_states}
    if not rows or "hidden_states" not in rows[0]:
        held = ", ".join(sorted(rows[0])) if rows else "nothing"
        raise ValueError(f"an SAE is trained on rows with 'hidden_states'; these hold {held}")
    return {"hidden_states": torch.stack([torch.as_tensor(row["hidden_states"]) for row in rows])}


def iterate_states(dataset: StatesDataset, chunk: int = 8192, part: slice = slice(None)) -> Iterator[Tensor]:
    """All states in order, `chunk` at a time; with `part`, only these of the chunks."""
    for start in range(0, len(dataset), chunk)[part]:
        yield gather_states(dataset, range(start, min(start + chunk, len(dataset))))


def sample_states(dataset: StatesDataset, size: int) -> Tensor:
    """Up to `size` states, spread evenly over the dataset."""
    count = min(size, len(dataset))
    # In integers: float32 can't tell the last of 20 million rows from one past it.
    rows = torch.arange(count) * (len(dataset) - 1) // max(count - 1, 1)
    return gather_states(dataset, rows.tolist())


def sample_of(dataset: "StatesDataset | StreamingActivations", size: int) -> Tensor:
    """Up to `size` states that stand for all, the same in every process; of a stream, those of the first buffers."""
    if not isinstance(dataset, StreamingActivations):
        return sample_states(dataset, size)
    states = dataset.current_states()
    with one_batch():
        # As many from each process.
        count = min(size // together(), -int(largest_over(torch.tensor(-len(states)))))
        if count < 1:
            raise ValueError("the stream gives no hidden state: there are no texts with content")
        return gather_over(states[torch.arange(count) * (len(states) - 1) // max(count - 1, 1)])


def states_width(dataset: StatesDataset) -> int:
    return gather_states(dataset, [0]).shape[-1]


def check_states(config: SAEConfig, dataset: "StatesDataset | StreamingActivations") -> None:
    """Raises ValueError where an SAE can't take the states of a dataset."""
    if isinstance(dataset, StreamingActivations):
        spec = config.hidden_state_spec()
        if spec is not None:
            spec.check_features_fit(dataset.spec, "the SAE", "the stream")
        _check_width(config, dataset.spec.hidden_size)
        return
    if len(dataset) == 0:
        raise ValueError("the dataset of hidden states is empty")
    if isinstance(dataset, ActivationStore):
        spec = config.hidden_state_spec()
        if spec is not None:
            spec.check_features_fit(dataset.spec, "the SAE", f"the store {dataset.path}")
    _check_width(config, states_width(dataset))


def _check_width(config: SAEConfig, width: int) -> None:
    if width != config.hidden_size:
        raise ValueError(f"the SAE takes hidden states of width {config.hidden_size}, the dataset holds {width}")
