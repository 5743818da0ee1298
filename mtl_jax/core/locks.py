"""Locks on what a command writes: a second process that would write the same ends with one line that names the first.

A lock is the operating system's (flock, by filelock), so it ends with its process, however that ends. What its file holds only
says who has it: a file that a killed process left behind keeps nobody out.
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


@contextlib.contextmanager
def workdir(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a workdir. It is made if need be, and taken away again if it stays empty.

    Raises:
        UserError: Another process has it, or it cannot be written.
    """
    with _made(folder), _held(folder / NAME, folder, "choose another --workdir"):
        yield


@contextlib.contextmanager
def target(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing a directory that is put in its place whole: its lock lies beside it.

    Raises:
        UserError: Another process writes it or trains in it, or the directory that it lies in cannot be written.
    """
    with writing(folder):
        place = folder.resolve()
    with _made(place.parent), _held(place.with_name(f".{place.name}{NAME}"), folder, "choose another directory"):
        check_free(folder)
        yield


@contextlib.contextmanager
def report(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes from writing a report into a directory that is there; it may be the workdir of a running ablation.

    Args:
        folder: The directory.
        patience: For how many seconds to wait for a process that writes one.

    Raises:
        UserError: Another process writes one, or the directory cannot be written.
    """
    with _held(folder / REPORT, folder, "choose another --output", patience):
        yield


def check_free(folder: Path) -> None:
    """Raises UserError where a process trains in a directory, which is going to be replaced."""
    if (folder / NAME).exists():
        with _held(folder / NAME, folder, "choose another directory"):
            pass


def lock(file: BinaryIO, path: Path) -> bool:
    """Locks a file that was opened to be written, until it is closed; never waits.

    Args:
        file: The file.
        path: Where it was opened.

    Returns:
        False where another process has locked it, or has put another file in its place since it was opened. A file system
        without locks is said to be one in a line, and counts as locked.

    Raises:
        OSError: It cannot be locked for another reason.
    """
    try:
        if not filelock.lock_descriptor(file.fileno(), blocking=False):
            return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say_no_locks(path, error)
    except NotImplementedError as error:
        _say_no_locks(path, error)
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def open_to_lock(path: Path) -> BinaryIO:
    """A file for reading and writing from its start, made if it is not there; nothing in it is lost."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _say_no_locks(path: Path, error: Exception) -> None:
    log.warning(
        "%s: this file system has no locks (%s): see to it that no second process writes here", path.parent, reason(error)
    )


@contextlib.contextmanager
def _held(path: Path, what: Path, advice: str, patience: float = 0.0) -> Iterator[None]:
    """Holds a lock while the block runs; its file is gone afterwards."""
    until = time.monotonic() + patience
    with writing(what), contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open_to_lock(path))
            if lock(file, path):
                break
            busy = _busy(what, path, advice)
            file.close()
            if time.monotonic() >= until:
                raise busy
            time.sleep(_PAUSE)
        stack.callback(_take_away, file, path)
        _say_left(what, _holder(path))
        _write(file)
        opened = stack.pop_all()
    with opened:
        yield


def _take_away(file: BinaryIO, path: Path) -> None:
    """Removes the file of a lock before it is closed: who has opened it in the meantime finds that it is not there."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # it may have been deleted, and be another's now
            path.unlink()


def _write(file: BinaryIO) -> None:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    file.seek(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode() + b"\n")
    file.truncate()
    file.flush()


def _holder(path: Path) -> dict[str, Any]:
    """What a lock's file says of its process; {} where it says nothing."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() >= {"pid", "host", "since"} else {}


def _busy(what: Path, path: Path, advice: str) -> UserError:
    holder = _holder(path)
    if not holder:
        return UserError(f"{what}: another process is writing it; let it end, or {advice}")
    line = f"{what}: process {holder['pid']} on {holder['host']} has been writing it since {holder['since']}; let it end, "
    elsewhere = holder["host"] != socket.gethostname()
    return UserError(line + (f"{advice}, or delete {path} if that host is gone" if elsewhere else f"or {advice}"))


def _say_left(what: Path, holder: dict[str, Any]) -> None:
    """Says who was here last, if that was on another host: there are file systems whose locks hold on one host only."""
    if holder and holder["host"] != socket.gethostname():
        log.warning(
            "%s: process %s on %s began to write it at %s and did not end in good order; if it is still at work, stop this one",
            what,
            holder["pid"],
            holder["host"],
            holder["since"],
        )


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a directory and those above it; of those that it made, the ones that are empty afterwards are gone."""
    with writing(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty: it is wanted
            for path in missing:
                path.rmdir()
