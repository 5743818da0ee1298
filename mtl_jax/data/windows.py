"""What stays of a text that is too long for a row: its beginning, or windows that share it out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError, count


class RowError(UserError):
    """Texts that cannot be encoded; whoever knows their file and lines raises a UserError with them and `reason`.

    Attributes:
        rows: Their places among the texts, ascending.
        reason: What is wrong with the first one, and what to do.
    """

    def __init__(self, rows: list[int], reason: str):
        super().__init__(f"text {rows[0]}: {reason}")
        self.rows = rows
        self.reason = reason


def sequence_of(encoding: Any) -> np.ndarray:
    """i8[length]: 0 at tokens of the first text, 1 at tokens of the second, -1 at special tokens around them."""
    return np.array([-1 if number is None else number for number in encoding.sequence_ids], np.int8)


def cut(sequence: np.ndarray, max_length: int, side: str) -> np.ndarray:
    """Places of the tokens that stay: the special ones, and as many of the one or two texts as there is room for.

    Of two texts the longer one is cut down to the length of the other, then both equally, as transformers does.

    Args:
        sequence: i8[length], sequence_of an encoding.
        max_length: Tokens that stay.
        side: "right" or "left": from which end the texts are cut.

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
    """Places of the tokens that stand in each window: everything that is not divided, and a piece of the text that is.

    Args:
        sequence: i8[length], sequence_of an encoding.
        words: i32[length], the word of each token; where given, pieces end between words.
        divided: Which text is divided, 0 or 1.
        max_length: Most tokens in a window.
        stride: Tokens that consecutive pieces share.
        row: The number of the text, for the error.

    Raises:
        RowError: What is not divided leaves no room for more than `stride` tokens.
    """
    text, beside = np.flatnonzero(sequence == divided), np.flatnonzero(sequence != divided)
    room = max_length - len(beside)
    if room <= stride:
        beside_it, shorten = ("first text and the special tokens", "first text") if divided else ("special tokens", "text")
        raise RowError(
            [row],
            f"the {beside_it} take {len(beside)} of the {max_length} tokens of every window, and consecutive windows share "
            f"{stride}, which leaves no room; shorten the {shorten}, lower the stride or make rows longer",
        )
    if words is None:
        starts = range(0, max(1, len(text) - stride), room - stride)
        pieces = [(start, min(start + room, len(text))) for start in starts]
    else:
        pieces = _between_words(words[text], room)
    return [np.sort(np.concatenate([beside, text[start:end]])) for start, end in pieces]


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
