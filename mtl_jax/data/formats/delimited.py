"""csv and tsv: a header or given names, then a row a line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtl_jax.counting import count, there_are
from mtl_jax.data.formats import lines as text
from mtl_jax.data.formats.rows import Read, Row, check_columns
from mtl_jax.errors import UserError, listed

if TYPE_CHECKING:
    from mtl_jax.data.sources import Source


def read_csv(path: str, source: Source) -> Iterator[Read]:
    """Rows of a csv file: fields may be quoted with ", a quoted one may hold commas, line ends and "".

    Raises:
        UserError: A column is missing, or it is unknown where the next row begins: a quote that is never closed, a line that
            is too long.
    """
    csv.field_size_limit(text.MAX_LINE_BYTES)
    broken: list[UserError] = []  # of the lines of the row that is being read

    def texts() -> Iterator[str]:
        for line in text.lines(path, keep_ends=True):
            if line.error:
                if line.text == "\n":  # too long: it may have opened a quote
                    raise line.error
                broken.append(line.error)
            yield line.text

    reader = csv.reader(texts(), strict=True)
    names: tuple[str, ...] = source.columns
    if names:
        check_columns(source, path, names)
    while True:
        first = reader.line_num + 1
        broken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{path}:{reader.line_num}"
            if "unexpected end" in str(error):
                raise UserError(f"{where}: {error}: a quote is not closed in the row that begins on line {first}") from error
            if "field larger" in str(error):
                raise UserError(f"{where}: {error}; is a quote not closed in the row that begins on line {first}?") from error
            yield UserError(f"{where}: {error}")
            continue
        where = f"{path}:{reader.line_num}"
        if not names:
            if broken:
                raise broken[0]
            names = tuple(fields)
            check_columns(source, path, names)
        elif broken:
            yield broken[0]
        elif fields:
            yield _row(fields, names, where)


def read_tsv(path: str, source: Source) -> Iterator[Read]:
    """Rows of a tsv file: fields between tabs, quotes are characters like any other. An empty line is no row."""
    names = source.columns
    if names:
        check_columns(source, path, names)
    for line in text.lines(path):
        if not names:
            if line.error:
                raise line.error
            names = tuple(line.text.split("\t"))
            check_columns(source, path, names)
        elif line.error:
            yield line.error
        elif line.text:
            yield _row(line.text.split("\t"), names, f"{path}:{line.number}")


def _row(fields: list[str], names: tuple[str, ...], where: str) -> Read:
    if len(fields) != len(names):
        return UserError(f"{where}: {count(len(fields), 'column')}, but {there_are(len(names), 'name')}: {listed(names)}")
    return Row(dict(zip(names, fields, strict=True)), where)
