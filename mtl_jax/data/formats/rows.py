"""What every reader gives: rows, or in the place of a row the error that says why it is none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import shown

if TYPE_CHECKING:
    from mtl_jax.data.source import Source


class Row(NamedTuple):
    """One row: its columns by name, and where it stands for error messages.

    A value is a str; a list of str (the words or tags of a sentence; None in it is a word without tag); None where the row has
    no value; or, for answers, a list of {"text": str, "start": int}, empty where there is no answer.

    Attributes:
        columns: The values.
        where: File and line, or record.
        words: The file and each word's line, where words stand on lines of their own; else None.
        no_words: Lines of the row that are no words and were left out: CoNLL-U's ranges, and its empty nodes.
    """

    columns: dict[str, Any]
    where: str
    words: tuple[str, Sequence[int]] | None = None
    no_words: tuple[int, int] = (0, 0)

    def where_word(self, word: int) -> str:
        """Where a word, counted from 0, stands: its own line if it has one, else the row's place."""
        if self.words is None:
            return self.where
        file, lines = self.words
        return f"{file}:{lines[word]}"


# A bad row is given as its error, not raised: whoever reads decides whether it ends the run or is counted and left out.
# What makes a whole file unusable is raised.
Read = Row | UserError


def check_columns(source: Source, path: str, columns: Iterable[str]) -> None:
    """Raises UserError where the file lacks a column that the source names, or has one name twice."""
    counts = Counter(list(columns))
    for kind in ("text", "pair", "id"):
        name = getattr(source, kind)
        if name and name not in counts:
            raise no_column(source, path, kind, counts)
    twice = min((name for name, count in counts.items() if count > 1), default=None)
    if twice is not None:
        raise UserError(f"{path}: there are two columns {shown(twice)!r}; give every column a name of its own")


def odd_blank(text: str) -> str:
    """A blank that looks like a space and is none, such as U+00A0, as an error line names it; "" where there is none."""
    blank = re.search(r"[^\S \t\r\n]", text)
    return f"U+{ord(blank.group()):04X}" if blank else ""


def no_column(source: Source, where: str, kind: str, columns: Iterable[str]) -> UserError:
    """The error for a column that a source names and a file or row has not."""
    return UserError(
        f"{where}: source {source.name!r} has no {kind} column {getattr(source, kind)!r}; columns: {listed(columns)}"
    )
