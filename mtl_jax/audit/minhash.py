"""MinHash with banding finds sets of n-grams that may be alike without comparing all pairs, and then compares them.

The minimum of a random function over a set is the same for two sets with probability J, their Jaccard similarity (Broder, 1997,
"On the resemblance and containment of documents"). A band is R such minima: two sets agree in all of one band with probability
J^R, and in at least one of B bands with probability 1 - (1 - J^R)^B. R is as large as MOST minima allow, B such that a pair
exactly at the threshold is a candidate with probability RECALL or more:

| threshold | R | B | minima | candidates at the threshold | at threshold + .1 | at J = .3 | at J = .1 |
|---|---|---|---|---|---|---|---|
| 0.5 | 3 | 40 | 120 | 0.9952 | 0.99994 | 0.67 | 0.039 |
| 0.6 | 3 | 22 | 66 | 0.9953 | 0.9999 | 0.45 | 0.022 |
| 0.7 | 4 | 20 | 80 | 0.9959 | 0.99997 | 0.15 | 0.002 |
| 0.8 | 6 | 18 | 108 | 0.9958 | 1.0 | 0.013 | 0.00002 |
| 0.9 | 9 | 11 | 99 | 0.9954 | 1.0 | 0.0002 | 0.00000001 |

Every candidate is then compared by its n-grams themselves, so no pair below the threshold is returned, and similarities are
exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from mtl_jax.audit.grams import BITS, Grams

RECALL = 0.995
MOST = 128  # minima of a set
ROWS_OF_SAME = 8  # minima for the threshold 1: equal sets agree in all
SEED = 0x6D746C5F6A6178
CHUNK_GRAMS = 1 << 15  # n-grams that are hashed at once: they stay in the processor's cache
CHUNK_PAIRS = 1 << 20  # candidates that are looked at, and
CHUNK_COMPARED = 1 << 16  # that are compared, at once


class Bands(NamedTuple):
    """How candidates are found.

    Attributes:
        rows: Minima in a band.
        number: Number of bands.
    """

    rows: int
    number: int

    @property
    def minima(self) -> int:
        """Number of minima of a set."""
        return self.rows * self.number

    def recall(self, similarity: float) -> float:
        """The probability that two sets of this Jaccard similarity are a candidate."""
        return 1 - (1 - similarity**self.rows) ** self.number


def bands(threshold: float) -> Bands:
    """The bands for a threshold, as in the table above. Below .041, MOST minima are too few for RECALL.

    Args:
        threshold: The least Jaccard similarity, above 0 and at most 1.
    """
    result = Bands(1, 1)
    for rows in range(1, MOST + 1 if threshold < 1 else ROWS_OF_SAME + 1):
        miss = -math.expm1(rows * math.log(threshold))  # 1 - threshold^rows, also where that is near 0
        number = 1 if miss <= 0 else MOST if miss >= 1 else math.ceil(math.log(1 - RECALL) / math.log(miss))
        if rows > 1 and rows * number > MOST:
            break
        result = Bands(rows, min(number, MOST))
    return result


def sketches(texts: Grams, minima: int) -> np.ndarray:
    """The minima u32[N, minima] of N sets of n-grams; a set without n-grams has the largest number everywhere.

    Args:
        texts: The n-grams.
        minima: The number of functions. The first functions are the same for every number.
    """
    factors, terms = _functions(minima)
    result = np.full((len(texts.words), minima), 0xFFFFFFFF, np.uint32)
    filled = np.flatnonzero(texts.sizes)
    starts = texts.starts[filled]
    ends = texts.starts[filled + 1]
    first = 0
    while first < len(filled):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + CHUNK_GRAMS, side="right")))
        values = texts.hashes[starts[first] : ends[last - 1]].astype(np.uint64)
        offsets = starts[first:last] - starts[first]
        columns = np.empty((minima, last - first), np.uint32)
        for number in range(minima):
            hashed = ((values * factors[number] + terms[number]) >> np.uint64(32)).astype(np.uint32)
            np.minimum.reduceat(hashed, offsets, out=columns[number])
        result[filled[first:last]] = columns.T
        first = last
    return result


def _functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and terms u64[count] of multiply-shift hashing (Dietzfelbinger and others, 1997), by SplitMix64."""
    numbers, state = [], SEED
    for _ in range(2 * count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        value = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(value ^ (value >> 31))
    values = np.array(numbers, np.uint64)
    return values[::2] | np.uint64(1), values[1::2]


def similar(
    texts: Grams, threshold: float, first: np.ndarray, second: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of sets whose Jaccard similarity is at least the threshold.

    Args:
        texts: The n-grams of N texts.
        threshold: The least similarity, above 0 and at most 1.
        first: i64, ascending text numbers of one side of the pairs.
        second: The same for the other side; None: pairs within `first`, each once.

    Returns:
        Pairs i64[M, 2], sorted; their similarities f64[M]. No text is paired with itself.
    """
    plan = bands(threshold)
    signatures = sketches(texts, max(plan.minima, 64))
    first = first[texts.sizes[first] > 0]
    second = None if second is None else second[texts.sizes[second] > 0]
    bits = np.packbits((signatures[:, :64] & np.uint32(1)).astype(np.uint8), axis=1).view(np.uint64)[:, 0]
    # A pair at the threshold has (1 + threshold) / 2 of 64 bits in common; six standard deviations below that it is not one.
    share = (1 + threshold) / 2
    least_equal = 64 * share - 6 * math.sqrt(64 * share * (1 - share))
    sizes, count = texts.sizes, np.int64(len(texts.words))
    keys = np.stack(
        [_band_keys(signatures[:, start : start + plan.rows]) for start in range(0, plan.minima, plan.rows)], axis=1
    )
    del signatures
    parts = [np.zeros(0, np.int64)]
    for band in range(plan.number):
        for left, right in _collisions(np.ascontiguousarray(keys[:, band]), first, second):
            small, large = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
            likely = (small >= threshold * large) & (64 - np.bitwise_count(bits[left] ^ bits[right]) >= least_equal)
            likely &= left != right
            left, right = left[likely], right[likely]
            seen = (keys[left, :band] == keys[right, :band]).any(axis=1)  # in an earlier band
            parts.append(left[~seen] * count + right[~seen])
    codes = np.sort(np.concatenate(parts))
    pairs = np.stack([codes // count, codes % count], axis=1)
    similarities = jaccard(texts, pairs)
    kept = similarities >= threshold
    return pairs[kept], similarities[kept]


def _band_keys(minima: np.ndarray) -> np.ndarray:
    """u64[N]: equal if all minima u32[N, R] of a band are equal."""
    keys = np.zeros(len(minima), np.uint64)
    for column in minima.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _collisions(keys: np.ndarray, first: np.ndarray, second: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers (i64, i64) of texts with the same key, about CHUNK_PAIRS at once; within `first`, the smaller number first."""
    others = first if second is None else second
    order = others[np.argsort(keys[others], kind="stable")]
    ordered = keys[order]
    lefts = order if second is None else first
    ends = np.searchsorted(ordered, keys[lefts], side="right")
    begins = np.arange(1, len(order) + 1) if second is None else np.searchsorted(ordered, keys[lefts], side="left")
    counts = ends - begins
    kept = counts > 0
    lefts, begins, counts = lefts[kept], begins[kept], counts[kept]
    totals = np.cumsum(counts)
    start = 0
    while start < len(lefts):
        done = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, done + CHUNK_PAIRS, side="right")))
        repeats = counts[start:stop]
        inner = np.arange(repeats.sum()) - np.repeat(totals[start:stop] - repeats - done, repeats)
        yield np.repeat(lefts[start:stop], repeats), order[np.repeat(begins[start:stop], repeats) + inner]
        start = stop


def jaccard(texts: Grams, pairs: np.ndarray) -> np.ndarray:
    """The Jaccard similarities f64[M] of pairs i64[M, 2] of sets of n-grams; 0 if both are empty."""
    matrix = csr_array((np.ones(len(texts.hashes), np.int8), texts.hashes, texts.starts), shape=(len(texts.words), 1 << BITS))
    sizes = texts.sizes
    parts = [np.zeros(0)]
    for start in range(0, len(pairs), CHUNK_COMPARED):
        left, right = pairs[start : start + CHUNK_COMPARED].T
        common = np.diff(matrix[left].multiply(matrix[right]).tocsr().indptr)
        parts.append(common / np.maximum(sizes[left] + sizes[right] - common, 1))
    return np.concatenate(parts)
