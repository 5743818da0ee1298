"""Words and their labels after parts of the text were replaced: one word can become several, and several can become one.

A word that no replaced place touches stays, with its label. Words that a place touches form a group, which becomes the words of
the new text. The labels of a group are those of one entity: the entity that continues after the group, else the first in it. So
valid BIO tags stay valid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mtl_jax.audit.deidentification import Identifier, moved
from mtl_jax.core.errors import count

_WORD = re.compile(r"\S+")


class WordGroup(NamedTuple):
    """Words of the old text, and the words that replace them.

    Attributes:
        start: The first word.
        end: The word after the last.
        words: The new words; at least one.
    """

    start: int
    end: int
    words: tuple[str, ...]


def spans_of(words: str | Sequence[str]) -> list[tuple[int, int]]:
    """The characters of each word of a text, or of a list of words in the text that joins them by spaces."""
    if isinstance(words, str):
        return [match.span() for match in _WORD.finditer(words)]
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return spans


def word_groups(words: str | Sequence[str], identifiers: Sequence[Identifier], new_text: str) -> list[WordGroup]:
    """The words of a text in groups: each untouched word alone, and the words that replaced places touch.

    Args:
        words: The words, or their text.
        identifiers: The replaced places of the text, in order, without white space at their ends.
        new_text: The text after the replacement.
    """
    text = words if isinstance(words, str) else " ".join(words)
    spans = spans_of(words)
    groups: list[WordGroup] = []
    word = place = 0
    while word < len(spans):
        first, touched = word, False
        while place < len(identifiers) and identifiers[place].start < spans[word][1]:
            touched = True
            while word + 1 < len(spans) and spans[word + 1][0] < identifiers[place].end:
                word += 1
            place += 1
        word += 1
        start, end = spans[first][0], spans[word - 1][1]
        if touched:
            new_start, new_end = moved(identifiers, start, end)
            part = new_text[new_start:new_end]
            groups.append(WordGroup(first, word, tuple(part.split()) or (part,)))
        else:
            groups.append(WordGroup(first, word, (text[start:end],)))
    return groups


def moved_labels(labels: Sequence[str | None], groups: Sequence[WordGroup]) -> list[str | None]:
    """The labels of the new words.

    Args:
        labels: A label for each old word; None for a word without one.
        groups: The groups of all words.
    """
    return [label for group in groups for label in _of_group(labels, group)]


def _of_group(labels: Sequence[str | None], group: WordGroup) -> list[str | None]:
    old = labels[group.start : group.end]
    if len(old) == len(group.words) == 1:
        return list(old)
    after = labels[group.end] if group.end < len(labels) else None
    goes_on = after is not None and after.startswith("I-") and _entity(old[-1]) == after[2:]
    first_named = next((label for label in old if label not in (None, "O")), old[0])
    label = old[-1] if goes_on else first_named
    entity = _entity(label)
    new = [label] * len(group.words)
    if entity:
        first = old[0] if _entity(old[0]) == entity else f"B-{entity}"
        new = [first, *[f"I-{entity}"] * (len(group.words) - 1)]
    if old[-1] is None and after is not None and after.startswith("I-"):
        new[-1] = None  # after a word without label every tag is valid, and this one only there
    return new


def _entity(label: str | None) -> str:
    """X for B-X and I-X; else empty."""
    return label[2:] if label is not None and label.startswith(("B-", "I-")) else ""


def lines_of(lines: Sequence[int], groups: Sequence[WordGroup]) -> list[int]:
    """The line of each new word in its file: that of the old word in its place.

    Args:
        lines: The line of each old word.
        groups: The groups of all words.
    """
    return [lines[min(group.start + i, group.end - 1)] for group in groups for i in range(len(group.words))]


def with_labels(value: Any, groups: Sequence[WordGroup], unlabelled: Sequence[str] = ()) -> Any:
    """A column of word labels, a list or a text with spaces, for the new words; None stays, and a text that means "no label".

    Args:
        value: The column.
        groups: The groups of all words.
        unlabelled: The values that mean "no label", of a word or of the row.

    Raises:
        ValueError: It does not have as many labels as there are words.
    """
    if value is None or (isinstance(value, str) and value.strip() in unlabelled):
        return value
    labels = value.split() if isinstance(value, str) else value
    words = groups[-1].end if groups else 0
    if len(labels) != words:
        raise ValueError(f"{count(words, 'word')} and {count(len(labels), 'label')}; there must be one for each word")
    none = next((label for label in labels if label in unlabelled), None)
    new = moved_labels([None if label in unlabelled else label for label in labels], groups)
    new = [none if label is None else label for label in new]
    return " ".join(str(label) for label in new) if isinstance(value, str) else new
