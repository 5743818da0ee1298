"""CoNLL: a word a line with its columns, a blank line after a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mtl_jax.counting import count
from mtl_jax.data.formats.lines import lines
from mtl_jax.data.formats.rows import Read, Row, check_columns
from mtl_jax.errors import UserError

if TYPE_CHECKING:
    from mtl_jax.data.sources import Source

DOCUMENT = "-DOCSTART-"


def read_conll(path: str, source: Source) -> Iterator[Read]:
    """Sentences, each column a list of str with an entry for each word; a row's place is its first line.

    Columns stand between tabs, or between runs of spaces in a file whose first word line has no tab. Blank is a line of
    spaces and tabs only. A line is a comment where it starts with "# ", stands before the first word of a sentence and
    has not as many columns as a word has: "#" and "#hashtag" are words. A sentence of the one word -DOCSTART-, which divides
    documents in CoNLL-2003, is left out. A sentence with a bad line is bad as a whole.
    """
    names = source.columns
    check_columns(source, path, names)
    divide = _divider(path)
    words: list[list[str]] = []
    start, error = 0, None
    for line in lines(path):
        fields = divide(line.text)
        if not fields and not line.error:
            if words or error:
                yield from _sentence(words, error, names, (path, start))
            words, error = [], None
        elif not words and not error and _is_comment(line.text, fields, names):
            continue
        else:
            start = start if words or error else line.number
            error = error or line.error or _check(fields, names, f"{path}:{line.number}")
            words.append(fields)
    if words or error:
        yield from _sentence(words, error, names, (path, start))


def _is_comment(line: str, fields: list[str], names: tuple[str, ...]) -> bool:
    """Whether a line before a sentence's first word is none: CoNLL-U's own, or one that has not a word's columns."""
    return line.startswith("# ") and (len(fields) != len(names) or bool(re.match(r"# (newdoc|newpar|sent_id|text)\b", line)))


def _divider(path: str) -> Callable[[str], list[str]]:
    """What splits the lines of this file; a blank line has no columns."""
    tabs = next(("\t" in line.text for line in lines(path) if line.text.strip() and not line.text.startswith("# ")), False)

    def divide(line: str) -> list[str]:
        if not line.strip(" \t"):
            return []
        return [field.strip(" ") for field in line.split("\t")] if tabs else re.split("[ \t]+", line.strip(" \t"))

    return divide


def _check(fields: list[str], names: tuple[str, ...], where: str) -> UserError | None:
    if len(fields) != len(names):
        return UserError(f"{where}: {count(len(fields), 'column')}, but a word has {len(names)}: {', '.join(names)}")
    empty = [name for name, field in zip(names, fields, strict=True) if not field.strip()]
    return UserError(f"{where}: column {empty[0]!r} is empty") if empty else None


def _sentence(
    words: list[list[str]], error: UserError | None, names: tuple[str, ...], first: tuple[str, int]
) -> Iterator[Read]:
    if error:
        yield error
    elif not (len(words) == 1 and words[0][0] == DOCUMENT):
        columns = {name: list(column) for name, column in zip(names, zip(*words, strict=True), strict=True)}
        # Comments stand before the first word and blank lines after the last: the words' lines have no gap.
        yield Row(columns, f"{first[0]}:{first[1]}", first)
