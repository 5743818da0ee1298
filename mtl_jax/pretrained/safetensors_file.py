"""Reading safetensors files: header checked, tensors mapped one at a time.

Source: https://huggingface.co/docs/safetensors - 8 bytes of little-endian header length, the header as JSON, then the
tensors without gaps. Read here rather than by the package's numpy functions: those know no bfloat16 and read a file whole.
"""

from __future__ import annotations

import functools
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_regular, reason
from mtl_jax.pretrained.family import brief
from mtl_jax.pretrained.lazy_tensor import LazyTensor, map_array

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MOST_SIDES = 32  # dimensions of a tensor
MOST_TENSORS = 100_000
MOST_HEADER = 100_000_000  # bytes; the format's own limit


def open_safetensors(file: Path | zipfile.Path) -> dict[str, LazyTensor]:
    """The tensors of a file, none of them read yet.

    Args:
        file: A file, or a member of an archive; the latter is read whole.

    Returns:
        Tensor name -> LazyTensor. read() of a file's tensor is a view of a mapping of its own.

    Raises:
        UserError: The file cannot be read, is cut short or is not safetensors.
    """
    if isinstance(file, Path):
        check_regular(file)
    try:
        if isinstance(file, Path):
            size = file.stat().st_size
            with file.open("rb") as stream:
                begin = _header_end(stream.read(8), size, file)
                header = stream.read(begin - 8)
            whole = None
        else:
            whole = file.read_bytes()
            size = len(whole)
            begin = _header_end(whole[:8], size, file)
            header = whole[8:begin]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    tensors: dict[str, LazyTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in _parse(header, file).items():
        if name == "__metadata__":
            continue
        shape, dtype, start, end = _entry(name, entry, file)
        spans.append((start, end, name))
        if isinstance(file, Path):
            read = functools.partial(map_array, file, begin + start, shape, dtype)
        else:
            assert whole is not None
            read = functools.partial(_view, whole, begin + start, shape, dtype)
        tensors[name] = LazyTensor(shape, dtype, read)
    _check_spans(spans, size - begin, file)
    return tensors


def _damaged(file: Any, why: str) -> UserError:
    return UserError(f"{file}: damaged or not safetensors ({why}); fetch it again")


def _header_end(head: bytes, size: int, file: Any) -> int:
    if len(head) < 8:
        raise _damaged(file, f"only {size} bytes long")
    length = int.from_bytes(head, "little")
    if not 2 <= length <= MOST_HEADER or 8 + length > size:
        raise _damaged(file, f"a header of {length} bytes in a file of {size}")
    return 8 + length


def _parse(header: bytes, file: Any) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError("a name occurs twice in its header")
        return dict(pairs)

    if (count := header.count(b'"dtype"')) > MOST_TENSORS:
        raise _damaged(file, f"its header names {count} tensors, more than any model that is read here has")
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON: {reason(error)}") from error
    if not isinstance(parsed, dict):
        raise _damaged(file, "its header is no JSON object")
    return parsed


def _entry(name: str, entry: Any, file: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    def whole(numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)

    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        raise _damaged(file, f"the header's entry for {brief(name)} lacks shape or data_offsets")
    if len(entry["shape"]) > MOST_SIDES:
        raise _damaged(file, f"{brief(name)} has {len(entry['shape'])} dimensions")
    if len(entry["data_offsets"]) != 2:
        raise _damaged(file, f"data_offsets of {brief(name)} are not two numbers")
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        kind = brief(entry.get("dtype"))
        raise UserError(f"{file}: {brief(name)[1:-1]} has the type {kind}; known are {', '.join(DTYPES)}")
    shape, dtype, (start, end) = tuple(entry["shape"]), DTYPES[entry["dtype"]], entry["data_offsets"]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise _damaged(file, f"{brief(name)[1:-1]} of shape {shape} and type {entry['dtype']} takes {end - start} bytes")
    return shape, dtype, start, end


def _check_spans(spans: list[tuple[int, int, str]], size: int, file: Any) -> None:
    """Tensors cover the data once, without gaps."""
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise _damaged(file, f"{brief(name)[1:-1]} begins at byte {start} of the data, where {at} is due")
        at = end
    if at != size:
        raise _damaged(file, f"its header speaks of {at} bytes of data, there are {size}")


def _view(whole: bytes, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(whole, dtype, math.prod(shape), offset).reshape(shape)
