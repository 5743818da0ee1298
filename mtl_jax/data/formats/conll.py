"""CoNLL: a word a line with its columns, a blank line after a sentence."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.data.formats.lines import Line, lines
from mtl_jax.data.formats.rows import Read, Row, check_columns, odd_blank
from mtl_jax.data.source import Source

DOCUMENT = "-DOCSTART-"
UNIVERSAL = 10  # columns of CoNLL-U; the first is an id
ID = re.compile(r"[0-9]+([-.][0-9]+)?")  # id of a word, of a range of words, or of an empty node
ALWAYS_COMMENTS = re.compile(r"# (newdoc|newpar|sent_id|text)\b|#(begin|end) document\b")


class _Line(NamedTuple):
    """A line of a sentence: its number in the file, its columns, and its error if it has one."""

    number: int
    fields: list[str]
    error: UserError | None

    @property
    def first(self) -> str:
        return self.fields[0] if self.fields else ""


_END = Line(0, "", None)


def read_conll(path: str, source: Source) -> Iterator[Read]:
    """A row for each sentence: each column is a list of str with an entry for each word; its location is its first line.

    Tabs divide columns, or runs of spaces in a file whose first word line has no tab. A line of spaces and tabs only is blank.
    A line is a comment if it starts with "#" and a space or tab, is before the first word of a sentence, and does not have as
    many columns as a word: "#" and "#hashtag" are words. The line -DOCSTART-, which divides documents in CoNLL-2003, is left
    out. One bad line makes its sentence a bad row.

    If a word has ten columns and the first is an id, the file is CoNLL-U (Nivre et al. 2020): ranges, such as 6-7, and empty
    nodes, such as 8.1, are not words; they are left out and counted, and every line with "#" is a comment. A file has ids from
    the first sentence on whose words begin with 1, 2, 3 ...
    """
    names = source.columns
    check_columns(source, path, names)
    divide = _divider(path)
    sentence: list[_Line] = []
    has_ids = False
    for line in itertools.chain(lines(path), [_END]):
        fields = divide(line.text)
        if fields or line.error:
            if sentence or not fields or not _is_comment(line.text, fields, names):
                sentence.append(_Line(line.number, fields, line.error or _check(fields, names, f"{path}:{line.number}")))
        elif sentence:
            words = [line for line in sentence if not line.first.startswith("#")] if len(names) == UNIVERSAL else []
            has_ids = has_ids or _are_ids([line.first for line in words])
            universal = has_ids and bool(words) and all(ID.fullmatch(line.first) for line in words)
            yield _universal(words, names, path) if universal else _sentence(sentence, names, path)
            sentence = []


def _is_comment(line: str, fields: list[str], names: tuple[str, ...]) -> bool:
    """Whether a line before a sentence's first word is a comment: a known one, or one without a word's columns."""
    if fields[0].split(" ")[0] == DOCUMENT or ALWAYS_COMMENTS.match(line):
        return True
    return line.startswith(("# ", "#\t")) and len(fields) != len(names)


def _divider(path: str) -> Callable[[str], list[str]]:
    """A function that splits the lines of this file into columns; a blank line has none."""
    tabs = next(("\t" in line.text for line in lines(path) if line.text.strip() and not line.text.startswith("# ")), False)

    def divide(line: str) -> list[str]:
        if not line.strip(" \t"):
            return []
        return [field.strip(" ") for field in line.split("\t")] if tabs else re.split("[ \t]+", line.strip(" \t"))

    return divide


def _check(fields: list[str], names: tuple[str, ...], where: str) -> UserError | None:
    if len(fields) != len(names):
        blank = odd_blank(" ".join(fields))
        hint = f" (the blank {blank} does not divide columns)" if blank else ""
        return UserError(f"{where}: {count(len(fields), 'column')}, but a word has {len(names)}: {listed(names)}{hint}")
    for name, field in zip(names, fields, strict=True):
        if not field.strip():
            return UserError(f"{where}: column {name!r} {f'has only the blank {odd_blank(field)}' if field else 'is empty'}")
    return None


def _sentence(words: list[_Line], names: tuple[str, ...], path: str, non_words: tuple[int, int] = (0, 0)) -> Read:
    error = next((line.error for line in words if line.error), None)
    if error:
        return error
    columns = {name: [line.fields[column] for line in words] for column, name in enumerate(names)}
    first, last = words[0].number, words[-1].number
    numbers = range(first, last + 1) if last - first + 1 == len(words) else [line.number for line in words]
    return Row(columns, f"{path}:{first}", (path, numbers), non_words)


def _universal(lines_with_ids: list[_Line], names: tuple[str, ...], path: str) -> Read:
    """A sentence whose lines begin with ids of words, ranges and empty nodes."""
    words = [line for line in lines_with_ids if line.first.isdecimal()]
    ranges = sum("-" in line.first for line in lines_with_ids)
    if not words:
        return UserError(f"{path}:{lines_with_ids[0].number}: a sentence without words; it has ranges or empty nodes only")
    return _sentence(words, names, path, (ranges, len(lines_with_ids) - len(words) - ranges))


def _are_ids(names: list[str]) -> bool:
    """Whether these are the ids of a sentence: 1, 2, 3 ... of words, with those of ranges and empty nodes between them."""
    words = [name for name in names if name.isdecimal()]
    return bool(words) and words == [str(number + 1) for number in range(len(words))] and all(map(ID.fullmatch, names))
