"""Output files that survive an interruption: finished items are kept in a journal, and the file itself appears whole.

While OUTPUT is being made, OUTPUT.part holds a JSON line with all that the output depends on, then one line for each finished
item. A process may be killed at any time: an incomplete last line is dropped when the journal is opened again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mtl_jax.core import locks
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import to_json
from mtl_jax.core.json_shapes import Shape, anything, whole

SUFFIX = ".part"
_MARK = "partial"
_MARKED = b'{"partial": true'  # begin of the first line


class _Place(NamedTuple):
    """The first byte of a line of the partial file, and the number of its bytes."""

    start: int
    length: int


class _Items(Mapping[int, Any]):
    """The finished items of an open partial file, by number."""

    def __init__(self, file: BinaryIO):
        self._file, self.places = file, dict[int, _Place]()

    def __getitem__(self, number: int) -> Any:
        place = self.places[number]
        return json.loads(os.pread(self._file.fileno(), place.length, place.start))[1]

    def __contains__(self, number: object) -> bool:
        return number in self.places

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Journal:
    """The partial file of an output, open for adding items.

    Args:
        output: The file to make. An existing file stays until finish().
        made_from: All that the output depends on (input, model, options): JSON values by names that an error can show.
        item: The shape of a finished item. Items from the first that does not fit are made again.

    Attributes:
        done: Finished items by number. Each is read from the file when it is asked for, so that memory holds none of them.

    Raises:
        UserError: The partial file depends on other values, is another kind of file, or cannot be written, or another process
            writes it.
    """

    done: _Items

    def __init__(self, output: Path, made_from: Mapping[str, Any], item: Shape = anything):
        self.output, self.part = output, part_of(output)
        try:
            self._file = _open_locked(self.part)
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror})") from error
        try:
            self.done = self._begin(_line({_MARK: True, **made_from}), item)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, header: bytes, item: Shape) -> _Items:
        """Finds the finished items and cuts off what follows them. A file of another output is not changed."""
        try:
            first = self._file.readline()
            if first and not (first.startswith(_MARKED) and (_is_object(first) or not first.endswith(b"\n"))):
                raise UserError(f"{self.part}: not the partial output of an interrupted command; move it elsewhere")
            done, end = _Items(self._file), len(first)
            for line in self._file:
                if not line.endswith(b"\n"):  # an incomplete last line
                    break
                if first != header:
                    raise UserError(
                        f"{self.part}: the interrupted command that wrote it had other values of {_changes(first, header)}; "
                        "repeat that command to resume it, or delete the file to start anew"
                    )
                number = _number_of_item(line, done, item)
                if number is None:  # after a power failure the rest may be anything
                    break
                done.places[number] = _Place(end, len(line))
                end += len(line)
            self._file.seek(end if done else 0)
            if not done:
                self._file.write(header)
            self._end = self._file.tell()
            self._file.truncate()
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror})") from error
        return done

    def add(self, number: int, item: Any) -> None:
        """Adds a finished item, unless the journal has it already.

        Args:
            number: Its number.
            item: A JSON value.

        Raises:
            UserError: It cannot be written.
        """
        if number in self.done:
            return
        line = _line([number, item])
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror})") from error
        self.done.places[number] = _Place(self._end, len(line))
        self._end += len(line)

    def finish(self, lines: Iterable[str]) -> None:
        """Writes the finished file and removes the partial one.

        Args:
            lines: The file's lines, without line feeds.

        Raises:
            UserError: It cannot be written.
        """
        write_whole(self.output, lines)
        self.close()
        self.part.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the partial file, and removes it if it has no items."""
        with contextlib.suppress(OSError):  # closing repeats a write that failed in add(), which reported it
            self._file.close()
        if not self.done:
            self.part.unlink(missing_ok=True)


def part_of(output: Path) -> Path:
    """The path of the partial file of an output."""
    return output.with_name(output.name + SUFFIX)


def check_writable(output: str, inputs: Iterable[str]) -> Path:
    """Checks before any work that an output file can be written.

    Args:
        output: The file that is going to be written.
        inputs: Files that are read and must not be replaced.

    Returns:
        The path behind links, so that links stay.

    Raises:
        UserError: It cannot be written, or it is one of the inputs.
    """
    path = Path(os.path.realpath(output))
    for file in inputs:
        if Path(os.path.realpath(file)) in (path, part_of(path)):
            raise UserError(f"{output}: the output is the input; give another file")
    try:
        if path.is_dir():
            raise UserError(f"{output}: it is a directory; the output must be a file")
        if not path.parent.is_dir():
            raise UserError(f"{output}: there is no directory {path.parent}; create it first")
        if path.exists() and not path.is_file():
            raise UserError(f"{output}: not a regular file; leave --output out to write to standard output")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{output}: cannot be written (it is read-only)")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    return path


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Writes a file of lines whole or not at all.

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


def _open_locked(part: Path) -> BinaryIO:
    """Opens the file, which is created if absent, and locks it until it is closed."""
    file = locks.open_to_lock(part)
    try:
        if not locks.lock(file, part):
            raise UserError(f"{part}: another process is writing this output; let it end, or give another output")
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


def _number_of_item(line: bytes, done: _Items, shape: Shape) -> int | None:
    """The number of a new item, by its line; None where the line is not one."""
    try:
        number, item = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    return None if whole(number) or number < 0 or number in done or shape(item) else number


def _changes(old_header: bytes, new_header: bytes) -> str:
    """The fields in which two headers differ, with their values where these are short."""
    old, new = json.loads(old_header), json.loads(new_header)
    fields = []
    for name in (name for name in {**old, **new} if old.get(name) != new.get(name)):
        values = [json.dumps(header.get(name), ensure_ascii=False) for header in (old, new)]
        short = all(len(value) < 40 for value in values)
        fields.append(f"{name} ({values[0]} then, {values[1]} now)" if short else name)
    return ", ".join(fields)
