"""Sentence boundaries: the first sentence of a text, and texts divided into pieces that fit a model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from mtl_jax.core.errors import UserError, count

# The end of a sentence: the mark, closing quotes and brackets, and the space; Chinese and Japanese have no space there.
SENTENCES = re.compile(
    r"[.!?\u2026]+[\"'\u2019\u201d\u00bb)\]]*\s+"
    r"|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u2019\u201d\uff09]*\s*"
)
SPACES = re.compile(r"\s+")

Sizes = Callable[[Sequence[str]], Sequence[int]]


def divide(text: str, sizes: Sizes, limit: int) -> list[str]:
    """A text in pieces of at most `limit` tokens, each with as many whole sentences as fit.

    A sentence that is too long is divided at spaces, and a word that is too long in the middle.

    Args:
        text: The text.
        sizes: From texts to their numbers of tokens, special tokens and prefix included.
        limit: Most tokens of a piece.

    Returns:
        The pieces in order, without the space around them; the text itself if it fits.

    Raises:
        UserError: Not even a single character fits.
    """
    if sizes([text])[0] <= limit:
        return [text]
    for boundary in (SENTENCES, SPACES):
        parts = _split(text, boundary)
        if len(parts) > 1:
            return [piece for chunk in _chunks(parts, sizes, limit) for piece in divide(chunk, sizes, limit)]
    if len(text) < 2:
        raise UserError(
            f"{count(limit, 'token leaves', 'tokens leave')} no room for the text beside special tokens and prefix; allow more"
        )
    middle = len(text) // 2
    return divide(text[:middle], sizes, limit) + divide(text[middle:], sizes, limit)


def _split(text: str, boundary: re.Pattern[str]) -> list[str]:
    """The text divided after every boundary."""
    ends = [0, *(match.end() for match in boundary.finditer(text)), len(text)]
    return [part for start, stop in itertools.pairwise(ends) if (part := text[start:stop])]


def _chunks(parts: list[str], sizes: Sizes, limit: int) -> list[str]:
    """Parts joined greedily to chunks of about `limit` tokens; at least two chunks, each shorter than the text."""
    empty, *part_sizes = sizes(["", *(part.strip() for part in parts)])
    chunks, room = [""], 0
    for part, size in zip(parts, part_sizes, strict=True):
        if chunks[-1] and size - empty > room:
            chunks.append("")
        if not chunks[-1]:
            room = limit - empty
        chunks[-1] += part
        room -= size - empty
    if len(chunks) == 1:  # the whole has a few more tokens than the sum of its parts
        middle = len(parts) // 2
        chunks = ["".join(parts[:middle]), "".join(parts[middle:])]
    return [stripped for chunk in chunks if (stripped := chunk.strip())]


def first_sentence(text: str) -> str:
    """A text up to the first end of a sentence, or all of it, without white space around it."""
    text = text.strip()
    match = SENTENCES.search(text)
    return text if match is None else text[: match.end()].strip()
