"""Texts that are too long for a row: truncation, and division into windows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError, count


class RowError(UserError):
    """Texts that cannot be encoded; a caller that knows their file and line raises a UserError with these and `reason`.

    Attributes:
        rows: The indices of the texts, ascending.
        reason: Why the first one cannot be encoded, and what to do.
    """

    def __init__(self, rows: list[int], reason: str):
        super().__init__(f"text {rows[0]}: {reason}")
        self.rows = rows
        self.reason = reason


def sequence_of(encoding: Any) -> np.ndarray:
    """i8[length]: 0 at tokens of the first text, 1 at tokens of the second, -1 at special tokens around them."""
    return np.array([-1 if number is None else number for number in encoding.sequence_ids], np.int8)


def truncate(sequence: np.ndarray, max_length: int, side: str) -> np.ndarray:
    """Indices of the tokens that are kept: the special ones, and as many of the one or two texts as there is room for.

    Of two texts the longer one is truncated to the length of the other, then both equally, as transformers does.

    Args:
        sequence: i8[length], the result of sequence_of.
        max_length: Number of tokens that are kept.
        side: "right" or "left": the end at which texts are truncated.

    Raises:
        UserError: max_length is not enough for the special tokens and one token of each text.
    """
    texts = [np.flatnonzero(sequence == number) for number in (0, 1) if (sequence == number).any()]
    room = max_length - int((sequence < 0).sum())
    if room < len(texts):
        raise UserError(
            f"rows of {count(max_length, 'token')} leave no room for text between the special tokens; make them longer"
        )
    shares = [room]
    if len(texts) == 2:
        shorter = min(len(texts[0]), len(texts[1]), room // 2)
        shares = [shorter, room - shorter] if len(texts[0]) <= len(texts[1]) else [room - shorter, shorter]
    kept = [text[len(text) - share :] if side == "left" else text[:share] for text, share in zip(texts, shares, strict=True)]
    return np.sort(np.concatenate([np.flatnonzero(sequence < 0), *kept]))


def divide(
    sequence: np.ndarray, words: np.ndarray | None, divided: int, max_length: int, stride: int, row: int
) -> list[np.ndarray]:
    """Indices of the tokens in each window: a piece of the divided text, and all other tokens.

    Args:
        sequence: i8[length], the result of sequence_of.
        words: i32[length], the word of each token; if given, pieces end between words.
        divided: The text that is divided, 0 or 1.
        max_length: Most tokens in a window.
        stride: Tokens that consecutive pieces share.
        row: The number of the text, for the error.

    Raises:
        RowError: The other tokens leave no room for more than `stride` tokens.
    """
    text, others = np.flatnonzero(sequence == divided), np.flatnonzero(sequence != divided)
    room = max_length - len(others)
    if room <= stride:
        what, shorten = ("first text and the special tokens", "first text") if divided else ("special tokens", "text")
        raise RowError(
            [row],
            f"the {what} take {len(others)} of the {max_length} tokens of every window, and consecutive windows share "
            f"{stride}, which leaves no room; shorten the {shorten}, lower the stride or make rows longer",
        )
    if words is None:
        starts = range(0, max(1, len(text) - stride), room - stride)
        pieces = [(start, min(start + room, len(text))) for start in starts]
    else:
        pieces = _between_words(words[text], room)
    return [np.sort(np.concatenate([others, text[start:end]])) for start, end in pieces]


def _between_words(words: np.ndarray, room: int) -> list[tuple[int, int]]:
    """Pieces (start, end) of at most `room` sub-words: whole words, as many as fit, or part of a longer word."""
    bounds = [0, *(np.flatnonzero(words[1:] != words[:-1]) + 1).tolist(), len(words)]
    pieces, start = [], 0
    for word, end in itertools.pairwise(bounds):
        if end - start > room and word > start:
            pieces.append((start, word))
            start = word
        while end - start > room:
            pieces.append((start, start + room))
            start += room
    return [*pieces, (start, len(words))]
