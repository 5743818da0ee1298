"""The tensors of a checkpoint directory, in whichever of the usual files they lie."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_regular, reason
from mtl_jax.pretrained.family import brief
from mtl_jax.pretrained.lazy_tensor import LazyTensor
from mtl_jax.pretrained.safetensors_file import MOST_TENSORS, open_safetensors
from mtl_jax.pretrained.torch_bin.pickles import open_bin

Location = Path | zipfile.Path
MOST_JSON = 100_000_000  # bytes
LONGEST_NAME = 255  # bytes of a file's name
Open = Callable[[Any], dict[str, LazyTensor]]


def _open_bin(file: Location) -> dict[str, LazyTensor]:
    if not isinstance(file, Path):
        raise UserError(f"{file}: .bin files are not read inside archives; unpack it and pass the directory")
    return open_bin(file)


# Looked for in this order; what opens the file, or each shard that an index names.
FILES: tuple[tuple[str, Open], ...] = (
    ("model.safetensors", open_safetensors),
    ("model.safetensors.index.json", open_safetensors),
    ("pytorch_model.bin", _open_bin),
    ("pytorch_model.bin.index.json", _open_bin),
)


def open_tensors(location: Location) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, none of them read yet.

    Args:
        location: The checkpoint's directory; it may lie inside an archive.

    Returns:
        Tensor name -> LazyTensor.

    Raises:
        UserError: There is no such file, a shard is missing, an index is wrong, or a file is damaged.
    """
    for name, opener in FILES:
        file = location / name
        if file.exists():
            return _sharded(location, file, opener) if name.endswith(".json") else opener(file)
    raise UserError(f"{location}: no {', no '.join(name for name, _ in FILES)}; a checkpoint has one of them")


def read_json(location: Location, name: str) -> dict[str, Any]:
    """A JSON object in a checkpoint's directory.

    Raises:
        UserError: It is not there, or is no JSON object.
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
            raise UserError(f"{file}: more than {MOST_JSON} bytes, which no such file needs")
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
        raise UserError(f"{index}: weight_map is missing or is no object of tensor names and files")
    if len(shard_of) > MOST_TENSORS:
        raise UserError(f"{index}: weight_map names {len(shard_of)} tensors, more than any model that is read here has")
    shards: dict[str, dict[str, LazyTensor]] = {}
    for shard in sorted(set(shard_of.values())):
        outside = PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).anchor or "\\" in shard
        unnamed = not PurePosixPath(shard).name or not shard.isprintable() or len(shard.encode()) > LONGEST_NAME
        if outside or ".." in PurePosixPath(shard).parts or unnamed:
            raise UserError(f"{index}: the shard {brief(shard)} is not a file inside its directory; refused")
        if not (location / shard).exists():
            raise UserError(f"{location / shard}: the shard is missing that {index.name} names; fetch it again")
        shards[shard] = opener(location / shard)
    lost = [name for name, shard in shard_of.items() if name not in shards[shard]]
    if lost:
        name, file = brief(lost[0])[1:-1], location / shard_of[lost[0]]
        raise UserError(f"{file}: {name} is not in it, though {index.name} says so; fetch it again")
    return {name: shards[shard][name] for name, shard in shard_of.items()}
