"""Rows as their source changes them when they are read; labels of words and answers stay where they belong.

The change is a RowEdit, a field of the Source. It sees some hundred rows at once, so that a model can be part of it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mtl_jax.core import row_texts
from mtl_jax.core.errors import UserError, count
from mtl_jax.data.formats.rows import Read, Row
from mtl_jax.data.labels import Labels
from mtl_jax.data.source import EditRows, Source, TextColumns

CHUNK = 512  # rows that are changed at once


def text_columns(source: Source, tasks: Sequence[Labels]) -> TextColumns:
    """The columns of a source that a change of its texts concerns.

    Args:
        source: The source.
        tasks: Tasks, of which those of this source name columns with labels of words, with target texts, and with further texts
            that the model reads.
    """
    of_source = [task for task in tasks if task.source == source.name]
    texts = [source.text, source.pair, "context"]
    targets = [name for task in of_source for name in task.text_columns if name not in texts]
    inputs = [name for task in of_source for name in task.input_columns if name not in targets]
    unlabelled: dict[str, tuple[str, ...]] = {}
    for task in of_source:
        if task.label_level == "word" and (name := getattr(task, "column", "")):
            unlabelled[name] = unlabelled.get(name, ()) + tuple(getattr(task, "unlabelled", ()))
    return TextColumns(
        source.text,
        _different([*texts, *inputs]),
        _different(targets),
        tuple(unlabelled),
        source.pair or "context",
        tuple(unlabelled.values()),
    )


def _different(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


def check(source: Source) -> None:
    """Raises UserError where a field of the change of a source's rows makes no sense, before any row is read."""
    if source.deidentify is not None:
        source.deidentify.check(f"source {source.name!r}: deidentify")


def editor(source: Source, tasks: Sequence[Labels]) -> EditRows | None:
    """The function that changes the rows of a source; None where they stay as they are.

    Args:
        source: The source.
        tasks: As for text_columns().

    Raises:
        UserError: A field of the change makes no sense, or it needs a file or run that cannot be read.
    """
    if source.deidentify is None:
        return None
    check(source)
    hide = row_texts.hiding_if(lambda rows: True)  # texts before the change, also those that a model remarks on
    return hide(source.deidentify.editor(text_columns(source, tasks)))


def edited(edit: EditRows | None, rows: Any, counts: Counter[str]) -> Any:
    """The rows after their change; rows of data sets on disk are then read into memory.

    Args:
        edit: As editor() returns it.
        rows: Rows, in place of a bad one its error; returned as they are where there is no change.
        counts: What the change counts is added.
    """
    return rows if edit is None else _edited(edit, rows, counts)


def _edited(edit: EditRows, rows: Iterable[Read], counts: Counter[str]) -> Iterator[Read]:
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        changed = iter(edit([row for row in chunk if isinstance(row, Row)]))
        for item in chunk:
            if isinstance(item, UserError):
                yield item
                continue
            row, numbers = next(changed)
            counts.update(numbers)
            yield row


def all_edited(edit: EditRows | None, rows: Sequence[Row]) -> list[Row]:
    """The rows after their change, in memory.

    Raises:
        UserError: One of them cannot be read.
    """
    result: list[Row] = []
    for item in edited(edit, rows, Counter()):
        if isinstance(item, UserError):
            raise item
        result.append(item)
    return result


def remark(source: str, counts: Mapping[str, int]) -> str:
    """A line on what was replaced, without any text."""
    if not counts:
        return f"source {source}: nothing was found to de-identify"
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(counts.items()))
    return f"source {source}: {count(sum(counts.values()), 'place')} de-identified ({kinds})"
