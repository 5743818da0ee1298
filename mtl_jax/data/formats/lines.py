"""Lines of text files, plain or gzip, one at a time: neither a whole file nor an endless line is in memory."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mtl_jax.core import assets
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_regular, reason, shown

# No text for a sentence model is as long as this: a longer line means lost line ends, or a file that is not text.
MAX_LINE_BYTES = 1_000_000


class Line(NamedTuple):
    """One line: its number from 1, its text, and its error if it cannot be read."""

    number: int
    text: str
    error: UserError | None


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file that a path names (see assets.locate), unpacked where the name ends in .gz.

    Raises:
        UserError: The file does not exist, is a directory or cannot be read; also raised while it is being read.
    """
    file = assets.locate(path)
    if file.is_dir():
        raise UserError(f"{shown(path)}: a directory; a source needs a file")
    if isinstance(file, Path):
        check_regular(file)
    try:
        with file.open("rb") as raw:
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield unpacked  # type: ignore[misc]  # GzipFile is a BinaryIO in all but name
            else:
                yield raw  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{shown(path)}: cannot be read ({reason(error)})") from error


def lines(path: str, *, keep_ends: bool = False) -> Iterator[Line]:
    r"""The lines of a UTF-8 file. A line ends at "\n" only; a byte order mark at the start is left out.

    Args:
        path: See assets.locate; a name with .gz is unpacked.
        keep_ends: Keep "\n" or "\r\n" at the end of each line.

    Returns:
        Every line. A line that is not UTF-8 or is longer than MAX_LINE_BYTES has an error, and its text is useless.

    Raises:
        UserError: The file cannot be read, or has no bytes.
    """
    number = 0
    with opened(path) as file:
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            error = None
            if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
                what = "a JSON array, not an object a line" if data.lstrip().startswith(b"[") else "one text"
                while data and not data.endswith(b"\n"):
                    data = file.readline(MAX_LINE_BYTES)
                data = b"\n"
                error = UserError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes; is it {what}?")
            try:
                text = data.decode()
            except UnicodeDecodeError as broken:
                text = data.decode(errors="replace")
                error = UserError(f"{path}:{number}: not UTF-8 ({broken.reason}); convert the file to UTF-8")
            yield Line(number, text if keep_ends else text.removesuffix("\n").removesuffix("\r"), error)
    if not number:
        raise UserError(f"{path}: the file is empty")
