"""What every reader gives: rows, or in the place of a row the error that says why it is none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from mtl_jax.errors import UserError

if TYPE_CHECKING:
    from mtl_jax.data.sources import Source


class Row(NamedTuple):
    """One row: its columns by name, and where it stands for error messages.

    A value is a str; a list of str (the words or tags of a sentence; None in it is a word without tag); None where the row has
    no value; or, for answers, a list of {"text": str, "start": int}, empty where there is no answer.

    Attributes:
        columns: The values.
        where: File and line, or record.
        first_word: File and line of the first word, where words stand on lines of their own, one after another; else None.
    """

    columns: dict[str, Any]
    where: str
    first_word: tuple[str, int] | None = None

    def where_word(self, word: int) -> str:
        """Where a word, counted from 0, stands: its own line if it has one, else the row's place."""
        if self.first_word is None:
            return self.where
        file, line = self.first_word
        return f"{file}:{line + word}"


# A bad row is given as its error, not raised: whoever reads decides whether it ends the run or is counted and left out.
# What makes a whole file unusable is raised.
Read = Row | UserError


def check_columns(source: Source, path: str, columns: Iterable[str]) -> None:
    """Raises UserError where the file lacks a column that the source names, or has one name twice."""
    columns = list(columns)
    for kind in ("text", "pair", "id"):
        name = getattr(source, kind)
        if name and name not in columns:
            raise no_column(source, path, kind, columns)
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UserError(f"{path}: there are two columns {twice[0]!r}; give every column a name of its own")


def no_column(source: Source, where: str, kind: str, columns: Iterable[str]) -> UserError:
    """The error for a column that a source names and a file or row has not."""
    return UserError(
        f"{where}: source {source.name!r} has no {kind} column {getattr(source, kind)!r}; columns: {', '.join(columns)}"
    )
