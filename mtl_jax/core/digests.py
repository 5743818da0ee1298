"""SHA-256 of texts, JSON values, files, directories, arrays and trees, in hex.

Checkpoints, caches and unfinished outputs keep these digests, so what each reads, and in which order, must not change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import Path as PathInZip

import jax
import numpy as np

from mtl_jax.core.trees import leaves_of

CHUNK = 1 << 20  # bytes


def of_bytes(data: bytes) -> str:
    """Of bytes."""
    return hashlib.sha256(data).hexdigest()


def of_json(values: Any) -> str:
    """Of JSON values, whatever the order of their keys."""
    return of_bytes(json.dumps(values, sort_keys=True).encode())


def of_file(file: Path | PathInZip) -> str:
    """Of a file's content, which is never held in memory as a whole; the file may be inside an archive."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def of_directory(folder: Path | PathInZip) -> str:
    """Of names and contents of the files in a directory, but no subdirectories and hidden files; also inside an archive."""
    digest = hashlib.sha256()
    entries: Iterable[Any] = folder.iterdir()
    for file in sorted(entries, key=lambda file: str(file.name)):
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"{file.name}\0{of_file(file)}\n".encode())
    return digest.hexdigest()


def of_array(leaf: Any) -> str:
    """Of an array's dtype, shape and bits."""
    array = np.ascontiguousarray(jax.device_get(leaf))
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(array.data)
    return digest.hexdigest()


def of_leaves(tree: Any) -> str:
    """Of the bits of a tree's arrays, in the order of jax.tree.leaves."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def of_tree(tree: Any) -> str:
    """Of the paths, dtypes, shapes and bits of a tree's leaves."""
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves_of(tree).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
