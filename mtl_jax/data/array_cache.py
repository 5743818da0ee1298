"""A cache of arrays on disk under a hash of everything that they depend on: token ids, features.

An entry is a directory FOLDER/KEY of .npy files with manifest.json: their sizes and SHA-256. It is written under another name
and then renamed, so that neither a killed process nor two processes at once leave half an entry. Entries may be deleted while
no run uses them: worker processes open them again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mtl_jax.core import digests

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PART = ".part"  # suffix of an entry that is being written
ABANDONED = 24 * 3600  # age in seconds at which such an entry belongs to a killed process


def load(folder: Path, name: str, what: str) -> dict[str, np.ndarray] | None:
    """The arrays of an entry, memory-mapped; None if there is no entry. A damaged one is renamed and logged.

    Args:
        folder: The cache.
        name: Name of the entry.
        what: The cache's contents, for the log: "token" or "feature".
    """
    entry = folder / name
    try:
        if not entry.exists():
            return None
        files = _files(entry)
        problem = _problem(entry, files)
        if not problem:
            return _open(entry, files)
        aside = entry.with_name(f"{name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        entry.rename(aside)
    except FileNotFoundError:  # another process has deleted or renamed it in the meantime
        return None
    except OSError as error:
        log.warning("%s: cannot read the %s cache (%s)", entry, what, error.strerror or error)
        return None
    log.warning("%s: %s; renamed to %s, and its arrays are computed again", entry, problem, aside.name)
    return None


def store(folder: Path, name: str, arrays: dict[str, np.ndarray], about: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
    """Writes an entry; a failure to write is logged and is not an error.

    Args:
        folder: The cache; created if it does not exist.
        name: Name of the entry: a hash of everything that the arrays depend on.
        arrays: {file name without .npy: array}.
        about: JSON-able facts for a person who inspects the entry.
        what: As for load().

    Returns:
        The arrays, memory-mapped from the entry; the given ones if it cannot be written.
    """
    entry, part = folder / name, folder / f"{name}.{os.getpid()}-{secrets.token_hex(4)}{PART}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        part.mkdir()
        files = {}
        for file, array in arrays.items():
            with (part / f"{file}.npy").open("wb") as opened:
                np.save(_Plain(opened), array, allow_pickle=False)
            files[file] = {"bytes": (part / f"{file}.npy").stat().st_size, "sha256": digests.of_file(part / f"{file}.npy")}
        (part / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=2) + "\n", encoding="utf-8")
        try:
            _rename(part, entry)
        except FileExistsError:  # another process was first; or a damaged entry could not be moved away
            return load(folder, name, what) or arrays
        return _open(entry, files)
    except OSError as error:
        log.warning("%s: cannot write the %s cache (%s); the next run computes it again", folder, what, error.strerror or error)
        return arrays
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Plain:
    """A file that numpy writes through Python: into plain files it writes by C, and does not notice that the disk is full."""

    def __init__(self, file: BinaryIO):
        self.write = file.write


def _rename(part: Path, entry: Path) -> None:
    """Raises FileExistsError if another process has finished the same entry first."""
    try:
        part.rename(entry)
    except OSError as error:
        if entry.exists():
            raise FileExistsError(entry) from error
        raise


def _open(entry: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}


def _files(entry: Path) -> dict[str, tuple[int, str]]:
    """{file name without .npy: (bytes, SHA-256)} from the manifest; empty if it is missing or cannot be read."""
    try:
        files = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: (about["bytes"], about["sha256"]) for name, about in files.items()}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _problem(entry: Path, files: Mapping[str, tuple[int, str]]) -> str:
    """The reason why an entry is damaged, "" if it is not."""
    if not files:
        return f"{MANIFEST} is missing or not readable"
    for name, (expected, sha256) in files.items():
        file = entry / f"{name}.npy"
        size = file.stat().st_size if file.exists() else 0
        if size != expected:
            return f"{file.name} has {size} bytes instead of {expected}"
        if digests.of_file(file) != sha256:
            return f"the SHA-256 of {file.name} has changed"
    return ""


def _sweep(folder: Path) -> None:
    """Removes unfinished entries of killed processes."""
    for part in folder.glob(f"*{PART}"):
        with contextlib.suppress(FileNotFoundError):  # its process has just finished it
            if time.time() - part.stat().st_mtime > ABANDONED:
                shutil.rmtree(part, ignore_errors=True)
