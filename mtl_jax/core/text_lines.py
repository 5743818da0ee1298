"""Text files as commands read and print them: UTF-8, with one text or one JSON object on each line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import writing

STANDARD_INPUT = STANDARD_OUTPUT = "-"


def read_bytes(file: str) -> bytes:
    """The bytes of a file, or of standard input for "-".

    Raises:
        UserError: The file cannot be read.
    """
    if file == STANDARD_INPUT and sys.stdin is None:
        raise UserError("standard input is closed; give a text, or --file")
    try:
        return sys.stdin.buffer.read() if file == STANDARD_INPUT else Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


@contextlib.contextmanager
def opened_twice(file: str) -> Iterator[BinaryIO]:
    """A file, or standard input for "-", that can be read from its start again; a pipe is copied to a temporary file.

    Raises:
        UserError: The file cannot be read, or there is no room for the copy.
    """
    if file == STANDARD_INPUT and sys.stdin is None:
        raise UserError("standard input is closed; give a text, or --file")
    with contextlib.ExitStack() as stack:
        try:
            stream: BinaryIO = sys.stdin.buffer if file == STANDARD_INPUT else stack.enter_context(open(file, "rb"))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error
        if file == STANDARD_INPUT or not stream.seekable():
            with writing(f"{file}: its temporary copy"):
                copy = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stream, copy)
                copy.seek(0)
            stream = copy
        yield stream


def print_lines(lines: Iterable[str]) -> None:
    """Writes lines to standard output, as UTF-8.

    Raises:
        UserError: They cannot be written: the disk is full, or the program that reads them has ended.
    """
    with _printing():
        sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())


def flush_output() -> None:
    """Flushes standard output.

    Raises:
        UserError: As in print_lines().
    """
    with _printing():
        pass


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # Python flushes once more when it exits; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"standard output: cannot be written ({error.strerror})") from error


def lines_of(data: bytes, file: str) -> list[str]:
    """The lines of a file, without their ends (a line feed, with or without a carriage return) and without a byte order mark.

    Args:
        data: The file's bytes.
        file: Its name, for errors.

    Raises:
        UserError: It is not UTF-8; the message names the line.
    """
    return list(read_lines(io.BytesIO(data), file))


def read_lines(stream: BinaryIO, file: str) -> Iterator[str]:
    """As lines_of(), one after another from an open file."""
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number}: not UTF-8 ({error.reason})") from error
        yield text.removesuffix("\n").removesuffix("\r")


def check_unicode(text: str, where: str) -> None:
    """Raises UserError if a text has half a character, which JSON can spell and UTF-8 cannot; `where` begins its line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: no valid Unicode ({error.object[error.start]!r} is half a character)") from error


def object_of(line: str, where: str) -> dict[str, Any]:
    """Parses a line that must be a JSON object.

    Args:
        line: The line.
        where: Its file and number, for errors.

    Raises:
        UserError: It is not JSON, or not an object.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UserError(f"{where}: {not_by_line(line) or f'not JSON ({error})'}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {not_by_line(line) or f'a JSON object is needed, not {kind_of(value)}'}")
    return value


def not_by_line(first: str) -> str:
    """The fault of a file that is one JSON value (an array, or an object over several lines), by its first line.

    Returns:
        The fault and what to do; "" where the file may have an object on each line.
    """
    text, advice = first.strip(), "a .jsonl file has one JSON object on each line: convert it, for example by jq -c"
    if text.startswith("[") and (text[1:].lstrip()[:1] in ("", "{") or not text.endswith("]")):
        return f"the file is a JSON array, and {advice} '.[]'"
    if text.startswith("{") and text.endswith(("{", "[", ",", ":")):
        return f"the object does not end on its line, and {advice} ."
    return ""


def as_list(values: Any, name: str, of: str = "texts") -> list[Any]:
    """The values as a list; an iterator is read once.

    Args:
        values: An argument.
        name: Its name, for the error.
        of: What it must be a list of.

    Raises:
        UserError: They are one text, one row, or nothing that can be read one by one.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{name} is {kind_of(values)}; it must be a list of {of}")
    return list(values)


def kind_of(value: Any) -> str:
    """The kind of a value in the words of JSON, for errors: null, true, false, a number, a text, a list, an object."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    for kinds, name in (((int, float), "a number"), (str, "a text"), ((list, tuple), "a list"), (dict, "an object")):
        if isinstance(value, kinds):
            return name
    return f"a Python {type(value).__name__}"
