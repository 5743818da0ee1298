"""Arrays kept on disk under a hash of all that they depend on: token ids, features.

An entry is a directory FOLDER/KEY of .npy files with manifest.json: their sizes and SHA-256. It is written beside its place
and renamed there, whole, so neither a killed process nor two at once leave half an entry. Entries may be deleted while
no run reads them: worker processes open them anew.
"""

from __future__ import annotations

import contextlib
import hashlib
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

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PART = ".part"  # ends the name of an entry that is being written
ABANDONED = 24 * 3600  # seconds after which such an entry is taken for one whose process was killed


def load(folder: Path, name: str, what: str) -> dict[str, np.ndarray] | None:
    """The arrays of an entry, memory-mapped; None where there is none. A damaged one is set aside and logged.

    Args:
        folder: The cache.
        name: Name of the entry.
        what: What the cache is of, for the log: token, feature.
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
    except FileNotFoundError:  # deleted, or set aside by another process, while we looked
        return None
    except OSError as error:
        log.warning("%s: cannot read the %s cache (%s)", entry, what, error.strerror or error)
        return None
    log.warning("%s: %s; set aside as %s, and what it held is made anew", entry, problem, aside.name)
    return None


def store(folder: Path, name: str, arrays: dict[str, np.ndarray], about: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
    """Writes an entry. What cannot be written is logged, not an error.

    Args:
        folder: The cache; made if it is not there.
        name: Name of the entry: a hash of all that decides the arrays' bits.
        arrays: {file name without .npy: array}.
        about: JSON-able; for people who look into the entry.
        what: As for load().

    Returns:
        The arrays, memory-mapped from the entry; the same as given where it cannot be written.
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
            files[file] = {"bytes": (part / f"{file}.npy").stat().st_size, "sha256": _sha256(part / f"{file}.npy")}
        (part / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=2) + "\n", encoding="utf-8")
        try:
            _rename(part, entry)
        except FileExistsError:  # another process was first; or a damaged entry could not be moved away
            return load(folder, name, what) or arrays
        return _open(entry, files)
    except OSError as error:
        log.warning("%s: cannot write the %s cache (%s); the next run makes it again", folder, what, error.strerror or error)
        return arrays
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Plain:
    """A file that numpy takes for something else: into files it writes by C, and does not notice that the disk is full."""

    def __init__(self, file: BinaryIO):
        self.write = file.write


def _rename(part: Path, entry: Path) -> None:
    """Raises FileExistsError where another process has finished the same entry first."""
    try:
        part.rename(entry)
    except OSError as error:
        if entry.exists():
            raise FileExistsError(entry) from error
        raise


def _open(entry: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}


def _files(entry: Path) -> dict[str, tuple[int, str]]:
    """{file name without .npy: (bytes, SHA-256)} as the manifest has it; empty where it is missing or not readable."""
    try:
        files = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: (about["bytes"], about["sha256"]) for name, about in files.items()}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _problem(entry: Path, files: Mapping[str, tuple[int, str]]) -> str:
    """What is wrong with an entry, "" where nothing is."""
    if not files:
        return f"{MANIFEST} is missing or not readable"
    for name, (expected, sha256) in files.items():
        file = entry / f"{name}.npy"
        size = file.stat().st_size if file.exists() else 0
        if size != expected:
            return f"{file.name} has {size} bytes instead of {expected}"
        if _sha256(file) != sha256:
            return f"the SHA-256 of {file.name} is another"
    return ""


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sweep(folder: Path) -> None:
    """Removes what killed processes left."""
    for part in folder.glob(f"*{PART}"):
        with contextlib.suppress(FileNotFoundError):  # its process has just finished it
            if time.time() - part.stat().st_mtime > ABANDONED:
                shutil.rmtree(part, ignore_errors=True)
