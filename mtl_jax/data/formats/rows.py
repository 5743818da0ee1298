"""The result of every reader: rows, or in place of a row the error that says why it cannot be read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mtl_jax.core.errors import UserError
from mtl_jax.core.row_texts import named, quoted
from mtl_jax.data.source import Source


class Row(NamedTuple):
    """One row: its columns by name, and its location for error messages.

    A value is a str; a list of str (the words or tags of a sentence, with None for a word without tag); None if the row has no
    value; or, for answers, a list of {"text": str, "start": int}, empty if there is no answer.

    Attributes:
        columns: The values.
        where: File and line, or record.
        words: The file and each word's line, if the file has a word a line; else None.
        non_words: Numbers of lines of the row that are not words and were left out: CoNLL-U's ranges, and its empty nodes.
    """

    columns: dict[str, Any]
    where: str
    words: tuple[str, Sequence[int]] | None = None
    non_words: tuple[int, int] = (0, 0)

    def where_word(self, word: int) -> str:
        """The location of a word, counted from 0: its own line if the file has a word a line, else the row's."""
        if self.words is None:
            return self.where
        file, lines = self.words
        return f"{file}:{lines[word]}"


# A reader yields the error of a bad row and does not raise it: the caller decides whether it ends the run, or the row is left
# out and counted. An error that makes the whole file unusable is raised.
Read = Row | UserError


def check_columns(source: Source, path: str, columns: Iterable[str]) -> None:
    """Raises UserError if the file lacks a column that the source names, or has two columns of one name."""
    counts = Counter(list(columns))
    for kind in ("text", "pair", "id"):
        name = getattr(source, kind)
        if name and name not in counts:
            raise no_column(source, path, kind, counts)
    twice = min((name for name, count in counts.items() if count > 1), default=None)
    if twice is not None:
        raise UserError(f"{path}: there are two columns {quoted(twice)}; every column needs a different name")


def odd_blank(text: str) -> str:
    """The code, such as "U+00A0", of the first blank in a text that looks like a space and is not one; "" if there is none."""
    blank = re.search(r"[^\S \t\r\n]", text)
    return f"U+{ord(blank.group()):04X}" if blank else ""


def no_column(source: Source, where: str, kind: str, columns: Iterable[str]) -> UserError:
    """The error for a column that a source names and a file or row does not have."""
    return UserError(
        f"{where}: source {source.name!r} has no {kind} column {getattr(source, kind)!r}; columns: {named(columns)}"
    )
