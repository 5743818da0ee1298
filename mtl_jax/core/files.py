"""Files: read only if they are regular files, written whole or not at all; and JSON that every reader accepts."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_jax.core.errors import UserError

INFINITIES = {"inf": math.inf, "-inf": -math.inf}  # JSON has no infinities: they are written as texts
_CONSTANTS = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}  # written by earlier versions
# Errors by which a system refuses to write. Others, such as a missing file, are mistakes of the program.
_REFUSALS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENODEV", "ESTALE", "EMFILE", "ENFILE", "EPIPE")
REFUSALS = frozenset(getattr(errno, name) for name in _REFUSALS if hasattr(errno, name))
_PIECE = 2**30  # bytes; several files, because a limit on the length of one file does not limit all together
_OS_ERROR = re.compile(r"\bos error:? (\d+)", re.IGNORECASE)  # the form in messages of tensorstore and Rust


def check_regular(path: str | Path) -> None:
    """Refuses anything but a regular file, or a link to one, before it is opened: a pipe or a device may never end.

    Raises:
        UserError: The path is a directory, a pipe, a device or a socket, does not exist, or cannot be inspected.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(f"{shown(path)}: cannot be read ({reason(error)})") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise UserError(f"{shown(path)}: not a regular file ({kind})")


def expanded(path: str) -> Path:
    """A path with "~" or "~USER" replaced by the home directory.

    Raises:
        UserError: The user or the home directory is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{shown(path)}: the home directory {shown(Path(path).parts[0])!r} is unknown; write the whole path"
        ) from error


def exists(path: Path) -> bool:
    """Whether a path exists.

    Raises:
        UserError: That is not known: a name is too long, or a directory may not be read.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(f"{shown(path)}: cannot be read ({reason(error)})") from error
    return True


@contextlib.contextmanager
def writing(path: str | Path, advice: str = "") -> Iterator[None]:
    """Turns an operating system's refusal to write, such as a full disk, into one line.

    Args:
        path: The path that is written, for the message.
        advice: Advice to the user, put after the reason.

    Raises:
        UserError: The block raised an OSError, or an exception whose cause or text is a system's refusal to write.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as caught:
        # Libraries in other languages, such as tokenizers and tensorstore, raise exceptions of their own for it.
        error = caught if isinstance(caught, OSError) else refusal(caught)
        if error is None:
            raise
        raise UserError(f"{shown(path)}: cannot be written ({reason(error)}){'; ' + advice if advice else ''}") from caught


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all: if the process is killed or the disk is full, the previous file stays.

    Raises:
        UserError: It cannot be written. No temporary file is left.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, as write_text() does.

    Raises:
        UserError: It cannot be written. No temporary file is left.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o644)  # only the owner may read a temporary file
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def check_room(folder: Path, size: int) -> None:
    """Checks beforehand that files of so many bytes can be written, without writing them.

    Blocks are allocated as for a real file and freed at once, so quotas count. Where the system cannot allocate, the free space
    that it reports is compared.

    Args:
        folder: The directory to write into.
        size: Bytes of all files together.

    Raises:
        OSError: The system's refusal.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    with tempfile.TemporaryDirectory(prefix=".room.", dir=folder) as room:
        for number, first in enumerate(range(0, size, _PIECE)):
            with open(os.path.join(room, str(number)), "wb") as file:
                file.write(b"\0")
                file.flush()
                length = ctypes.c_int64(min(_PIECE, size - first))
                if fallocate is None or fallocate(file.fileno(), 0, ctypes.c_int64(0), length) == 0:
                    continue
                if ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if fallocate is None and shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as strict JSON, whole or not at all; see to_json().

    Raises:
        UserError: It cannot be written.
    """
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None, *, ensure_ascii: bool = True) -> str:
    """Strict JSON: NaN becomes null, infinities become "inf" and "-inf"."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """Parses JSON, strict or as json.dumps writes it: constants outside JSON become the values that to_json() writes for them.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, parse_constant=_CONSTANTS.__getitem__)


def number_of(value: Any) -> float:
    """The number behind a value that to_json() wrote: null is NaN, "inf" and "-inf" are infinities."""
    return math.nan if value is None else INFINITIES[value] if isinstance(value, str) else value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {name: _finite(element) for name, element in value.items()}
    return [_finite(element) for element in value] if isinstance(value, (list, tuple)) else value


def refusal(error: BaseException) -> OSError | None:
    """The system's refusal to write that an exception is, has as its cause, or names in its text; None if there is none."""
    visited: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or current in visited:
            continue
        visited.append(current)
        if isinstance(current, OSError) and current.errno in REFUSALS:
            return current
        number = _OS_ERROR.search(str(current))
        if number and int(number[1]) in REFUSALS:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        group = current.exceptions if isinstance(current, BaseExceptionGroup) else ()
        waiting += [*group, current.__cause__, current.__context__]
    return None


def reason(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def shown(path: str | Path) -> str:
    """A path for an error line; the middle of a very long one is left out."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"
