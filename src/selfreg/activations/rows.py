"""Rows of the tensors of safetensors files, read one by one.

Read rather than mapped: every page of a mapping that was touched counts as memory of the process, which would grow
with the store until all of it is in.
"""

import json
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_MOST_OPEN = 128


class _Rows(NamedTuple):
    descriptor: int
    start: int
    dtype: torch.dtype
    width: int


class RowReader:
    """Reads rows of one tensor `[rows, width]` of files, and keeps the files that were read last open.

    Args:
        name: of the tensor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._open: OrderedDict[Path, _Rows] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        # Another process has to open them for itself.
        return {"name": self.name, "_open": OrderedDict()}

    def __del__(self) -> None:
        for rows in self._open.values():
            os.close(rows.descriptor)

    def read(self, path: Path, wanted: NDArray[np.int64]) -> Tensor:
        """The rows `wanted`, rising, `[len(wanted), width]`, in the dtype of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a whole safetensors file.
        """
        rows = self._rows(path)
        out = torch.empty(len(wanted), rows.width, dtype=rows.dtype)
        view = memoryview(out.view(torch.uint8).numpy().data).cast("B")
        size = rows.width * rows.dtype.itemsize
        # Rows that follow one another are read at once.
        firsts = np.flatnonzero(np.diff(wanted, prepend=wanted[0] - 2) != 1)
        for first, end in zip(firsts.tolist(), [*firsts[1:].tolist(), len(wanted)], strict=True):
            _read_into(rows.descriptor, view[first * size : end * size], rows.start + int(wanted[first]) * size, path)
        return out

    def expect(self, path: Path) -> None:
        """Tells the system that all of a file is about to be read, so that it reads it in one go."""
        if sys.platform == "linux":
            os.posix_fadvise(self._rows(path).descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def _rows(self, path: Path) -> _Rows:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            rows = self._header(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        self._open[path] = rows
        if len(self._open) > _MOST_OPEN:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return rows

    def _header(self, descriptor: int, path: Path) -> _Rows:
        size = bytearray(8)
        _read_into(descriptor, memoryview(size), 0, path)
        length = int.from_bytes(size, "little")
        if length > os.fstat(descriptor).st_size:
            raise _damaged(path)
        text = bytearray(length)
        _read_into(descriptor, memoryview(text), 8, path)
        try:
            entry = json.loads(text)[self.name]
        except (ValueError, KeyError) as error:
            raise _damaged(path) from error
        return _Rows(descriptor, 8 + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]], entry["shape"][1])


def _read_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    while view:
        if sys.platform == "win32":
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(view))
            count = len(data)
            view[:count] = data
        else:
            count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise _damaged(path)
        view, offset = view[count:], offset + count


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: extract the store again with overwrite=True")
