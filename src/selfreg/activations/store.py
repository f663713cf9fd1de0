"""ActivationStore: the hidden states of every token of a set of texts, on disk, resumable.

A folder of `manifest.json` and `shard-00000.safetensors`, ... A shard holds whole texts, in order:
    hidden_states [tokens, hidden_size], text_ids [tokens], positions [tokens] (in the prompt), token_ids [tokens],
    and for pooling="cls" also cls_states [texts, hidden_size].
The manifest lists the shards once all are on disk, in the order of the texts, whichever process wrote them; until
then each says itself what it holds (see `writer`), so that a killed extraction goes on with what is missing.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfreg.activations.prompt import Pooling, check_choice
from selfreg.activations.rows import RowReader
from selfreg.activations.spec import HiddenStateSpec
from selfreg.utils.files import atomic_path, current_umask, read_json

MANIFEST = "manifest.json"
SHARDS = "shard-{:05d}.safetensors"
FORMAT_VERSION = 1


class StoreShard(NamedTuple):
    """The tokens of a run of whole texts.

    Attributes:
        first_text (`int`), end_text (`int`): the texts are `first_text .. end_text - 1`.
        hidden_states (`[tokens, hidden_size]`).
        text_ids, positions, token_ids (`[tokens]`, int32).
        cls_states (`[texts, hidden_size]`, *optional*).
        full_texts (`int`): texts that fill the length of a prompt, and may have lost their end.
    """

    first_text: int
    end_text: int
    hidden_states: Tensor
    text_ids: Tensor
    positions: Tensor
    token_ids: Tensor
    cls_states: Tensor | None = None
    full_texts: int = 0


class StatesBatch(Sequence[dict[str, Tensor]]):
    """Rows of a store as any collator takes them; one that knows of it takes the whole at once.

    Attributes:
        hidden_states (`[rows, hidden_size]`).
    """

    def __init__(self, hidden_states: Tensor) -> None:
        self.hidden_states = hidden_states

    def __len__(self) -> int:
        return len(self.hidden_states)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> "StatesBatch": ...
    def __getitem__(self, index: int | slice) -> "dict[str, Tensor] | StatesBatch":
        states = self.hidden_states[index]
        return StatesBatch(states) if isinstance(index, slice) else {"hidden_states": states}


class ActivationStore:
    """Reads a folder that `HiddenStateExtractor.extract` wrote. Rows are tokens: `store[i]["hidden_states"]`.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the store is not whole, or of a newer format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / MANIFEST).exists():
            raise FileNotFoundError(f"there is no activation store in {self.path} (no {MANIFEST})")
        self.manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        if self.manifest["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"the store in {self.path} has format {self.manifest['format_version']}, this selfreg reads up to "
                f"{FORMAT_VERSION}: upgrade selfreg"
            )
        if not self.manifest["complete"]:
            done = len(list(self.path.glob(SHARDS.replace("{:05d}", "*"))))
            raise ValueError(
                f"the store in {self.path} is not whole: {done} shards of {self.manifest['num_texts']} texts are "
                "there; call extract() with the same texts again to go on"
            )
        self.spec = HiddenStateSpec.from_dict(self.manifest["spec"])
        self.text_fingerprint: str = self.manifest["text_fingerprint"]
        self.num_texts: int = self.manifest["num_texts"]
        self.num_full: int = sum(shard.get("full_texts", 0) for shard in self.manifest["shards"])
        self._offsets = np.cumsum([0, *(shard["tokens"] for shard in self.manifest["shards"])])
        self._rows = RowReader("hidden_states")

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    def __len__(self) -> int:
        return self.num_tokens

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, {self.num_tokens:,} tokens of {self.num_texts:,} texts)"

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"token {index} of a store with {len(self)}")
        return {"hidden_states": self.gather([index % len(self)])[0]}

    def __getitems__(self, indices: Sequence[int]) -> "StatesBatch":
        # The name torch's DataLoader looks for: one gather for a whole batch, many times faster than row by row.
        return StatesBatch(self.gather(indices))

    def gather(self, indices: Sequence[int]) -> Tensor:
        """The states of the tokens `indices`, `[len(indices), hidden_size]`, float32.

        Raises:
            ValueError: a state holds a value that is not finite; names the shard and the row.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        order = np.argsort(wanted, kind="stable")
        rising = wanted[order]
        out = torch.empty(len(wanted), self.hidden_size)
        # Where each shard's rows begin among them.
        borders = np.searchsorted(rising, self._offsets)
        for shard in np.flatnonzero(np.diff(borders)).tolist():
            part = slice(borders[shard], borders[shard + 1])
            states = self._rows.read(self._shard_path(shard), rising[part] - self._offsets[shard])
            out[torch.from_numpy(order[part])] = states.float()
        # The sum of all is not finite where one is not, and costs a tenth of looking at each.
        if not torch.isfinite(out.sum()):
            self._name_broken_state(wanted, out)
        return out

    def _name_broken_state(self, wanted: NDArray[np.int64], states: Tensor) -> None:
        broken = (~torch.isfinite(states)).any(dim=1).nonzero().flatten()
        if len(broken) == 0:
            # Large, but finite: only their sum was not.
            return
        row = int(wanted[int(broken[0])])
        shard = int(np.searchsorted(self._offsets, row, side="right")) - 1
        entry = self.manifest["shards"][shard]
        raise ValueError(
            f"a hidden state is not finite: row {row - int(self._offsets[shard])} of {self.path / entry['file']} "
            f"(texts {entry['first_text']} to {entry['end_text'] - 1}); look at the text and the backbone's dtype, "
            "and extract the store again with overwrite=True"
        )

    def shards(self, part: slice = slice(None)) -> Iterator[StoreShard]:
        """The shards in order, one in memory at a time; with `part`, only these of them."""
        for shard in range(len(self.manifest["shards"]))[part]:
            entry = self.manifest["shards"][shard]
            with self._open(shard) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            yield StoreShard(entry["first_text"], entry["end_text"], **tensors)

    def pool(self, pooling: Pooling) -> Tensor:
        """One state a text, `[num_texts, hidden_size]`, float32. See `pool_hidden_states`.

        Raises:
            ValueError: `"cls"` of a store that was extracted for another pooling.
        """
        check_choice("pooling", pooling, Pooling)
        out = torch.empty(self.num_texts, self.hidden_size)
        for shard in self.shards():
            out[shard.first_text : shard.end_text] = pool_shard(shard, shard.hidden_states.float(), pooling)
        return out

    def shard_rows(self) -> list[range]:
        """Which rows lie in which shard."""
        return [range(int(first), int(end)) for first, end in pairwise(self._offsets)]

    def expect(self, shard: int) -> None:
        """Says that the rows of a shard are about to be gathered: the system then reads it from the disk in one go."""
        self._rows.expect(self._shard_path(shard))

    def _shard_path(self, shard: int) -> Path:
        name = self.manifest["shards"][shard]["file"]
        path = self.path / name
        if not path.exists():
            raise FileNotFoundError(f"the store in {self.path} has lost {name}: extract it again with overwrite=True")
        return path

    def _open(self, shard: int) -> Any:
        path = self._shard_path(shard)
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): extract the store again with overwrite=True") from error


def pool_shard(shard: StoreShard, hidden_states: Tensor, pooling: Pooling) -> Tensor:
    """Pools `hidden_states [tokens, D]`, which belong to the tokens of `shard`, to `[texts of the shard, D]`.

    Any per-token quantity can be pooled so; for `"cls"` it is the shard's own cls_states that count.
    """
    texts = shard.text_ids.long() - shard.first_text
    num_texts = shard.end_text - shard.first_text
    if pooling == "cls":
        if shard.cls_states is None:
            raise ValueError("the store holds no cls states: extract it with an extractor whose pooling is 'cls'")
        return shard.cls_states.float()
    counts = torch.bincount(texts, minlength=num_texts)
    if pooling == "last":
        return hidden_states[counts.cumsum(0) - 1]
    sums = torch.zeros(num_texts, hidden_states.shape[1]).index_add_(0, texts, hidden_states)
    return sums / counts.unsqueeze(1)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`save_file`, atomic, with a full disk told as the OSError that it is."""
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            code = errno.ENOSPC if "StorageFull" in str(error) or "No space" in str(error) else errno.EIO
            raise OSError(code, str(error)) from error
        # safetensors makes files private to the user; a store is shared like any other new file.
        temporary.chmod(0o666 & ~current_umask())
