"""Arrays of different length in one flat array."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike


class Ragged(Sequence[np.ndarray]):
    """Arrays of different length, end to end in one flat array; item i is a view of it.

    Memory-mapped flat arrays stay on disk. If the object is pickled for another process, that process maps the same file and
    gets no copy.

    Attributes:
        values: [total, ...], the arrays one after another.
        starts: i64[N + 1]; array i is values[starts[i] : starts[i + 1]].
    """

    def __init__(self, values: np.ndarray, starts: np.ndarray):
        self._files = _file(values), _file(starts)
        # Plain arrays over the same memory: a view of a np.memmap costs several times as much.
        self.values = np.asarray(values)
        self.starts = np.asarray(starts)

    @classmethod
    def of(cls, arrays: Iterable[Any], dtype: DTypeLike, shape: tuple[int, ...] = ()) -> Ragged:
        """One Ragged from arrays of shape [length, *shape], which are copied.

        Args:
            arrays: Any number of them, empty ones included.
            dtype: The dtype of the result.
            shape: Their shape after the first axis.
        """
        parts = [np.asarray(array, dtype).reshape(-1, *shape) for array in arrays]
        values = np.concatenate(parts) if parts else np.empty((0, *shape), dtype)
        return cls(values, starts_of([len(part) for part in parts]))

    @property
    def lengths(self) -> np.ndarray:
        """i64[N], the length of each array."""
        return np.diff(self.starts)

    def equals(self, other: Ragged) -> bool:
        """Whether both have the same arrays in the same dtype."""
        same = self.values.dtype == other.values.dtype and self.values.shape == other.values.shape
        return same and np.array_equal(self.starts, other.starts) and np.array_equal(self.values, other.values)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Ragged:
        if isinstance(index, slice):
            first, end, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a slice of a Ragged must have step 1")
            starts = self.starts[first : max(first, end) + 1]
            return Ragged(self.values[starts[0] : starts[-1]], starts - starts[0])
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)} arrays")
        index %= len(self)
        return self.values[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        starts = self.starts.tolist()
        return (self.values[start:end] for start, end in itertools.pairwise(starts))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, tuple(file or array for file, array in zip(self._files, (self.values, self.starts), strict=True))


def starts_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """i64[N + 1]: where arrays of these lengths start, end to end."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _file(array: np.ndarray) -> str:
    """The .npy file of a memory-mapped array; "" for any other array, and for a part of a mapped one."""
    return str(array.filename) if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) else ""


def _reopen(*arrays: np.ndarray | str) -> Ragged:
    return Ragged(*(np.load(a, mmap_mode="r", allow_pickle=False) if isinstance(a, str) else a for a in arrays))
