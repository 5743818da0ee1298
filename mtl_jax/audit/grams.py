"""The n-grams of many texts as sorted 44-bit hashes, computed for a million characters at once.

A text is a set of n-grams: its words and its pairs of consecutive words. In a script without spaces (Chinese, Japanese, Thai,
...), every character counts as a word, and the n-grams are pairs and triples, because all texts share single characters. The
hashes depend on the text alone, not on the process or the platform.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mtl_jax.audit.text_keys import Text, is_letter, normalise, sides

BITS = 44  # of a hash: a text of a thousand n-grams meets a false one with probability 1e-7
CHUNK = 1 << 20  # characters that are hashed at once
MOST_TEXTS = (1 << (64 - BITS)) - 1  # in a chunk: a text's number stands above its hashes

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)
_UNKNOWN, _OTHER, _LETTER, _ALONE = range(4)

# Scripts without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, and the Chinese characters with their
# extensions.
_WITHOUT_SPACES = (
    (0x0E00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


class Grams(NamedTuple):
    """The n-grams of N texts.

    Attributes:
        starts: i64[N + 1], where the n-grams of each text begin in `hashes`; the last entry is their total number.
        hashes: i64[G], for each text the different hashes of its n-grams, ascending.
        words: i32[N], the number of words (or of characters, in scripts without spaces) of each text.
    """

    starts: np.ndarray
    hashes: np.ndarray
    words: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """i64[N], the number of different n-grams of each text."""
        return np.diff(self.starts)


def grams(texts: Sequence[Text]) -> Grams:
    """The n-grams of texts; a pair has those of both its texts, in either order.

    Args:
        texts: Texts, or pairs of texts.
    """
    parts = [_of_chunk(*chunk) for chunk in _chunks(texts)]
    sizes = np.concatenate([np.zeros(1, np.int64), *(part[0] for part in parts)])
    hashes = np.concatenate([np.zeros(0, np.int64), *(part[1] for part in parts)])
    words = np.concatenate([np.zeros(0, np.int32), *(part[2] for part in parts)])
    return Grams(np.cumsum(sizes), hashes, words)


def _chunks(texts: Sequence[Text]) -> Iterator[tuple[list[str], list[int]]]:
    """The texts, normalised, about CHUNK characters at once: the sides of a chunk, and the text of each within the chunk."""
    strings: list[str] = []
    owners: list[int] = []
    characters, number = 0, 0
    for text in texts:
        for side in sides(text):
            strings.append(normalise(side))
            owners.append(number)
            characters += len(side)
        number += 1
        if characters >= CHUNK or number == MOST_TEXTS:
            yield strings, [*owners, number]
            strings, owners, characters, number = [], [], 0, 0
    if number:
        yield strings, [*owners, number]


def _of_chunk(strings: list[str], owners: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes i64[n], hashes i64[g] and numbers of words i32[n] of the n texts of a chunk."""
    count, owner_of = owners[-1], np.array(owners[:-1], np.int64)
    codes = np.frombuffer("\n".join([*strings, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds(codes)
    begins, ends = _units(kinds)
    hashes = _hashes(codes, begins, ends)
    alone = kinds[begins] == _ALONE
    # A side ends at the line feed after it, and its own line feeds are not letters: the number of its characters says where.
    side_ends = np.cumsum(np.array([len(string) + 1 for string in strings], np.int64))
    side = np.searchsorted(side_ends, begins, side="right")
    owner = owner_of[side]
    words = np.bincount(owner, minlength=count).astype(np.int32)
    found: list[np.ndarray] = []
    chained = hashes
    for size in (1, 2, 3):
        if size > 1:  # the n-gram from a unit on is the unit, and the shorter n-gram after it
            chained = _mixed(hashes[: len(chained) - 1] * np.uint64(_BASE) + chained[1:])
        length = len(chained)
        kept = (side[:length] == side[size - 1 :]) if length else np.zeros(0, bool)
        wanted = {1: ~alone, 2: np.ones_like(alone), 3: alone}[size][:length]
        if size == 1:
            wanted = wanted | (words[owner] == 1)  # a single character is all that there is
        kept &= wanted
        found.append((owner[:length][kept].astype(np.uint64) << np.uint64(BITS)) | (chained[kept] >> np.uint64(64 - BITS)))
    together = np.sort(np.concatenate(found))
    if len(together):
        together = together[np.concatenate([[True], together[1:] != together[:-1]])]
    sizes = np.bincount((together >> np.uint64(BITS)).astype(np.int64), minlength=count)
    return sizes, (together & np.uint64((1 << BITS) - 1)).astype(np.int64), words


def _kinds(codes: np.ndarray) -> np.ndarray:
    """u8[characters]: whether each is a letter of a word, a letter that counts as a word, or another character."""
    table = _table()
    present = np.zeros(len(table), bool)
    present[codes] = True
    for code in np.flatnonzero(present & (table == _UNKNOWN)).tolist():
        single = any(low <= code <= high for low, high in _WITHOUT_SPACES)
        table[code] = (_ALONE if single else _LETTER) if is_letter(code) else _OTHER
    return table[codes]


@functools.cache
def _table() -> np.ndarray:
    return np.zeros(0x110000, np.uint8)


def _units(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the words, and the characters that count as words, begin and end."""
    before = np.concatenate([[_OTHER], kinds[:-1]])
    after = np.concatenate([kinds[1:], [_OTHER]])
    begins = (kinds == _ALONE) | ((kinds == _LETTER) & (before != _LETTER))
    ends = (kinds == _ALONE) | ((kinds == _LETTER) & (after != _LETTER))
    return np.flatnonzero(begins), np.flatnonzero(ends) + 1


def _hashes(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """u64[units]: the characters of each unit as digits of a number modulo 2**64, mixed."""
    powers = _powers(_BASE, len(codes) + 1)
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
    return _mixed((sums[ends] - sums[begins]) * _powers(_INVERSE, len(codes) + 1)[begins])


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The last step of SplitMix64: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
