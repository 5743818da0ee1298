"""Keys by which rows count as the same text or document, and checks that a row has text and correct answers."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import shown
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.formats.rows import Row, no_column
from mtl_jax.data.source import Source


def normalise(text: str) -> str:
    """Lower case, single spaces: texts that are equal after this count as the same text."""
    return " ".join(text.lower().split())


def text_of(source: Source, row: Row, kind: str = "text") -> str:
    """A row's text, or its second text if kind is "pair"; words joined by spaces.

    Raises:
        UserError: The row has no such text.
    """
    name = getattr(source, kind)
    if name not in row.columns:
        raise no_column(source, row.where, kind, row.columns)
    value = row.columns[name]
    if isinstance(value, list):
        if not all(isinstance(word, str) for word in value):
            raise UserError(f"{row.where}: the {kind} column {name!r} is a list of values other than words")
        value = " ".join(value)
    if value is None or not value.strip():
        raise UserError(f"{row.where}: the {kind} column {name!r} is empty")
    return value


def key(source: Source, row: Row) -> str:
    """The key by which rows count as the same: the texts, and for questions about a context also the context."""
    texts = [text_of(source, row, kind) for kind in (("text", "pair") if source.pair else ("text",))]
    if isinstance(row.columns.get("answers"), list) and "context" not in (source.text, source.pair):
        texts.append(str(row.columns.get("context", "")))
    return "\n".join(map(normalise, texts))


def swapped(key: str) -> str:
    """The key of the pair with its texts swapped."""
    first, second, *rest = key.split("\n")
    return "\n".join([second, first, *rest])


def digest(key: str) -> bytes:
    """16 bytes in place of a key."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def group(source: Source, row: Row) -> str:
    """The document of a row, or "" if the source has no group column."""
    if not source.group:
        return ""
    if source.group not in row.columns:
        raise no_column(source, row.where, "group", row.columns)
    value = row.columns[source.group]
    match = re.search(source.group_pattern, value) if isinstance(value, str) else None
    if match is None:
        raise UserError(f"{row.where}: {quoted(value)} does not match {shown(source.group_pattern)!r}")
    return match.group()


def check_answer(answer: Any, context: str, where: str) -> None:
    """Raises UserError if the context does not have this answer at its stated character; other values are not checked."""
    if not isinstance(answer, dict):
        return
    text, start = answer["text"], answer["start"]
    actual = context[max(start, 0) : max(start, 0) + len(text)]
    if start < 0 or start + len(text) > len(context):
        raise UserError(f"{where}: the answer {quoted(text)} at {start} is outside the context of {len(context)} characters")
    if not text or actual != text:
        raise UserError(
            f"{where}: the answer {quoted(text)} is not in the context at {start}; the context has {quoted(actual)} there"
        )
