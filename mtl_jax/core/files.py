"""Files that are read only where they are files, and written whole or not at all; JSON as every reader takes it."""

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

INFINITIES = {"inf": math.inf, "-inf": -math.inf}  # JSON has none: they are texts
_CONSTANTS = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}  # as earlier versions wrote them
# A system's refusals to write. Others, such as a file that is not there, are a program's mistakes.
_REFUSALS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENODEV", "ESTALE", "EMFILE", "ENFILE", "EPIPE")
REFUSALS = frozenset(getattr(errno, name) for name in _REFUSALS if hasattr(errno, name))
_PIECE = 2**30  # bytes of a file: a limit on the length of one is not one on all of them
_OS_ERROR = re.compile(r"\bos error:? (\d+)", re.IGNORECASE)  # as tensorstore and Rust put it into the text


def check_regular(path: str | Path) -> None:
    """Refuses what is not a regular file, or a link to one, before it is opened: a pipe or a device may never end.

    Raises:
        UserError: The path is a directory, a pipe, a device or a socket, does not exist, or cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(f"{shown(path)}: cannot be read ({reason(error)})") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise UserError(f"{shown(path)}: not a regular file ({kind})")


def expanded(path: str) -> Path:
    """A path with the home directory in the place of "~" or "~USER".

    Raises:
        UserError: There is no such user, or it is unknown where the home directory is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{shown(path)}: there is no home directory {shown(Path(path).parts[0])!r}; write the path out"
        ) from error


def exists(path: Path) -> bool:
    """Whether there is anything at a path.

    Raises:
        UserError: That cannot be found out: a name is too long, or a directory may not be looked into.
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
        path: What is written, for the message.
        advice: What to do, put after the reason.

    Raises:
        UserError: The block raised an OSError, or what stems from or tells of a system's refusal.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as caught:
        # Libraries of other languages, such as tokenizers and tensorstore, have kinds of their own for it.
        error = caught if isinstance(caught, OSError) else refusal(caught)
        if error is None:
            raise
        raise UserError(f"{shown(path)}: cannot be written ({reason(error)}){'; ' + advice if advice else ''}") from caught


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all: a process that is killed, or a full disk, leaves the file that was there.

    Raises:
        UserError: It cannot be written. Nothing is left beside it.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, as write_text() does.

    Raises:
        UserError: It cannot be written. Nothing is left beside it.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o644)  # temporary files are for their owner alone
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def check_room(folder: Path, size: int) -> None:
    """Finds out, before anything is begun, whether files of so many bytes can be written; no byte of them is.

    Blocks are asked for as for a real file and given back at once, so that quotas count; where the system has no such call,
    what it says to be free is compared.

    Args:
        folder: Where.
        size: Bytes in all.

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
    """The inverse of json.dumps, strict or not: constants that JSON does not have become what to_json() makes of them.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, parse_constant=_CONSTANTS.__getitem__)


def number_of(value: Any) -> float:
    """A number as to_json() wrote it: null is NaN, "inf" and "-inf" are infinities."""
    return math.nan if value is None else INFINITIES[value] if isinstance(value, str) else value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def refusal(error: BaseException) -> OSError | None:
    """The system's refusal to write that an exception is, stems from, or tells of in its text; None: it is something else."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or each in seen:
            continue
        seen.append(each)
        if isinstance(each, OSError) and each.errno in REFUSALS:
            return each
        told = _OS_ERROR.search(str(each))
        if told and int(told[1]) in REFUSALS:
            return OSError(int(told[1]), os.strerror(int(told[1])))
        waiting += [*(each.exceptions if isinstance(each, BaseExceptionGroup) else ()), each.__cause__, each.__context__]
    return None


def reason(error: BaseException) -> str:
    """The first line of what went wrong, short."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def shown(path: str | Path) -> str:
    """A path as error lines print it: the middle of a very long one is left out."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"
