"""The arrays that evaluation works on: their types, the checks that they must pass, and texts by label and group.

Letters in shapes: N texts, L labels (logits), M texts whose group is known.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Groups: TypeAlias = Sequence[str | int | None] | npt.NDArray[Any]


def as_matrix(
    name: str,
    values: npt.ArrayLike,
    *,
    rows: int | None = None,
    columns: int | None = None,
    may_be_empty: bool = False,
) -> FloatArray:
    """`values` as a float64 matrix of finite numbers, or a ValueError that names `name` and what to mend."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {matrix.shape}: pass one row a text or label")
    if not matrix.size and not may_be_empty:
        raise ValueError(f"{name} is empty, shape {matrix.shape}: pass at least one row and one column")
    for wanted, found, what in ((rows, matrix.shape[0], "rows"), (columns, matrix.shape[1], "columns")):
        if wanted is not None and wanted != found:
            raise ValueError(f"{name} must have {wanted} {what} to fit the other arrays, got shape {matrix.shape}")
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} holds NaN or infinite values in {len(bad)} rows (the first is row {bad[0]}): "
            "leave these rows out of every array, or mend what made them"
        )
    return matrix


def _as_integers(name: str, values: npt.ArrayLike) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}: pass one integer a text")
    if array.dtype.kind not in "biu":
        raise ValueError(f"{name} must be integers, got {array.dtype}: number the label names from 0")
    return array.astype(np.int64)


def labels_of(labels: npt.ArrayLike, logits_NL: FloatArray, least: int = 2) -> IntArray:
    """Checked `labels` `[N]` that fit `logits_NL`."""
    labels_N = _as_integers("labels", labels)
    num_texts, num_labels = logits_NL.shape
    if num_labels < least:
        raise ValueError(f"logits must have {least} or more columns, one a label, got shape {logits_NL.shape}")
    if len(labels_N) != num_texts:
        raise ValueError(f"labels must have {num_texts} entries, one a row of logits, got {len(labels_N)}")
    if num_labels > 1 and (labels_N.min() < 0 or labels_N.max() >= num_labels):
        raise ValueError(
            f"labels must lie in 0..{num_labels - 1}, as logits has {num_labels} columns, got "
            f"{labels_N.min()}..{labels_N.max()}: number the labels from 0, or give logits one column a label"
        )
    return labels_N


def group_name(value: Any) -> str | int | None:
    """A plain str or int, or None for an unknown group (None or NaN). Whole floats are what pandas makes of ints."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float) and (np.isnan(value) or value.is_integer()):
        return None if np.isnan(value) else int(value)
    raise ValueError(f"groups must hold names or whole numbers, or None where unknown, got {value!r}: bin it first")


def of_known_group(
    labels: npt.ArrayLike, groups: Groups, values: npt.ArrayLike
) -> tuple[IntArray, IntArray, list[str | int], npt.NDArray[Any]]:
    """The texts whose group is known.

    Returns:
        Their labels `[M]`, group codes `[M]`, the sorted names that the codes number, and their rows of `values`
        (predictions, or a matrix that has been checked).
    """
    labels_N = _as_integers("labels", labels)
    values = np.asarray(values)
    values_N = _as_integers("predictions", values) if values.ndim < 2 else values
    if len(values_N) != len(labels_N):
        raise ValueError(f"predictions must have {len(labels_N)} entries, one a label, got {len(values_N)}")
    if len(groups) != len(labels_N):
        raise ValueError(f"groups must have {len(labels_N)} entries, one a label, got {len(groups)}: None if unknown")
    of_text = [group_name(group) for group in groups]
    names = sorted({name for name in of_text if name is not None}, key=lambda name: (isinstance(name, str), name))
    code_of: dict[str | int | None, int] = {name: code for code, name in enumerate(names)}
    codes_N = np.array([code_of.get(name, -1) for name in of_text], dtype=np.int64)
    known = codes_N >= 0
    return labels_N[known], codes_N[known], names, values_N[known]


def cells(labels: IntArray, codes: IntArray) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
    """(label, group code, mask over rows) of every cell that has a row, in order."""
    for label, code in np.unique(np.stack([labels, codes], axis=1), axis=0):
        yield int(label), int(code), (labels == label) & (codes == code)
