"""Files that are read only where they are files, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mtl_jax.errors import UserError


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
        UserError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be written ({reason(error)}){'; ' + advice if advice else ''}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all: a process that is killed, or a full disk, leaves the file that was there.

    Raises:
        UserError: It cannot be written. Nothing is left beside it.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o644)  # temporary files are for their owner alone
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def reason(error: BaseException) -> str:
    """The first line of what went wrong, short."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def shown(path: str | Path) -> str:
    """A path as error lines print it: the middle of a very long one is left out."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"
