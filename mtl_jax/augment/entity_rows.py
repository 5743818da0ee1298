"""Rows for taggers: two sentences in one, and entities in place of others of their type."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtl_jax.audit.deidentification import Identifier
from mtl_jax.audit.word_labels import lines_of, moved_labels, spans_of, word_groups
from mtl_jax.augment.aligned import UNCHANGED, labels_of_words
from mtl_jax.core.errors import UserError
from mtl_jax.data.augmentations import check_shares
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Augmentation, AugmentedRows, MakeRows
from mtl_jax.tasks import bio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concatenate(Augmentation):
    """A sentence is followed by another sentence of the training rows with its labels: entities in a longer context.

    For labels of words. Other labels of a row, such as a class of the whole text, would no longer be right.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations.
        seed: As in all augmentations.

    Examples:
        >>> source = mtl_jax.Source("news", "train.conll", format="conll", columns=("text", "tags"))
        >>> source = dataclasses.replace(source, augment=(mtl_jax.augment.Concatenate(share=0.3),))
    """

    keeps: ClassVar[tuple[str, ...]] = ("word",)
    joins_rows: ClassVar[bool] = True
    growth: ClassVar[float] = 1.0

    def maker(self, source: AugmentedRows) -> MakeRows:
        # Not in the order of the file, on which no draw depends.
        others = sorted(source.rows, key=lambda row: " ".join(_words(row, source)))

        def make(rows: Sequence[Row], generators: Sequence[np.random.Generator]) -> list[Row | str]:
            return [
                joined(row, others[int(rng.integers(len(others)))], source) for row, rng in zip(rows, generators, strict=True)
            ]

        return make


def _words(row: Row, source: AugmentedRows) -> list[str]:
    value = row.columns.get(source.columns.text)
    return value.split() if isinstance(value, str) else list(value or [])


def joined(row: Row, other: Row, source: AugmentedRows) -> Row:
    """A row followed by another, with the words and labels of words of both, and the other columns of the first.

    Args:
        row: The row.
        other: The row after it.
        source: Their source.
    """
    text, first, second = source.columns.text, _words(row, source), _words(other, source)
    labels, more = labels_of_words(row, source), labels_of_words(other, source)
    changed: dict[str, Any] = {}
    for name in {**labels, **more}:
        behind = more.get(name) or [None] * len(second)
        if behind[0] is not None and behind[0].startswith("I-"):  # it would continue an entity of the first row
            behind = [f"B-{behind[0][2:]}", *behind[1:]]
        changed[name] = [*(labels.get(name) or [None] * len(first)), *behind]
    value, value_behind = row.columns[text], other.columns[text]
    both_texts = isinstance(value, str) and isinstance(value_behind, str)
    changed[text] = f"{value} {value_behind}" if both_texts else [*first, *second]
    lines = None
    if row.words is not None and other.words is not None and row.words[0] == other.words[0]:
        lines = (row.words[0], [*row.words[1], *other.words[1]])
    return row._replace(columns={**row.columns, **changed}, words=lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MentionReplacement(Augmentation):
    """Entities are replaced by others of their type from the training rows (Dai and Adel, 2020).

    One word can become several, and several can become one; labels follow, as B-X and I-X. Replaced words have no labels of
    other columns, such as parts of speech.

    Attributes:
        share: As in all augmentations.
        added: As in all augmentations.
        seed: As in all augmentations.
        mentions: The probability that an entity of a row is replaced.

    References:
        https://arxiv.org/abs/2010.11683

    Examples:
        >>> source = mtl_jax.Source("news", "train.conll", format="conll", columns=("text", "tags"))
        >>> source = dataclasses.replace(source, augment=(mtl_jax.augment.MentionReplacement(mentions=0.5),))
    """

    mentions: float = 0.5

    keeps: ClassVar[tuple[str, ...]] = ("word",)
    joins_rows: ClassVar[bool] = True
    growth: ClassVar[float] = 0.1

    def check(self, where: str) -> None:
        check_shares(self, where, "mentions")
        if not self.mentions:
            raise UserError(f"{where}: mentions is 0, so nothing would change; raise it")

    def maker(self, source: AugmentedRows) -> MakeRows:
        known = {kind: sorted(names) for kind, names in mentions_of(source).items()}
        if not known:
            raise UserError(
                f"source {source.source.name!r}: no training row has an entity, a word with a tag B-something, so "
                "MentionReplacement has nothing to replace; leave it out"
            )

        def make(rows: Sequence[Row], generators: Sequence[np.random.Generator]) -> list[Row | str]:
            return [self._replaced(row, source, known, rng) for row, rng in zip(rows, generators, strict=True)]

        return make

    def _replaced(self, row: Row, source: AugmentedRows, known: dict[str, list[str]], rng: np.random.Generator) -> Row | str:
        value: Any = row.columns[source.columns.text]
        text, spans = value if isinstance(value, str) else " ".join(value), spans_of(value)
        labels = labels_of_words(row, source)
        parts: list[str] = []
        places: list[Identifier] = []
        done = length = 0
        for entity in _entities(labels):
            start, end = spans[entity.start][0], spans[entity.end - 1][1]
            others = [name for name in known.get(entity.type, ()) if name != text[start:end]]
            if not others or rng.random() >= self.mentions:
                continue
            new = others[int(rng.integers(len(others)))]
            length += start - done
            parts += [text[done:start], new]
            places.append(Identifier(entity.type, start, end, length, length + len(new)))
            done, length = end, length + len(new)
        if not places:
            return UNCHANGED
        new_text = "".join([*parts, text[done:]])
        groups = word_groups(value, places, new_text)
        changed: dict[str, Any] = {
            source.columns.text: new_text if isinstance(value, str) else [word for group in groups for word in group.words]
        }
        starts = {place.start for place in places}
        for name, column in labels.items():
            if bio.has_entities(label for label in column if label):
                changed[name] = moved_labels(column, groups)
            else:
                replaced = [spans[group.start][0] in starts for group in groups]
                changed[name] = [
                    None if new else column[group.start]
                    for group, new in zip(groups, replaced, strict=True)
                    for _ in group.words
                ]
        lines = None if row.words is None else (row.words[0], lines_of(row.words[1], groups))
        return row._replace(columns={**row.columns, **changed}, words=lines)


def _entities(labels: dict[str, list[str | None]]) -> list[bio.Entity]:
    """The entities of a row, from the first column that has some."""
    for column in labels.values():
        tags = [label or "O" for label in column]
        if bio.is_bio(tags) and (entities := bio.entities(tags)):
            return entities
    return []


def mentions_of(source: AugmentedRows) -> dict[str, set[str]]:
    """{type: the different entities of the training rows, words joined by spaces}."""
    mentions: dict[str, set[str]] = defaultdict(set)
    for row in source.rows:
        words = _words(row, source)
        for entity in _entities(labels_of_words(row, source)):
            mentions[entity.type].add(" ".join(words[entity.start : entity.end]))
    return mentions
