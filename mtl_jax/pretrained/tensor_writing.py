"""Safetensors files, written one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


class Writable(Protocol):
    """A float32 tensor to write, whose numbers are asked for when they are written."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""

    @property
    def size(self) -> int:
        """Its bytes in the file."""

    def data(self) -> np.ndarray:
        """The numbers, in the file's shape."""


class Saved(NamedTuple):
    """One tensor to write: our array, and whether it is transposed in the file."""

    array: Any
    transpose: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[::-1] if self.transpose else self.array.shape

    @property
    def size(self) -> int:
        return 4 * math.prod(self.shape)

    def data(self) -> np.ndarray:
        array = np.asarray(jax.device_get(self.array), np.float32)
        return np.ascontiguousarray(array.T if self.transpose else array)


def write_safetensors(file: Path, tensors: Mapping[str, Writable], metadata: Mapping[str, str] | None = None) -> None:
    """Writes float32 tensors one at a time, so that a sharded tree is never whole on the host.

    The safetensors package writes the same bytes, but wants every tensor of a file in the host's memory at once.

    Args:
        file: The file to write.
        tensors: {name: tensor}.
        metadata: Further texts for the file's header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}  # transformers refuses a file without it
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            stream.write(tensor.data().astype("<f4", copy=False).data)
