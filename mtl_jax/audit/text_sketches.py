"""Sketches of a run's training texts, with which later texts can be compared, and which do not contain the texts.

A sketch has a 64-bit hash of a text's letters and digits, and the lowest byte of each of 64 minima of its n-grams (see
mtl_jax.audit.minhash). Two texts of Jaccard similarity J agree in a byte with probability J + (1 - J) / 256 (Li and König,
2010, "b-Bit Minwise Hashing"), so the share of equal bytes estimates J, with a standard error of sqrt(J (1 - J) / 64): .057 at
J = .7. Candidates agree in all of one of 21 bands of three bytes: with probability .9999 at J = .7. A text of fewer than SHORT
words is only a copy of one with the same letters and digits.

A text cannot be read from its sketch. But whoever has a text can test, up to chance, whether it is among them.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtl_jax.audit import text_keys
from mtl_jax.audit.copies import SHORT, matches
from mtl_jax.audit.grams import grams
from mtl_jax.audit.minhash import sketches
from mtl_jax.audit.text_keys import Text

MINIMA, BAND = 64, 3
MOST_TEXTS = 100_000  # in a file: 7.5 MB
CHANCE = 1 / 256  # that two bytes are equal by chance
FORMAT = 1
CHUNK = 1 << 18  # candidates that are compared at once


class TextSketches(NamedTuple):
    """Sketches of N texts.

    Attributes:
        letters: u64[N], hashes of their letters and digits, ascending, without repetitions.
        minima: u8[N, MINIMA].
        words: u16[N], the number of words of each.
        of: Number of different texts from which these are a sample; N if these are all.
    """

    letters: np.ndarray
    minima: np.ndarray
    words: np.ndarray
    of: int


def of_texts(texts: Sequence[Text], most: int = MOST_TEXTS) -> TextSketches:
    """The sketches of texts that are not empty: at most `most`, those with the smallest hashes.

    Args:
        texts: Texts, or pairs of texts; a pair has one sketch, whatever its order.
        most: The largest number of sketches.
    """
    first_of: dict[int, int] = {}
    for index, text in enumerate(texts):
        key = text_keys.letters(text) or text_keys.exact(text)
        if key:
            digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            first_of.setdefault(int.from_bytes(digest, "big"), index)
    chosen = sorted(first_of)[:most]
    features = grams([texts[first_of[letters]] for letters in chosen])
    minima = (sketches(features, MINIMA) & np.uint32(0xFF)).astype(np.uint8)
    words = np.minimum(features.words, 0xFFFF).astype(np.uint16)
    return TextSketches(np.array(chosen, np.uint64), minima, words, len(first_of))


def joined(parts: Sequence[TextSketches], most: int = MOST_TEXTS) -> TextSketches:
    """The different sketches of several runs, at most `most` of them.

    If one of them is a sample, the number of all texts is estimated from the largest of the smallest hashes (Bar-Yossef et al.,
    2002).

    Args:
        parts: The sketches; at least one.
        most: The largest number of sketches.
    """
    letters, first = np.unique(np.concatenate([part.letters for part in parts]), return_index=True)
    of = len(letters)
    if any(part.of > len(part.letters) for part in parts):
        smallest = min(most, *(len(part.letters) for part in parts if part.of > len(part.letters)))
        of = round((smallest - 1) / (float(letters[smallest - 1]) / 2**64))
    letters, first = letters[:most], first[:most]
    minima = np.concatenate([part.minima for part in parts])[first]
    words = np.concatenate([part.words for part in parts])[first]
    return TextSketches(letters, minima, words, max(of, len(letters)))


class SketchCopies(NamedTuple):
    """Which of some texts are probably copies of sketched texts.

    Attributes:
        letters: bool[M], texts with the same letters and digits.
        near: bool[M], other texts with an estimated similarity at or above the threshold.
    """

    letters: np.ndarray
    near: np.ndarray


def copies_of(known: TextSketches, texts: Sequence[Text], threshold: float = 0.7) -> SketchCopies:
    """The texts that are probably copies of sketched texts.

    Args:
        known: The sketches.
        texts: M texts, or pairs.
        threshold: The least estimated similarity of near copies.
    """
    sketches = of_texts(texts, len(texts))
    same = np.isin(sketches.letters, known.letters)
    similar = np.zeros(len(sketches.letters), bool)
    long, others = np.flatnonzero(sketches.words >= SHORT), np.flatnonzero(known.words >= SHORT)
    for start in range(0, MINIMA - BAND + 1, BAND):
        left, right = (_band(part.minima[rows], start) for part, rows in ((sketches, long), (known, others)))
        first, second = matches(left, right)
        for begin in range(0, len(first), CHUNK):
            mine, theirs = long[first[begin : begin + CHUNK]], others[second[begin : begin + CHUNK]]
            equal = (sketches.minima[mine] == known.minima[theirs]).mean(axis=1)
            similar[mine[(equal - CHANCE) / (1 - CHANCE) >= threshold]] = True
    return SketchCopies(*_by_text(sketches, texts, same, similar & ~same))


def _band(minima: np.ndarray, start: int) -> np.ndarray:
    """i64[N]: equal if the bytes of a band of u8[N, MINIMA] are equal."""
    first, second, third = minima[:, start : start + BAND].astype(np.int64).T
    return (first << 16) | (second << 8) | third


def _by_text(sketches: TextSketches, texts: Sequence[Text], *flags: np.ndarray) -> list[np.ndarray]:
    """bool[M], the flag of each text's sketch."""
    places = []
    for text in texts:
        key = text_keys.letters(text) or text_keys.exact(text)
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        places.append(int(np.searchsorted(sketches.letters, np.uint64(int.from_bytes(digest, "big")))) if key else -1)
    return [np.array([place >= 0 and bool(flag[place]) for place in places], bool) for flag in flags]


def to_bytes(value: TextSketches) -> bytes:
    """A file of numpy (npz) with the sketches; the same sketches give the same bytes."""
    file = io.BytesIO()
    np.savez(
        file, format=np.int64(FORMAT), of=np.int64(value.of), letters=value.letters, minima=value.minima, words=value.words
    )
    return file.getvalue()


def from_bytes(data: bytes) -> TextSketches:
    """The inverse of to_bytes().

    Raises:
        ValueError: It is not such a file, or of another format.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            letters, minima, words = (arrays[name] for name in ("letters", "minima", "words"))
            form, of = int(arrays["format"]), int(arrays["of"])
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError("not a file of sketches") from error
    kinds = (letters.dtype, minima.dtype, words.dtype) == (np.uint64, np.uint8, np.uint16)
    if form != FORMAT or not kinds or minima.shape != (len(letters), MINIMA) or words.shape != letters.shape:
        raise ValueError("sketches of another version")
    return TextSketches(letters, minima, words, of)
