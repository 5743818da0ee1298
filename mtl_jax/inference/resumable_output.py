"""An output file that is made bit by bit: what is done is kept beside it, and the file itself appears whole.

While OUTPUT is being made, OUTPUT.part holds one JSON line that says what it is made from, then one for each finished item. A
process may be killed at any time: a line that was not written to its end is dropped when the file is opened again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from mtl_jax.core import locks
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import to_json
from mtl_jax.core.json_shapes import Shape, anything, whole
from mtl_jax.pretrained.tensor_files import Location

SUFFIX = ".part"
_MARK = "partial"
_MARKED = b'{"partial": true'  # how the first line begins
_CHUNK = 1 << 20


class Journal:
    """The partial file of an output, opened.

    Args:
        output: The file to make. What is there stays until finish().
        made_from: What decides the result, by names that an error can show: the input, the model, every option. JSON values.
        item: What is wrong with a finished item as it was read, "" where nothing is. Items from the first wrong one on are
            made again.

    Attributes:
        done: Finished items, by their number.

    Raises:
        UserError: The partial file was made from something else, is another kind of file, cannot be written, or another process
            writes it now.
    """

    done: dict[int, Any]

    def __init__(self, output: Path, made_from: Mapping[str, Any], item: Shape = anything):
        self.output, self.part = output, part_of(output)
        try:
            self._file = _opened(self.part)
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror})") from error
        try:
            self.done = self._begin(_line({_MARK: True, **made_from}), item)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, header: bytes, item: Shape) -> dict[int, Any]:
        """The items that are there; what follows them is cut off, and nothing is changed if the file is not this output's."""
        try:
            found = self._file.read()
            lines = found.split(b"\n")[:-1]  # what follows the last line feed was not written to its end
            if found and not (found.startswith(_MARKED) and all(map(_is_object, lines[:1]))):
                raise UserError(f"{self.part}: in the way, and not what an interrupted command left; move it elsewhere")
            if len(lines) > 1 and lines[0] + b"\n" != header:
                raise UserError(
                    f"{self.part}: an interrupted command left it that had other values of {_changes(lines[0], header)}; "
                    "repeat that command to go on, or delete the file to begin anew"
                )
            done = _items(lines[1:], item)
            kept = lines[: 1 + len(done)] if done else [header[:-1]]
            self._file.seek(0)
            self._file.write(b"".join(line + b"\n" for line in kept))
            self._file.truncate()
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror})") from error
        return done

    def add(self, number: int, item: Any) -> None:
        """Keeps a finished item, unless it is there already.

        Args:
            number: Its number.
            item: A JSON value.

        Raises:
            UserError: It cannot be written.
        """
        if number in self.done:
            return
        try:
            self._file.write(_line([number, item]))
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror})") from error
        self.done[number] = item

    def finish(self, lines: Iterable[str]) -> None:
        """Puts the finished file in its place and takes the partial one away.

        Args:
            lines: The file's lines, without line feeds.

        Raises:
            UserError: It cannot be written.
        """
        write_whole(self.output, lines)
        self.close()
        self.part.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the partial file, which stays if anything is in it."""
        with contextlib.suppress(OSError):  # closing tries once more what add() could not write, and told
            self._file.close()
        if not self.done:
            self.part.unlink(missing_ok=True)


def part_of(output: Path) -> Path:
    """Where the partial file of an output lies."""
    return output.with_name(output.name + SUFFIX)


def check_writable(output: str, inputs: Iterable[str]) -> Path:
    """Whether a file can be written, found out before any work.

    Args:
        output: The file that is going to be made.
        inputs: Files that are read and must not be lost.

    Returns:
        Its path, links followed: they stay links.

    Raises:
        UserError: It cannot be, or it is one of the inputs.
    """
    path = Path(os.path.realpath(output))
    for taken in inputs:
        if Path(os.path.realpath(taken)) in (path, part_of(path)):
            raise UserError(f"{output}: the output is the input; give another file")
    try:
        if path.is_dir():
            raise UserError(f"{output}: a directory; the output must be a file")
        if not path.parent.is_dir():
            raise UserError(f"{output}: there is no directory {path.parent}; make it first")
        if path.exists() and not path.is_file():
            raise UserError(f"{output}: no ordinary file; leave --output out to write to standard output")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{output}: cannot be written (it is read-only)")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    return path


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Writes a file of lines beside its place and then moves it there.

    Raises:
        UserError: It cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            staging.chmod(path.stat().st_mode)
        staging.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        staging.unlink(missing_ok=True)


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_of_directory(location: Location) -> str:
    """SHA-256 over the names and contents of the files of a directory, which may lie inside an archive; its own level only."""
    total = hashlib.sha256()
    files: list[Location] = list(location.iterdir())
    for file in sorted(files, key=lambda file: file.name):
        if not file.is_file() or file.name.startswith("."):
            continue
        own = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                own.update(chunk)
        total.update(f"{file.name}\0{own.hexdigest()}\n".encode())
    return total.hexdigest()


def digest_of_arrays(tree: Any) -> str:
    """SHA-256 over the bytes of the arrays of a tree."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def _opened(part: Path) -> BinaryIO:
    """The file, made if it is not there, and this process's own until it is closed."""
    file = locks.open_to_lock(part)
    try:
        if not locks.lock(file, part):
            raise UserError(f"{part}: another process is writing this output now; let it end, or give another output")
    except BaseException:
        file.close()
        raise
    return file


def _line(value: Any) -> bytes:
    return (to_json(value, ensure_ascii=False) + "\n").encode()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _items(lines: list[bytes], shape: Shape) -> dict[int, Any]:
    """Items by number, up to the first line that is not one: a disk that lost power may hold anything from there on."""
    done: dict[int, Any] = {}
    for line in lines:
        try:
            number, item = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            break
        if whole(number) or number < 0 or number in done or shape(item):
            break
        done[number] = item
    return done


def _changes(before: bytes, now: bytes) -> str:
    """What differs between two headers; short values are shown."""
    old, new = json.loads(before), json.loads(now)
    shown = []
    for name in (name for name in {**old, **new} if old.get(name) != new.get(name)):
        values = [json.dumps(one.get(name), ensure_ascii=False) for one in (old, new)]
        short = all(len(value) < 40 for value in values)
        shown.append(f"{name} ({values[0]} then, {values[1]} now)" if short else name)
    return ", ".join(shown)
