"""Edits of words that record the origin of each new word, so that labels of words and answers move with the words.

An edit turns the words of a text into new words, each with its origin: the old word whose place it has, or none. The labels of
the new words, the characters of answers, and the white space between words follow from the origins. Words of entities and of
answers are protected: an edit may not move, delete or replace them, nor put a word between them. So valid BIO tags stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.audit.word_labels import spans_of
from mtl_jax.core.errors import UserError, count
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import AugmentedRows

NEW = -1  # the origin of an inserted word
UNCHANGED = "as it was"  # the reason where an edit found nothing to change


class Word(NamedTuple):
    """A word of an edited text.

    Attributes:
        text: The word.
        origin: The old word whose place it has; NEW: it was inserted.
        keeps_label: Whether it also has that word's labels: it is the word itself, moved or with other characters. Another word
            in its place has the label O, or none if O is not a label.
    """

    text: str
    origin: int
    keeps_label: bool = True


class Words(NamedTuple):
    """The words of a text, as an edit gets them.

    Attributes:
        texts: The words.
        fixed: bool[L]: whether a word must stay unchanged and in its place, like those of entities and answers.
        joined: bool[L]: whether no word may be put before a word, as inside an entity.
    """

    texts: list[str]
    fixed: np.ndarray
    joined: np.ndarray


# From the words of a text and random numbers to the new words, in order.
EditWords = Callable[[Words, np.random.Generator], list[Word]]


def edited(row: Row, source: AugmentedRows, edit: EditWords, rng: np.random.Generator) -> Row | str:
    """A row whose texts an edit has changed, with labels of words and answers, or the reason why there is none.

    Args:
        row: The row.
        source: Its source.
        edit: The edit.
        rng: Random numbers; texts of a row are edited one after another.
    """
    changed: dict[str, Any] = {}
    lines = row.words
    for name in source.columns.texts:
        value: Any = row.columns.get(name)
        words = value.split() if isinstance(value, str) else value
        if not _are_words(words):
            continue
        is_text = name == source.columns.text
        label_columns = labels_of_words(row, source) if is_text else {}
        answers = answer_columns(row) if name == source.columns.context else {}
        spans = spans_of(value)
        fixed, joined = protected(spans, label_columns, answers)
        new = edit(Words(list(words), fixed, joined), rng)
        if not new:
            return "empty"
        if [word.text for word in new] == list(words):
            continue
        if isinstance(value, str):
            changed[name], starts = joined_text(value, spans, new)
            for column, items in answers.items():
                changed[column] = [moved_answer(answer, spans, new, starts) for answer in items]
                if any(changed[name][item["start"] :][: len(item["text"])] != item["text"] for item in changed[column]):
                    return "an answer is not made of whole words"
        else:
            changed[name] = [word.text for word in new]
        changed |= {column: new_labels(labels, new) for column, labels in label_columns.items()}
        if is_text and lines is not None:
            lines = (lines[0], new_lines(lines[1], new))
    return row._replace(columns={**row.columns, **changed}, words=lines) if changed else UNCHANGED


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def labels_of_words(row: Row, source: AugmentedRows) -> dict[str, list[str | None]]:
    """{column: a label for each word}, for columns with labels that the tasks read, and all columns of a file of words.

    Raises:
        UserError: A column does not have as many labels as there are words.
    """
    columns = source.columns
    names = row.columns if row.words is not None else columns.word_labels
    text = row.columns.get(columns.text)
    words = text.split() if isinstance(text, str) else text or []
    result: dict[str, list[str | None]] = {}
    for name in names:
        value = row.columns.get(name)
        if name in columns.texts or value is None or (isinstance(value, str) and not value.strip()):
            continue
        if isinstance(value, str) and value.strip() in columns.no_label(name):
            continue
        labels: list[str | None] = list(value.split()) if isinstance(value, str) else list(value)
        if isinstance(value, str) and len(labels) == 1 and len(words) != 1:  # the whole row has no label, as "_"
            continue
        if len(labels) != len(words):
            raise UserError(f"{row.where}: column {name!r}: {count(len(words), 'word')} and {count(len(labels), 'label')}")
        result[name] = labels
    return result


def is_entity(label: str | None) -> bool:
    """Whether a label is that of a word of an entity."""
    return label is not None and label.startswith(("B-", "I-"))


def answer_columns(row: Row) -> dict[str, list[Any]]:
    """{column: its answers}, for the columns that have some."""
    return {
        name: value
        for name, value in row.columns.items()
        if isinstance(value, list) and value and all(isinstance(answer, dict) for answer in value)
    }


def protected(
    spans: Sequence[tuple[int, int]], labels: Mapping[str, Sequence[str | None]], answers: Mapping[str, Sequence[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """The arrays Words.fixed and Words.joined.

    Args:
        spans: The characters of each word.
        labels: The columns of their labels.
        answers: The columns of answers in the text.
    """
    fixed, joined = np.zeros(len(spans), bool), np.zeros(len(spans), bool)
    for column in labels.values():
        for word, label in enumerate(column):
            fixed[word] |= label is None or is_entity(label)
            joined[word] |= label is not None and label.startswith("I-")
    fixed[:-1] |= joined[1:]
    for items in answers.values():
        for answer in items:
            inside = [
                word
                for word, (start, end) in enumerate(spans)
                if start < answer["start"] + len(answer["text"]) and answer["start"] < end
            ]
            fixed[inside], joined[inside[1:]] = True, True
    return fixed, joined


def new_labels(labels: Sequence[str | None], words: Sequence[Word]) -> list[str | None]:
    """The labels of the new words: those of their origins; for another word O, or none if O is not a label.

    Args:
        labels: The labels of the old words.
        words: The new words.
    """
    other = "O" if "O" in labels or any(map(is_entity, labels)) else None
    return [labels[word.origin] if word.origin != NEW and word.keeps_label else other for word in words]


def new_lines(lines: Sequence[int], words: Sequence[Word]) -> list[int]:
    """The line of each new word in its file; for an inserted word the line of the word before it."""
    result: list[int] = []
    for word in words:
        result.append(lines[word.origin] if word.origin != NEW else result[-1] if result else lines[0])
    return result


def joined_text(text: str, spans: Sequence[tuple[int, int]], words: Sequence[Word]) -> tuple[str, list[int]]:
    """The new words as a text, each after the white space that was before it, and the first character of each.

    Args:
        text: The old text.
        spans: The characters of its words.
        words: The new words.
    """
    parts, starts, length = list[str](), list[int](), 0
    for number, word in enumerate(words):
        gap = " " if number else ""
        if number and word.origin > 0:
            gap = text[spans[word.origin - 1][1] : spans[word.origin][0]]
        parts += [gap, word.text]
        starts.append(length + len(gap))
        length += len(gap) + len(word.text)
    return "".join(parts), starts


def moved_answer(answer: Any, spans: Sequence[tuple[int, int]], words: Sequence[Word], starts: Sequence[int]) -> Any:
    """An answer at its place in the new text, where its words are unchanged and side by side.

    Args:
        answer: {"text", "start"} in the old text.
        spans: The characters of the old words.
        words: The new words.
        starts: Their first characters.
    """
    first = next(word for word, (_, end) in enumerate(spans) if end > answer["start"])
    place = next(number for number, word in enumerate(words) if word.origin == first)
    return {**answer, "start": starts[place] + answer["start"] - spans[first][0]}
