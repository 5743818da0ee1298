"""Locks on directories that a command writes: a second process with the same target ends with one line that names the first.

A lock is the operating system's (flock, by filelock), so it ends with its process, however that ends. Its file only records
who has it: a file that a killed process left behind blocks nobody.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import reason, writing

log = logging.getLogger(__name__)

NAME = ".lock"
REPORT = ".report.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems without flock
_PAUSE = 0.2  # seconds between two attempts
_ATTEMPTS = 1000  # to create a directory that other processes remove again


class Busy(UserError):
    """Another process has the lock."""


@contextlib.contextmanager
def workdir(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes from training in a workdir. It is created if absent, and removed again if it stays empty.

    Args:
        folder: The workdir.
        patience: Seconds to wait for a process that has locked it.

    Raises:
        Busy: Another process has locked it.
        UserError: It cannot be written.
    """
    with _created(folder), _hold_lock(folder / NAME, folder, "choose another --workdir", patience, creates=True):
        yield


@contextlib.contextmanager
def target(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes from writing a directory that is replaced as a whole; its lock lies beside it.

    Args:
        folder: The directory.
        patience: Seconds to wait for a process that writes it.

    Raises:
        UserError: Another process writes it or trains in it, or its parent directory cannot be written.
    """
    with writing(folder):
        place = folder.resolve()
    with (
        _created(place.parent),
        _hold_lock(place.with_name(f".{place.name}{NAME}"), folder, "choose another directory", patience, creates=True),
    ):
        check_free(folder)
        yield


@contextlib.contextmanager
def report(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes from writing a report into an existing directory, such as the workdir of a running ablation.

    Args:
        folder: The directory.
        patience: Seconds to wait for a process that writes a report there.

    Raises:
        UserError: Another process writes a report there, or the directory cannot be written.
    """
    with _hold_lock(folder / REPORT, folder, "choose another --output", patience):
        yield


def check_free(folder: Path) -> None:
    """Raises UserError if a process trains in a directory that is going to be replaced."""
    if (folder / NAME).exists():
        with _hold_lock(folder / NAME, folder, "choose another directory"):
            pass


def lock(file: BinaryIO, path: Path) -> bool:
    """Locks a file that is open for writing, until it is closed; never waits.

    Args:
        file: The open file.
        path: Its path.

    Returns:
        False if another process has locked it, or has replaced it since it was opened. On a file system without locks the
        result is True, and a warning is logged.

    Raises:
        OSError: It cannot be locked for another reason.
    """
    try:
        if not filelock.lock_descriptor(file.fileno(), blocking=False):
            return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_no_locks(path, error)
    except NotImplementedError as error:
        _warn_no_locks(path, error)
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def open_to_lock(path: Path) -> BinaryIO:
    """Opens a file for reading and writing from its start; creates it if absent, and keeps its content."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _warn_no_locks(path: Path, error: Exception) -> None:
    log.warning("%s: this file system has no locks (%s); write here from one process only", path.parent, reason(error))


@contextlib.contextmanager
def _hold_lock(path: Path, written: Path, advice: str, patience: float = 0.0, creates: bool = False) -> Iterator[None]:
    """Holds a lock while the block runs; its file is removed afterwards. Only if `creates`, an absent directory is created."""
    deadline = time.monotonic() + patience
    with writing(written), contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(_open_in_created(path) if creates else open_to_lock(path))
            if lock(file, path):
                break
            busy = _busy(written, path, advice)
            file.close()
            if time.monotonic() >= deadline:
                raise busy
            time.sleep(_PAUSE)
        stack.callback(_remove, file, path)
        _warn_left_behind(written, _holder(path))
        _write(file)
        opened = stack.pop_all()
    with opened:
        yield


def _open_in_created(path: Path) -> BinaryIO:
    """As open_to_lock(); its directory, which another process may have removed as empty, is created again."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            return open_to_lock(path)
        _make(path.parent)
    return open_to_lock(path)


def _make(folder: Path) -> None:
    """Creates a directory and its parents, while other processes may remove them as empty."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # removed meanwhile, or there is a file
            folder.mkdir(parents=True, exist_ok=True)
            return
    folder.mkdir(parents=True, exist_ok=True)


def _remove(file: BinaryIO, path: Path) -> None:
    """Removes a lock's file before it is closed: a process that has opened it meanwhile sees that it was removed."""
    with contextlib.suppress(OSError):
        if os.path.samestat(
            os.fstat(file.fileno()), path.stat()
        ):  # it may have been deleted and created anew by another process
            path.unlink()


def _write(file: BinaryIO) -> None:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    file.seek(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode() + b"\n")
    file.truncate()
    file.flush()


def _holder(path: Path) -> dict[str, Any]:
    """The process that a lock's file records; {} where it records none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.keys() >= {"pid", "host", "since"} else {}


def _busy(written: Path, path: Path, advice: str) -> Busy:
    holder = _holder(path)
    if not holder:
        return Busy(f"{written}: another process is writing it; let it end, or {advice}")
    line = f"{written}: process {holder['pid']} on {holder['host']} has been writing it since {holder['since']}; let it end, "
    other_host = holder["host"] != socket.gethostname()
    return Busy(line + (f"{advice}, or delete {path} if that host is gone" if other_host else f"or {advice}"))


def _warn_left_behind(written: Path, holder: dict[str, Any]) -> None:
    """Warns of a lock that another host left behind: on some file systems locks hold on one host only."""
    if holder and holder["host"] != socket.gethostname():
        log.warning(
            "%s: process %s on %s began to write it at %s and did not finish; if it is still running, stop this one",
            written,
            holder["pid"],
            holder["host"],
            holder["since"],
        )


@contextlib.contextmanager
def _created(folder: Path) -> Iterator[None]:
    """Creates a directory and its parents; those that it created and that are empty afterwards are removed."""
    with writing(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        _make(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty: it stays
            for path in missing:
                path.rmdir()
