"""Edits of words without a model: EDA's four edits, punctuation between words, typing errors, and cutting out a stretch."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from mtl_jax.augment.aligned import NEW, EditWords, Word, Words, edited, is_entity, labels_of_words
from mtl_jax.core.errors import UserError
from mtl_jax.core.row_texts import named
from mtl_jax.data.augmentations import check_shares
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Augmentation, AugmentedRows, MakeRows

PUNCTUATION = (".", ";", "?", ":", "!", ",")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordEdit(Augmentation, abc.ABC):
    """Base of edits of the words of a text; labels of words and answers move with the words.

    A subclass defines edit_words(). Words of entities and answers are protected: Words.fixed.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations.
        seed: As in all augmentations.
    """

    keeps: ClassVar[tuple[str, ...]] = ("example", "word", "answer")

    @abc.abstractmethod
    def edit_words(self, source: AugmentedRows) -> EditWords:
        """The function from the words of a text to its new words."""

    def maker(self, source: AugmentedRows) -> MakeRows:
        edit = self.edit_words(source)

        def make(rows: Sequence[Row], generators: Sequence[np.random.Generator]) -> list[Row | str]:
            return [edited(row, source, edit, rng) for row, rng in zip(rows, generators, strict=True)]

        return make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eda(WordEdit):
    """Words are swapped, deleted, inserted and replaced, as in EDA (Wei and Zou, 2019), without a list of synonyms.

    Words that are inserted or that replace others are drawn from the training rows of the source. Words that carry little
    information are drawn and replaced more often (TF-IDF, as in UDA, Xie et al., 2020). For taggers of entities, no word of an
    entity is drawn. MaskedNeighbours draws words that fit their place.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations.
        seed: As in all augmentations.
        swap: The share of a text's words that change places with another.
        delete: The probability that a word is deleted.
        insert: The number of inserted words, as a share of the text's.
        substitute: The share of a text's words that are replaced.

    References:
        https://arxiv.org/abs/1901.11196, https://arxiv.org/abs/1904.12848

    Examples:
        >>> eda = mtl_jax.augment.Eda(swap=0.0, delete=0.2, insert=0.0, substitute=0.0)
        >>> mtl_jax.augment.texts(eda, ["a quiet film about a man who walks home"], seed=1)
        ['a quiet film about man who walks home']
    """

    swap: float = 0.1
    delete: float = 0.1
    insert: float = 0.1
    substitute: float = 0.1

    @property
    def joins_rows(self) -> bool:  # type: ignore[override]
        return self.insert > 0 or self.substitute > 0

    @property
    def growth(self) -> float:  # type: ignore[override]
        return max(0.0, self.insert - self.delete)

    def check(self, where: str) -> None:
        fields = ("swap", "delete", "insert", "substitute")
        check_shares(self, where, *fields)
        if not any(getattr(self, field) for field in fields):
            raise UserError(
                f"{where}: swap, delete, insert and substitute are all 0, so nothing would change; raise one of them"
            )

    def edit_words(self, source: AugmentedRows) -> EditWords:
        draw, says_little = _word_source(source) if self.joins_rows else (_no_word, lambda word: 1.0)

        def edit(words: Words, rng: np.random.Generator) -> list[Word]:
            new = [Word(text, place) for place, text in enumerate(words.texts)]
            free = np.flatnonzero(~words.fixed)
            if len(free):
                for place in _some(free, self.substitute, rng, [says_little(words.texts[word]) for word in free]):
                    new[place] = Word(draw(rng), int(place), keeps_label=False)
                if len(free) > 1:
                    for place in _some(free, self.swap, rng):
                        other = int(rng.choice(free[free != place]))
                        new[place], new[other] = new[other], new[place]
            deleted = ~words.fixed & (rng.random(len(new)) < self.delete)
            if deleted.all():
                deleted[rng.integers(len(deleted))] = False
            before = _some(np.flatnonzero(~words.joined), self.insert, rng)
            result: list[Word] = []
            for place, word in enumerate(new):
                result += [Word(draw(rng), NEW)] * int(place in before)
                result += [] if deleted[place] else [word]
            return result

        return edit


def _some(places: np.ndarray, share: float, rng: np.random.Generator, weights: Sequence[float] | None = None) -> np.ndarray:
    """Some of the places; their number is rounded up or down at random, so that its mean is the share."""
    expected = share * len(places)
    number = min(len(places), int(expected) + int(rng.random() < expected - int(expected)))
    if not number:
        return places[:0]
    probabilities = None
    if weights is not None:
        positive = np.maximum(np.asarray(weights, np.float64), 1e-6)
        probabilities = positive / positive.sum()
    return rng.choice(places, number, replace=False, p=probabilities)


def _no_word(rng: np.random.Generator) -> str:
    return ""


def _word_source(source: AugmentedRows) -> tuple[Callable[[np.random.Generator], str], Callable[[str], float]]:
    """A function that draws a word of the source, and one from a word to how little information it has, above 0.

    Words are drawn by the root of their frequency times the largest IDF minus their own.
    """
    frequencies, documents = Counter[str](), Counter[str]()
    named_words: set[str] = set()
    for row in source.rows:
        for name in source.columns.texts:
            value = row.columns.get(name)
            words = value.split() if isinstance(value, str) else value
            if isinstance(words, list) and all(isinstance(word, str) for word in words):
                labels = labels_of_words(row, source).values() if name == source.columns.text else ()
                named_words |= {word for tags in labels for word, tag in zip(words, tags, strict=True) if is_entity(tag)}
                frequencies.update(words)
                documents.update(set(words))
    frequencies = Counter({word: number for word, number in frequencies.items() if word not in named_words})
    if not frequencies:
        raise UserError(
            f"source {source.source.name!r}: no training row has a word that Eda could insert in {named(source.columns.texts)}"
        )
    vocabulary = sorted(frequencies)
    idf = np.log(max(len(source.rows), 1) / np.array([documents[word] for word in vocabulary])) + 1
    count = np.array([frequencies[word] for word in vocabulary], np.float64)
    little = idf.max() - idf + 0.1
    cumulated = np.cumsum(count**0.5 * little)  # the root, so that one word is not drawn over and over
    place_of = {word: place for place, word in enumerate(vocabulary)}

    def draw(rng: np.random.Generator) -> str:
        return vocabulary[min(int(np.searchsorted(cumulated, rng.random() * cumulated[-1])), len(vocabulary) - 1)]

    return draw, lambda word: float(little[place_of[word]]) if word in place_of else 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aeda(WordEdit):
    """Punctuation is put between words, as in AEDA (Karimi et al., 2021): no word is lost or moved.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations.
        seed: As in all augmentations.
        most: The most marks, as a share of the text's words; their number is drawn, at least one.

    References:
        https://arxiv.org/abs/2108.13230

    Examples:
        >>> mtl_jax.augment.texts(mtl_jax.augment.Aeda(), ["a quiet film about a man"], seed=1)
        ['a quiet film about a ; man']
    """

    most: float = 0.3333

    keeps: ClassVar[tuple[str, ...]] = ("example", "word", "answer", "target")

    @property
    def growth(self) -> float:  # type: ignore[override]
        return self.most / 2

    def check(self, where: str) -> None:
        check_shares(self, where, "most")
        if not self.most:
            raise UserError(f"{where}: most is 0, so nothing would change; raise it")

    def edit_words(self, source: AugmentedRows) -> EditWords:
        def edit(words: Words, rng: np.random.Generator) -> list[Word]:
            free = np.flatnonzero(~words.joined)
            number = min(len(free), int(rng.integers(1, max(1, int(self.most * len(words.texts))) + 1)))
            before = set(rng.choice(free, number, replace=False).tolist()) if number else set()
            result: list[Word] = []
            for place, text in enumerate(words.texts):
                result += [Word(str(rng.choice(PUNCTUATION)), NEW)] if place in before else []
                result.append(Word(text, place))
            return result

        return edit


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharacterNoise(WordEdit):
    """Characters of some words are swapped, deleted, doubled or replaced, as typing errors do (Belinkov and Bisk, 2018).

    The number of words stays the same, so labels of words and target texts stay, too. Words of answers do not change. Words of
    entities change like others, because a name with a typing error is still a name.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations.
        seed: As in all augmentations.
        words: The share of a text's words with an error.
        shortest: Words of fewer characters do not change.

    References:
        https://arxiv.org/abs/1711.02173

    Examples:
        >>> mtl_jax.augment.texts(mtl_jax.augment.CharacterNoise(words=0.3), ["a quiet film about a man"], seed=1)
        ['a quiet flm about a man']
    """

    words: float = 0.1
    shortest: int = 3

    keeps: ClassVar[tuple[str, ...]] = ("example", "word", "answer", "target")
    growth: ClassVar[float] = 0.2  # a word with an error has more sub-words

    def check(self, where: str) -> None:
        check_shares(self, where, "words")
        if not self.words:
            raise UserError(f"{where}: words is 0, so nothing would change; raise it")
        if self.shortest < 2:
            raise UserError(f"{where}: shortest is {self.shortest}; an error needs a word of at least 2 characters")

    def edit_words(self, source: AugmentedRows) -> EditWords:
        protects_answers = any(task.needs_offsets for task in source.tasks)

        def edit(words: Words, rng: np.random.Generator) -> list[Word]:
            new = [Word(text, place) for place, text in enumerate(words.texts)]
            fixed = words.fixed if protects_answers else np.zeros(len(new), bool)
            long = np.array([len(text) >= self.shortest for text in words.texts])
            for place in _some(np.flatnonzero(~fixed & long), self.words, rng):
                new[place] = Word(_mistyped(words.texts[place], rng), int(place))
            return new

        return edit


def _mistyped(word: str, rng: np.random.Generator) -> str:
    """The word with one error after its first character."""
    place, kind = int(rng.integers(1, len(word))), int(rng.integers(4))
    if kind == 0 and place + 1 < len(word):
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == 1:
        return word[:place] + word[place + 1 :]
    if kind == 2:
        return word[:place] + word[place] + word[place:]
    return word[:place] + LETTERS[int(rng.integers(len(LETTERS)))] + word[place + 1 :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cutoff(WordEdit):
    """A stretch of words is cut out, as in span cutoff (Shen et al., 2020), here of the text itself.

    Entities and answers are not cut: a stretch that would touch one becomes the longest that fits between them.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations.
        seed: As in all augmentations.
        cut: The length of the stretch, as a share of the text's words.

    References:
        https://arxiv.org/abs/2009.13818

    Examples:
        >>> mtl_jax.augment.texts(mtl_jax.augment.Cutoff(cut=0.3), ["a quiet film about a man"], seed=1)
        ['a quiet film about']
    """

    cut: float = 0.1

    def check(self, where: str) -> None:
        check_shares(self, where, "cut")
        if not 0 < self.cut < 1:
            raise UserError(f"{where}: cut is {self.cut:g}; it must be above 0 and below 1, so that some words stay")

    def edit_words(self, source: AugmentedRows) -> EditWords:
        def edit(words: Words, rng: np.random.Generator) -> list[Word]:
            total = len(words.texts)
            length = min(total - 1, max(1, round(self.cut * total)))
            new = [Word(text, place) for place, text in enumerate(words.texts)]
            while length:
                blocked = np.convolve(words.fixed, np.ones(length, int), "valid")
                starts = np.flatnonzero(blocked == 0)
                if len(starts):
                    start = int(rng.choice(starts))
                    return new[:start] + new[start + length :]
                length -= 1
            return new

        return edit
