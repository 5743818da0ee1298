"""PyTorch's pytorch_model.bin, read without PyTorch and without running anything in it.

Such a file is a pickle that describes tensors, and the bytes that they are made of. There are two formats.

The zip format (PyTorch 1.6 and later) is a zip archive whose members lie uncompressed below one folder: FOLDER/data.pkl is
the pickle, FOLDER/data/KEY are the bytes of the storage KEY, FOLDER/byteorder says "little" or "big".

The older format is a row of pickles: a magic number, a protocol version, facts about the machine, the description of the
tensors, the list of storage keys. Then, for each key in that order, come a 64-bit number of elements and the elements, always
little-endian.

A storage is a run of elements; a tensor is a view of a storage, given by offset, shape and strides. Several tensors may share
a storage.

Why this is safe: a pickle is a program, but it is not run. The module opcodes interprets it as data and stops at any name that
the module names does not list. A hostile file can only describe tensors: every view is checked against its storage, every
storage against the file, and no tensor may be larger than the whole file.

Opening copies no tensor: each is a view of a mapping of the file. The file must not change while it is in use.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_regular
from mtl_jax.pretrained.lazy_tensor import LazyTensor, map_array
from mtl_jax.pretrained.torch_bin.names import Forbidden, Tensor
from mtl_jax.pretrained.torch_bin.opcodes import Malformed, PickleReader

_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_NESTED = ("state_dict", "model")


def open_bin(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that torch.save wrote from a state dict, in the file's order.

    Args:
        path: The file, in either format. If it holds a dict without tensors that has a dict below "state_dict" or "model", that
            inner dict is read.

    Returns:
        Tensors by name. They are read as read-only views of separate mappings, not always contiguous or aligned.

    Raises:
        UserError: The file is damaged or not a file of tensors, or its pickle names anything but tensors.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{path}: cannot be read ({error})") from error
    try:
        value, starts = _open_zip(path, data) if data[:4] == _ZIP_START else _open_legacy(data)
        tensors = _state_dict(path, value)
        return {name: _lazy(path, len(data), name, tensor, starts) for name, tensor in tensors.items()}
    except Forbidden as error:
        raise UserError(
            f"{path}: its pickle asks for {error}, which no file of tensors needs; nothing of it was run. "
            "Save the state dict alone, or convert the file to safetensors with a tool you trust"
        ) from error
    except Malformed as error:
        raise UserError(
            f"{path}: damaged, or not a PyTorch file of tensors ({error}); fetch it again, or convert it to safetensors"
        ) from error


def _open_zip(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, int]]:
    """The pickle's value, and the byte of the file where each storage begins."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
    # NotImplementedError is what zipfile raises for an archive of a version that it does not know.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise Malformed(f"not a complete zip archive: {error}") from error
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise Malformed(f"{len(pickles)} members are called data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members:
        start, end = _span(data, members[f"{folder}byteorder"])
        if data[start:end] != b"little":
            raise Malformed("its numbers are not little-endian, which is not supported")
    reader = PickleReader(data, *_span(data, members[pickles[0]]))
    value = reader.read()
    starts = {}
    for key, storage in reader.storages.items():
        if f"{folder}data/{key}" not in members:
            raise Malformed(f"the member {f'{folder}data/{key}'!r} is missing")
        start, end = _span(data, members[f"{folder}data/{key}"])
        if storage.size * storage.dtype.itemsize != end - start:
            raise Malformed(f"the storage {key!r} has {end - start} bytes in place of {storage.size} x {storage.dtype}")
        starts[key] = start
    return value, starts


def _span(data: mmap.mmap, info: zipfile.ZipInfo) -> tuple[int, int]:
    """The bytes of the file at which a member begins and ends."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise Malformed(f"the member {info.filename!r} is compressed or encrypted, which is not supported")
    header = info.header_offset
    if not 0 <= header <= len(data) - _LOCAL_HEADER.size:
        raise Malformed(f"the member {info.filename!r} lies outside the file")
    signature, name, extra = _LOCAL_HEADER.unpack_from(data, header)
    start = header + _LOCAL_HEADER.size + name + extra
    if signature != _ZIP_START or start + info.file_size > len(data):
        raise Malformed(f"the member {info.filename!r} lies outside the file")
    return start, start + info.file_size


def _open_legacy(data: mmap.mmap) -> tuple[Any, dict[str, int]]:
    """The pickle's value, and the byte of the file where each storage begins."""
    reader = PickleReader(data, 0, len(data))
    if reader.read() != _MAGIC_NUMBER or reader.read() != _PROTOCOL_VERSION:
        raise Malformed("it does not begin like one")
    reader.read()  # sizes of C types and the byte order of the machine: neither bears on what follows
    value, keys = reader.read(), reader.read()
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != reader.storages.keys():
        raise Malformed("its list of storages differs from those of its tensors")
    starts: dict[str, int] = {}
    position = reader.position
    for key in keys:
        storage, start = reader.storages[key], position + 8
        position = start + storage.size * storage.dtype.itemsize
        if position > len(data):
            raise Malformed(f"the file ends inside the storage {key!r}")
        if data[start - 8 : start] != struct.pack("<q", storage.size):
            raise Malformed(f"the storage {key!r} does not have {storage.size} elements")
        starts[key] = start
    return value, starts


def _state_dict(path: Path, value: Any) -> dict[str, Tensor]:
    """The dict of tensors that the file holds, either itself or below one key of a dict without tensors."""
    if type(value) is dict and not any(type(entry) is Tensor for entry in value.values()):
        nested = [key for key in _NESTED if type(value.get(key)) is dict]
        if len(nested) == 1:
            value = value[nested[0]]
    if type(value) is not dict:
        raise UserError(f"{path}: holds a {type(value).__name__}, not a dict of tensors; save model.state_dict()")
    for name, entry in value.items():
        if type(name) is not str or type(entry) is not Tensor:
            kind = type(entry).__name__
            raise UserError(f"{path}: its entry {str(name)[:200]!r} is a {kind}, not a tensor; save model.state_dict() alone")
    return value


def _lazy(path: Path, length: int, name: str, tensor: Tensor, starts: Mapping[str, int]) -> LazyTensor:
    """The tensor as a view of a separate mapping; checks that it lies inside its storage."""
    size, start = tensor.dtype.itemsize, starts[tensor.storage.key]
    # A stride of 0 repeats elements, so few bytes could be said to be many.
    if math.prod(max(n, 1) for n in tensor.shape) * size > length:
        raise Malformed(f"the tensor {name[:200]!r} of shape {tensor.shape} is larger than the file")
    if 0 in tensor.shape:
        return LazyTensor(tensor.shape, tensor.dtype, functools.partial(np.empty, tensor.shape, tensor.dtype))
    elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if (tensor.offset + elements) * size > tensor.storage.size * tensor.storage.dtype.itemsize:
        raise Malformed(f"the tensor {name[:200]!r} of shape {tensor.shape} reaches beyond its storage")
    # The stride of an axis of length 1 is never used, and may be any number.
    strides = tuple(stride * size if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.strides, strict=True))

    def read() -> np.ndarray:
        base = map_array(path, start + tensor.offset * size, (elements,), tensor.dtype)
        return np.lib.stride_tricks.as_strided(base, tensor.shape, strides, writeable=False)

    return LazyTensor(tensor.shape, tensor.dtype, read)
