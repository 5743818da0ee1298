"""Texts of more tokens than a model takes, divided where a reader would divide them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from mtl_jax.counting import count
from mtl_jax.errors import UserError
from mtl_jax.sentences import SENTENCES

SPACES = re.compile(r"\s+")

Sizes = Callable[[Sequence[str]], Sequence[int]]


def divide(text: str, sizes: Sizes, limit: int) -> list[str]:
    """A text in pieces that fit: as many whole sentences in each as there is room for.

    A sentence that is too long by itself is divided at spaces, and a word that is too long anywhere.

    Args:
        text: The text.
        sizes: Numbers of tokens of texts, special tokens and prefix included.
        limit: Most tokens of a piece.

    Returns:
        The pieces in order, without the space around them; the text itself where it fits.

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
    """The text cut after every boundary."""
    ends = [0, *(found.end() for found in boundary.finditer(text)), len(text)]
    return [part for start, stop in itertools.pairwise(ends) if (part := text[start:stop])]


def _chunks(parts: list[str], sizes: Sizes, limit: int) -> list[str]:
    """Parts joined again, greedily; sizes of parts nearly add up. Always at least two, each shorter than the whole."""
    empty, *each = sizes(["", *(part.strip() for part in parts)])
    chunks, room = [""], 0
    for part, size in zip(parts, each, strict=True):
        if chunks[-1] and size - empty > room:
            chunks.append("")
        if not chunks[-1]:
            room = limit - empty
        chunks[-1] += part
        room -= size - empty
    if len(chunks) == 1:  # together they are a little longer than the sum said
        middle = len(parts) // 2
        chunks = ["".join(parts[:middle]), "".join(parts[middle:])]
    return [stripped for chunk in chunks if (stripped := chunk.strip())]
