"""Tensors of files that are read, by mapping, only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError


class LazyTensor(NamedTuple):
    """A tensor of a file, read when asked for.

    Attributes:
        shape: Its shape in the file.
        dtype: Its dtype in the file.
        read: Returns the array, of that shape and dtype; a read-only view of the mapped file where possible.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def map_array(file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A part of a file as a read-only array over a separate mapping, which is freed together with the array.

    Args:
        file: The file.
        offset: The byte where the array begins.
        shape: Its shape.
        dtype: Its dtype.

    Raises:
        UserError: The file is gone or shorter than it was.
    """
    if 0 in shape:
        return np.zeros(shape, dtype)
    try:
        return np.memmap(file, dtype, "r", offset, shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: has changed since it was opened ({error}); load it again") from error
