"""Copies between two lists of texts, or within one: exact, with the same letters and digits, or near.

Near is a Jaccard similarity of the sets of n-grams (words and pairs of words) at or above a threshold. With k of 10 k words
replaced, (17 k - 1) of (23 k - 1) n-grams remain, .727 to .739: at the threshold .7, a text of ten words or more in which one
word in ten was replaced is a copy. Pairs of words alone would leave .636 to .667.

In a short text one different word makes another sentence ("what is the weather in Paris"). If one of two texts has fewer than
SHORT words, they are near copies only from the similarity SHORT_THRESHOLD on: the same words in the same order, except for
repetitions. Two pairs of texts are near copies if both texts of one pair are near copies of those of the other, in either
order; their similarity is the lower of the two.

Texts with the same letters and digits are copies at any length, of similarity 1. An empty text has no copies; a text without
letters and digits, such as "?!", only exact ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtl_jax.audit import text_keys
from mtl_jax.audit.grams import Grams, grams
from mtl_jax.audit.minhash import jaccard, similar
from mtl_jax.audit.text_keys import Text, sides
from mtl_jax.core.errors import UserError
from mtl_jax.core.text_lines import as_list

SHORT, SHORT_THRESHOLD = 8, 0.9
KINDS = ("exact", "letters", "near")
EXACT, LETTERS, NEAR = range(len(KINDS))


class Pool(NamedTuple):
    """N texts without repetitions.

    Attributes:
        number_of: i64[N], for each text its number among the U different texts; -1 for an empty text.
        texts: The U different texts, the first of each.
        letters: i64[U], equal for texts with the same letters and digits.
        grams: The n-grams of these texts.
    """

    number_of: np.ndarray
    texts: Sequence[Text]
    letters: np.ndarray
    grams: Grams


class Pairs(NamedTuple):
    """M pairs of copies.

    Attributes:
        first: i64[M], numbers of texts.
        second: i64[M], numbers of texts.
        similarities: f64[M], 1 for exact copies and for those with the same letters and digits.
        kinds: i64[M], indices of KINDS.
    """

    first: np.ndarray
    second: np.ndarray
    similarities: np.ndarray
    kinds: np.ndarray


def near_copies(
    train_texts: Sequence[Text], held_out_texts: Sequence[Text], threshold: float = 0.7
) -> list[tuple[int, int, float]]:
    """All pairs of a training text and a held-out text that are copies, exact ones included.

    200,000 texts of one sentence take seconds on one core. A pair at the threshold is found with a probability of .995, a pair
    at .8 practically always; the pairs are the same in every process and on every platform. mtl_jax.audit.minhash has the
    arithmetic.

    Args:
        train_texts: Texts; or pairs of texts, which are copies of one another in either order.
        held_out_texts: Texts, or pairs of texts.
        threshold: The least similarity, above 0 and at most 1. Short texts need at least .9.

    Returns:
        (index in train_texts, index in held_out_texts, similarity), sorted.

    Raises:
        UserError: The threshold is not above 0 and at most 1, or one of the texts is not a str.

    Examples:
        >>> near_copies(["A moore 's film !", "It rains."], ["a Moore's film", "it snows"])
        [(0, 0, 1.0)]
    """
    check(threshold)
    train_list, held_out_list = checked(train_texts, "train_texts"), checked(held_out_texts, "held_out_texts")
    collected = pool([*train_list, *held_out_list])
    train, held_out = np.split(collected.number_of, [len(train_list)])
    pairs = copies(collected, threshold, _present(train), _present(held_out))
    return _listed(_expanded(pairs, train, held_out))


def copies_within(texts: Sequence[Text], threshold: float = 0.7) -> list[tuple[int, int, float]]:
    """All pairs of texts in one list that are copies, as near_copies(); the smaller index first.

    Args:
        texts: Texts, or pairs of texts.
        threshold: The least similarity, above 0 and at most 1.

    Raises:
        UserError: As near_copies().

    Examples:
        >>> copies_within(["Yes!", "no", "yes"])
        [(0, 2, 1.0)]
    """
    check(threshold)
    collected = pool(checked(texts, "texts"))
    pairs = copies(collected, threshold, _present(collected.number_of))
    expanded = _expanded(pairs, collected.number_of, collected.number_of)
    # Two different texts are one pair, in either order of their numbers; a text with itself gives every pair of its rows.
    low, high = np.minimum(expanded.first, expanded.second), np.maximum(expanded.first, expanded.second)
    kept = (expanded.first < expanded.second) | (collected.number_of[expanded.first] != collected.number_of[expanded.second])
    return _listed(Pairs(low[kept], high[kept], expanded.similarities[kept], expanded.kinds[kept]))


def check(threshold: float, what: str = "threshold") -> None:
    """Raises UserError unless a threshold is above 0 and at most 1."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise UserError(f"{what} is {threshold!r}; it must be a number above 0 and at most 1, such as 0.7")


def checked(texts: Sequence[Text], what: str) -> list[Text]:
    """The texts as a list; an iterator is read once.

    Raises:
        UserError: They are one text, or one of them is neither a text nor a pair of texts.
    """
    texts = as_list(texts, what)
    for number, text in enumerate(texts):
        if isinstance(text, str):
            continue
        if not isinstance(text, list | tuple) or not all(isinstance(side, str) for side in text):
            kind = type(text).__name__
            raise UserError(f"{what}[{number}] is a {kind}; it must be a text, or a pair of texts")
    return texts


def pool(texts: Sequence[Text]) -> Pool:
    """The different texts among some, with their keys and n-grams for copies().

    Args:
        texts: Texts, or pairs of texts.
    """
    numbers: dict[str, int] = {"": -1}
    different: list[Text] = []
    number_of = np.empty(len(texts), np.int64)
    for index, text in enumerate(texts):
        number = numbers.setdefault(text_keys.exact(text), len(different))
        if number == len(different):
            different.append(text)
        number_of[index] = number
    groups: dict[str, int] = {}
    letters = np.empty(len(different), np.int64)
    for index, text in enumerate(different):
        key = text_keys.letters(text)
        letters[index] = groups.setdefault(key, len(groups)) if key else -1 - index
    return Pool(number_of, different, letters, grams(different))


def copies(texts: Pool, threshold: float, first: np.ndarray, second: np.ndarray | None = None) -> Pairs:
    """The pairs of different texts that are copies; a text that is on both sides is also paired with itself.

    Args:
        texts: The pool.
        threshold: The least similarity of near copies.
        first: i64, ascending numbers of texts of the pool.
        second: The same for the other text; None: pairs within `first`, the smaller number first, and each text with itself.
    """
    both = first if second is None else np.intersect1d(first, second)
    others = first if second is None else second
    left, right = matches(texts.letters[first], texts.letters[others])
    left, right = first[left], others[right]
    kept = left < right if second is None else left != right
    left, right = left[kept], right[kept]
    pairs, similarities = similar(texts.grams, threshold, first, second)
    if second is None:
        pairs = np.sort(pairs, axis=1)
    unlike = texts.letters[pairs[:, 0]] != texts.letters[pairs[:, 1]]
    pairs, similarities = pairs[unlike], similarities[unlike]
    near = _near_enough(similarities, texts.grams.words[pairs], threshold)
    _by_sides(texts.texts, pairs, similarities, near, threshold)
    pairs, similarities = pairs[near], similarities[near]
    counts = [len(both), len(left), len(pairs)]
    return Pairs(
        np.concatenate([both, left, pairs[:, 0]]),
        np.concatenate([both, right, pairs[:, 1]]),
        np.concatenate([np.ones(counts[0] + counts[1]), similarities]),
        np.repeat([EXACT, LETTERS, NEAR], counts),
    )


def _near_enough(similarities: np.ndarray, words: np.ndarray, threshold: float) -> np.ndarray:
    """bool[M]: whether texts with similarities f64[M] and numbers of words i32[M, 2] are near copies."""
    short = words.min(axis=1) < SHORT
    return similarities >= np.where(short, max(threshold, SHORT_THRESHOLD), threshold)


def _by_sides(texts: Sequence[Text], pairs: np.ndarray, similarities: np.ndarray, near: np.ndarray, threshold: float) -> None:
    """Writes `similarities` and `near` for pairs of texts, whose texts are compared one by one."""
    both = np.array([len(sides(texts[i])) == len(sides(texts[j])) == 2 for i, j in pairs.tolist()], bool)
    rows = np.flatnonzero(both)
    if not len(rows):
        return
    numbers, places = np.unique(pairs[rows], return_inverse=True)
    of_sides = grams([side for number in numbers.tolist() for side in sides(texts[number])])
    first, second = 2 * places.reshape(-1, 2).T
    best, accepted = np.zeros(len(rows)), np.zeros(len(rows), bool)
    for swap in (0, 1):
        least, enough = np.ones(len(rows)), np.ones(len(rows), bool)
        for side in (0, 1):
            compared = np.stack([first + side, second + (side ^ swap)], axis=1)
            values = jaccard(of_sides, compared)
            least = np.minimum(least, values)
            enough &= _near_enough(values, of_sides.words[compared], threshold)
        accepted |= enough
        best = np.maximum(best, np.where(enough, least, 0))
    similarities[rows] = np.where(accepted, best, similarities[rows])
    near[rows] = accepted


def _present(numbers: np.ndarray) -> np.ndarray:
    different = np.unique(numbers)
    return different[different >= 0]


def matches(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) with first[i] == second[j], sorted: two arrays i64[M].

    Args:
        first: i64[N].
        second: i64[K].
    """
    order = np.argsort(second, kind="stable")
    ordered = second[order]
    begins = np.searchsorted(ordered, first, side="left")
    counts = np.searchsorted(ordered, first, side="right") - begins
    ends = np.cumsum(counts)
    inner = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(np.arange(len(first)), counts), order[np.repeat(begins, counts) + inner]


def _expanded(pairs: Pairs, first: np.ndarray, second: np.ndarray) -> Pairs:
    """Pairs of texts of a pool as pairs of rows.

    Args:
        pairs: The pairs.
        first: i64, the text number of each row on one side.
        second: i64, the text number of each row on the other side.
    """
    origin, rows = matches(pairs.first, first)
    again, others = matches(pairs.second[origin], second)
    rows, origin = rows[again], origin[again]
    return Pairs(rows, others, pairs.similarities[origin], pairs.kinds[origin])


def _listed(pairs: Pairs) -> list[tuple[int, int, float]]:
    order = np.lexsort([pairs.second, pairs.first])
    columns = pairs.first[order].tolist(), pairs.second[order].tolist(), pairs.similarities[order].tolist()
    return list(zip(*columns, strict=True))
