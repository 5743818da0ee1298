"""The names that a file of PyTorch tensors may use, and the inert records that stand for them.

Nothing of PyTorch is imported. A listed name is a pair of strings; a call of one of CALLS checks its untrusted arguments and
returns a dict or a Tensor record. No bytes of a tensor are read: a Storage says where they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {
    ("torch", name): np.dtype(dtype)
    for name, dtype in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": jnp.bfloat16,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
    }.items()
}
STORAGES = {
    ("torch", "DoubleStorage"): DTYPES["torch", "float64"],
    ("torch", "FloatStorage"): DTYPES["torch", "float32"],
    ("torch", "HalfStorage"): DTYPES["torch", "float16"],
    ("torch", "BFloat16Storage"): DTYPES["torch", "bfloat16"],
    ("torch", "LongStorage"): DTYPES["torch", "int64"],
    ("torch", "IntStorage"): DTYPES["torch", "int32"],
    ("torch", "ShortStorage"): DTYPES["torch", "int16"],
    ("torch", "CharStorage"): DTYPES["torch", "int8"],
    ("torch", "ByteStorage"): DTYPES["torch", "uint8"],
    ("torch", "BoolStorage"): DTYPES["torch", "bool"],
    ("torch.storage", "UntypedStorage"): DTYPES["torch", "uint8"],
}
KEY_TYPES = (str, bytes, int, float, bool, type(None))  # hashing these takes neither long nor much stack


class Forbidden(Exception):
    """The pickle asks for something that no file of tensors needs. The message names it."""


@dataclasses.dataclass(frozen=True)
class Global:
    """A listed name: two strings, not the object with that name."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of elements in the file.

    Attributes:
        key: Its name in the file.
        dtype: Dtype of its elements.
        size: Number of its elements.
    """

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count elements of dtype."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


def resolve(module: Any, name: Any) -> Global:
    """The record for a name.

    Raises:
        Forbidden: The name is not listed.
        ValueError: It is not a pair of strings.
    """
    if type(module) is not str or type(name) is not str:
        raise ValueError("a name that is not a text")
    if (module, name) in CALLS or (module, name) in STORAGES or (module, name) in DTYPES:
        return Global(module, name)
    raise Forbidden(repr(f"{module}.{name}"[:200]))


def call(called: Any, arguments: Any) -> Any:
    """The result of calling a listed name.

    Raises:
        Forbidden: It is not one of CALLS.
        ValueError: The arguments are not those that PyTorch writes.
        KeyError: A dtype is not listed.
        IndexError: Arguments are missing.
    """
    if type(arguments) is not tuple:
        raise ValueError("a call without a tuple of arguments")
    if type(called) is not Global:
        raise Forbidden("a call of a value")
    if (called.module, called.name) not in CALLS:
        raise Forbidden(f"a call of {called.module}.{called.name}")
    return CALLS[called.module, called.name](arguments)


def storage(reference: Any) -> Storage:
    """The storage that a persistent id refers to.

    It is ("storage", type, key, device, elements), in the older format with None after them.

    Raises:
        Forbidden: It is a view of a storage.
        ValueError: It is not such a tuple.
    """
    if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
        raise ValueError("a reference that is not a storage")
    kind, key, size = reference[1], reference[2], reference[4]
    if type(kind) is not Global or (kind.module, kind.name) not in STORAGES or type(key) is not str or not _is_size(size):
        raise ValueError("a storage without type, key or size")
    if len(reference) == 6 and reference[5] is not None:
        raise Forbidden("a view of a storage, as PyTorch before 0.4 wrote it")
    return Storage(key, STORAGES[kind.module, kind.name], size)


def insert(target: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    """Puts items into a dict.

    Raises:
        ValueError: A key is of a type that is not in KEY_TYPES.
    """
    for key, value in items:
        if type(key) not in KEY_TYPES:
            raise ValueError(f"a {type(key).__name__} as a key")
        target[key] = value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    if arguments:
        (pairs,) = arguments  # Python 2 passes a list of [key, value]
        if type(pairs) is not list or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError("an OrderedDict of something other than pairs")
        insert(result, [(key, value) for key, value in pairs])
    return result


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """(storage, offset, shape, strides[, requires_grad, hooks[, metadata]])"""
    source, offset, shape, strides, *rest = arguments
    if type(source) is not Storage:
        raise ValueError("a tensor without a storage")
    return _checked(Tensor(source, offset, shape, strides, source.dtype), rest[2:])


def _tensor_with_dtype(arguments: tuple[Any, ...]) -> Tensor:
    """(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])"""
    source, offset, shape, strides, _, _, dtype, *rest = arguments
    if type(source) is not Storage or type(dtype) is not Global:
        raise ValueError("a tensor without a storage or a dtype")
    return _checked(Tensor(source, offset, shape, strides, DTYPES[dtype.module, dtype.name]), rest)


def _checked(tensor: Tensor, metadata: list[Any]) -> Tensor:
    if not all(type(sizes) is tuple and all(map(_is_size, sizes)) for sizes in (tensor.shape, tensor.strides)):
        raise ValueError("a tensor whose shape and strides are not sizes")
    if not _is_size(tensor.offset) or len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 32:
        raise ValueError("a tensor whose offset, shape and strides do not fit together")
    if any(metadata):
        raise Forbidden("a tensor that is stored negated or conjugated")
    return tensor


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    """(tensor, requires_grad, hooks[, attributes])"""
    if type(arguments[0]) is not Tensor:
        raise ValueError("a parameter without a tensor")
    return arguments[0]


CALLS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
