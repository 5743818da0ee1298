"""GGUF files: their fields and their tensors in float32, read by the gguf package, an extra of this one.

GGUF is the format of llama.cpp: a header of fields, the tokenizer among them, and tensors whose numbers are quantised in
blocks. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_regular, reason
from mtl_jax.pretrained.lazy_tensor import LazyTensor

CHUNK = 1 << 22  # numbers that are computed at once


class GgufFile(NamedTuple):
    """An open file.

    Attributes:
        fields: Its fields by name.
        tensors: Its tensors by llama.cpp's names, none of them read yet; float32, in the shapes of PyTorch's.
        types: The number of tensors of each block type, such as Q4_K.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    types: Mapping[str, int]


def check_installed(path: str) -> None:
    """Raises UserError where the gguf package is missing.

    Args:
        path: The file to read, for the message.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: needs the package gguf, which is not installed; pip install 'mtl_jax[gguf]'") from error


def open_gguf(file: Path) -> GgufFile:
    """Opens a file; its tensors are mapped, its fields are read.

    Raises:
        UserError: The gguf package is missing, or the file cannot be read or is damaged.
    """
    check_installed(str(file))
    from gguf import GGUFReader

    check_regular(file)
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package checks little, and what it raises for a damaged file is anything
        raise UserError(f"{file}: cannot be read, or damaged or not GGUF ({reason(error)})") from error
    tensors: dict[str, LazyTensor] = {}
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        shape = tuple(int(side) for side in reversed(tensor.shape))
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        tensors[str(tensor.name)] = _lazy(file, str(tensor.name), tensor.data, tensor.tensor_type, shape)
    return GgufFile(fields, tensors, types)


def _lazy(file: Path, name: str, data: np.ndarray, kind: Any, shape: tuple[int, ...]) -> LazyTensor:
    def read() -> np.ndarray:
        from gguf.quants import dequantize

        rows = data.reshape(-1, data.shape[-1])
        values = np.empty((len(rows), shape[-1]), np.float32)
        step = max(1, CHUNK // max(1, shape[-1]))
        try:
            for start in range(0, len(rows), step):
                values[start : start + step] = dequantize(rows[start : start + step], kind)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{file}: the tensor {name} of type {kind.name} cannot be read ({reason(error)})") from error
        return values.reshape(shape)

    if math.prod(shape) == 0:
        raise UserError(f"{file}: the tensor {name} is empty")
    return LazyTensor(shape, np.dtype(np.float32), read)
