"""Text files with a row a line: csv and tsv, lines that match a pattern, and parallel files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import zip_longest

from mtl_jax.core import assets
from mtl_jax.core.errors import UserError, count, there_are
from mtl_jax.core.files import shown
from mtl_jax.core.row_texts import named
from mtl_jax.data.formats.lines import MAX_LINE_BYTES, lines
from mtl_jax.data.formats.rows import Read, Row, check_columns
from mtl_jax.data.source import Source


def read_csv(path: str, source: Source) -> Iterator[Read]:
    """Rows of a csv file: fields may be quoted with ", and a quoted field may contain commas, line ends and "".

    Raises:
        UserError: A column is missing, or the start of the next row is unknown, because a quote is never closed or a line is
            too long.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    broken: list[UserError] = []  # errors of the current row's lines

    def texts() -> Iterator[str]:
        for line in lines(path, keep_ends=True):
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
    """Rows of a tsv file: fields between tabs, quotes are ordinary characters. An empty line is not a row."""
    names = source.columns
    if names:
        check_columns(source, path, names)
    for line in lines(path):
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
        return UserError(f"{where}: {count(len(fields), 'column')}, but {there_are(len(names), 'name')}: {named(names)}")
    return Row(dict(zip(names, fields, strict=True)), where)


def read_lines(path: str, source: Source) -> Iterator[Read]:
    """Rows of a text file: source.pattern must match the whole of every line that is not empty."""
    pattern = re.compile(source.pattern)
    check_columns(source, path, pattern.groupindex)
    for line in lines(path):
        where = f"{path}:{line.number}"
        match = None if line.error else pattern.fullmatch(line.text)
        if line.error:
            yield line.error
        elif match:
            yield Row(match.groupdict(default=""), where)
        elif line.text:
            yield UserError(f"{where}: the line does not match the pattern {shown(source.pattern)!r}")


def parts(path: str) -> list[str]:
    """The names between the braces of a parallel path.

    Raises:
        UserError: There are no braces, or more than one pair.
    """
    braces = re.findall(r"\{([^{}]+)\}", path)
    if len(braces) != 1 or path.count("{") != 1 or path.count("}") != 1:
        raise UserError(f'{path}: parallel files are named with one pair of braces, for example "train.{{en,fr}}"')
    return braces[0].split(",")


def matches(path: str) -> list[str]:
    """The paths, each with one pair of braces, that match a pattern with wildcards, in sorted order.

    Raises:
        UserError: No file matches, or a file exists and another of its set does not.
    """
    names = parts(path)
    before, after = re.split(r"\{[^{}]+\}", path)
    if not assets.has_wildcard(before + after):
        return [path]
    braces = "{" + ",".join(names) + "}"
    matched: list[set[str]] = []
    for name in names:
        # A set of files is named by the texts that the wildcards match.
        pattern = _regex(before) + re.escape(name) + _regex(after)
        results = [re.fullmatch(pattern, file) for file in assets.matches(before + name + after)]
        matched.append({_fill(before + braces + after, match.groups()) for match in results if match})
    incomplete = sorted(matched[0].union(*matched) - matched[0].intersection(*matched))
    if incomplete:
        raise UserError(f"{incomplete[0]}: not all of these files exist")
    return sorted(matched[0])


def _regex(pattern: str) -> str:
    return "".join({"*": "([^/]*)", "?": "([^/])"}.get(c, re.escape(c)) for c in pattern)


def _fill(pattern: str, texts: tuple[str, ...]) -> str:
    filled = iter(texts)
    return re.sub(r"[*?]", lambda _: next(filled), pattern)


def read_parallel(path: str, source: Source) -> Iterator[Read]:
    """Rows of files whose names differ between the braces only; these parts name the columns, unless source.columns does.

    Raises:
        UserError: The files differ in length: from some unknown line on the rows would be wrong.
    """
    names = source.columns or tuple(parts(path))
    if len(names) != len(parts(path)):
        raise UserError(
            f"{path}: {count(len(parts(path)), 'file')}, but source {source.name!r} names {count(len(names), 'column')}"
        )
    check_columns(source, path, names)
    before, after = re.split(r"\{[^{}]+\}", path)
    files = [before + part + after for part in parts(path)]
    for number, row in enumerate(zip_longest(*map(lines, files)), start=1):
        ended = [file for file, line in zip(files, row, strict=True) if line is None]
        if ended:
            longer = next(file for file, line in zip(files, row, strict=True) if line is not None)
            raise UserError(
                f"{longer}:{number}: {ended[0]} has only {count(number - 1, 'line')}; parallel files must be of one length"
            )
        errors = [line.error for line in row if line.error]
        where = f"{path}:{number}"
        yield errors[0] if errors else Row({name: line.text for name, line in zip(names, row, strict=True)}, where)
