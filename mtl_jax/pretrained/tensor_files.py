"""The files of a checkpoint directory: its JSON, and its tensors in whichever of the usual files they lie, none read yet.

Safetensors files are opened by the safetensors package, which checks the header: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import functools
import json
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_regular, reason
from mtl_jax.pretrained.family import brief
from mtl_jax.pretrained.lazy_tensor import LazyTensor, map_array
from mtl_jax.pretrained.torch_bin.pickles import open_bin

Location = Path | zipfile.Path
Open = Callable[[Any], dict[str, LazyTensor]]

# The files that may hold a checkpoint's tensors, in order of preference; an index names shards.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

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
MOST_DIMENSIONS = 32
MOST_TENSORS = 100_000
MOST_HEADER = 25_000_000  # bytes, 250 a tensor; parsing the format's own limit of 100 MB takes seconds and 1.5 GB
MOST_JSON = 100_000_000  # bytes
LONGEST_NAME = 255  # bytes of a file's name


def open_tensors(location: Location) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, none of them read yet.

    Args:
        location: The checkpoint's directory; it may lie inside an archive.

    Returns:
        Tensor name -> LazyTensor.

    Raises:
        UserError: The directory has no tensor file, a shard is missing, an index is wrong, or a file is damaged.
    """
    for name in FILES:
        file = location / name
        if file.exists():
            opener: Open = open_safetensors if "safetensors" in name else _open_bin
            return _sharded(location, file, opener) if name.endswith(".json") else opener(file)
    raise UserError(f"{location}: no {', no '.join(FILES)}; a checkpoint must have one of them")


def read_json(location: Location, name: str) -> dict[str, Any]:
    """A JSON object in a checkpoint's directory.

    Raises:
        UserError: It is missing, cannot be read, or is not a JSON object.
    """
    file = location / name
    if not file.exists():
        raise UserError(f"{location}: {name} is missing; a Hugging Face checkpoint directory is needed")
    if isinstance(file, Path):
        check_regular(file)
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_JSON + 1)
        if len(data) > MOST_JSON:
            raise UserError(f"{file}: more than {MOST_JSON} bytes; no such file needs as many")
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({reason(error)})") from error
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object")
    return value


def _sharded(location: Location, index: Location, opener: Open) -> dict[str, LazyTensor]:
    shard_of = read_json(location, index.name).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(f"{index}: weight_map is missing or is not an object of tensor names and files")
    if len(shard_of) > MOST_TENSORS:
        raise UserError(f"{index}: weight_map names {len(shard_of)} tensors, more than any model that is read here has")
    shards: dict[str, dict[str, LazyTensor]] = {}
    for shard in sorted(set(shard_of.values())):
        outside = PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).anchor or "\\" in shard
        unnamed = not PurePosixPath(shard).name or not shard.isprintable() or len(shard.encode()) > LONGEST_NAME
        if outside or ".." in PurePosixPath(shard).parts or unnamed:
            raise UserError(f"{index}: the shard {brief(shard)} is not a file inside its directory; refused")
        if not (location / shard).exists():
            raise UserError(f"{location / shard}: a shard that {index.name} names is missing; fetch it again")
        shards[shard] = opener(location / shard)
    absent = [name for name, shard in shard_of.items() if name not in shards[shard]]
    if absent:
        name, file = brief(absent[0])[1:-1], location / shard_of[absent[0]]
        raise UserError(f"{file}: {name} is not in it, although {index.name} says so; fetch it again")
    return {name: shards[shard][name] for name, shard in shard_of.items()}


def _open_bin(file: Location) -> dict[str, LazyTensor]:
    if not isinstance(file, Path):
        raise UserError(f"{file}: .bin files are not read inside archives; unpack it and pass the directory")
    return open_bin(file)


def open_safetensors(file: Location) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, none of them read yet.

    Args:
        file: A file, or a member of an archive; the latter is read whole.

    Returns:
        Tensor name -> LazyTensor. read() of a file's tensor is a view of a separate mapping.

    Raises:
        UserError: The file cannot be read, is cut short or is not safetensors.
    """
    try:
        tensors = _map_file(file) if isinstance(file, Path) else _unpack_member(file)
    except safetensors.SafetensorError as error:
        raise _damaged(file, "".join(char if char.isprintable() else "?" for char in reason(error))) from error
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)})") from error
    if len(tensors) > MOST_TENSORS:
        raise _damaged(file, f"its header names {len(tensors)} tensors, more than any model that is read here has")
    return tensors


def _map_file(file: Path) -> dict[str, LazyTensor]:
    """Tensors that are mapped when they are read.

    The package's own get_tensor() copies out of a map of the whole file, whose pages stay in memory until the last tensor is
    read; here the package gives names, types and shapes, and where each tensor begins follows: the format has no gaps.
    """
    check_regular(file)
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
    if header_size > MOST_HEADER:
        raise _damaged(file, f"a header of {header_size} bytes")
    tensors: dict[str, LazyTensor] = {}
    offset = 8 + header_size
    with safetensors.safe_open(file, "np") as opened:
        for name in opened.offset_keys():
            entry = opened.get_slice(name)
            shape, dtype = _checked(file, name, entry.get_shape(), entry.get_dtype())
            tensors[name] = LazyTensor(shape, dtype, functools.partial(map_array, file, offset, shape, dtype))
            offset += math.prod(shape) * dtype.itemsize
    return tensors


def _unpack_member(file: zipfile.Path) -> dict[str, LazyTensor]:
    """Tensors of an archive's member, which is compressed and therefore cannot be mapped."""
    data = file.read_bytes()
    if (header_size := int.from_bytes(data[:8], "little")) > MOST_HEADER:
        raise _damaged(file, f"a header of {header_size} bytes")
    tensors: dict[str, LazyTensor] = {}
    for name, entry in safetensors.deserialize(data):
        shape, dtype = _checked(file, name, entry["shape"], entry["dtype"])
        tensors[name] = LazyTensor(shape, dtype, np.frombuffer(entry["data"], dtype).reshape(shape).view)
    return tensors


def _checked(file: Location, name: str, shape: list[int], kind: str) -> tuple[tuple[int, ...], np.dtype]:
    """A tensor's shape and dtype, which NumPy must be able to hold."""
    if kind not in DTYPES:
        raise UserError(f"{file}: {brief(name)[1:-1]} has the type {kind}; known are {', '.join(DTYPES)}")
    # NumPy multiplies the sides of an empty array, too.
    if len(shape) > MOST_DIMENSIONS or math.prod(side or 1 for side in shape) * DTYPES[kind].itemsize >= 2**63:
        raise _damaged(file, f"{brief(name)} has {len(shape)} dimensions, the longest of {max(shape)}")
    return tuple(shape), DTYPES[kind]


def _damaged(file: Location, why: str) -> UserError:
    return UserError(f"{file}: damaged or not safetensors ({why}); fetch it again")
