"""Remarks on labels and lengths: labels that no training row has or that are lost with repeated texts, texts that were cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.examples import Counts, Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels
from mtl_jax.data.ragged import Ragged
from mtl_jax.data.splits import RowRef, row_at


def absent_labels(task: Labels, train: Examples) -> list[str]:
    """A line on labels that no training row has, and one on a label set of one label; usually none.

    Args:
        task: A task, filled.
        train: The training examples of its source, with its labels.
    """
    labels = task.labels
    if not labels:
        return []
    values = train.labels[task.name]
    if task.label_shape:  # several labels a row
        absent = np.flatnonzero(~(values == 1).any(axis=0))
    else:
        flat = values.values if isinstance(values, Ragged) else values
        absent = np.flatnonzero(np.bincount(flat[flat >= 0], minlength=len(labels)) == 0)
    lines = []
    if len(absent):
        names = listed([task.shown_labels[index] for index in absent])
        unit = "word" if task.label_level == "word" else "row"
        are = "is" if len(absent) == 1 else "are"
        lines.append(
            f"task {task.name}: {len(absent)} of its {count(len(labels), 'label')} {are} on no training {unit}: {names}"
        )
    if len(labels) == 1 and not task.label_shape:
        lines.append(f"task {task.name}: {task.shown_labels[0]!r} is its only label, so there is nothing to learn")
    return lines


def conflicting_labels(task: Labels, repeats: Sequence[tuple[RowRef, RowRef]]) -> list[str]:
    """A line on dropped rows whose text has another label in the row that is kept; usually none.

    Args:
        task: A task, filled.
        repeats: As in splits.Splits.
    """
    if task.corrupts:
        return []
    count, example = 0, ""
    for dropped, first in repeats:
        rows = row_at(dropped), row_at(first)
        try:
            labels = [task.parse(row) for row in rows]
        except (ValueError, UserError):  # the row is dropped anyway, or the kept row is refused when it is read
            continue
        if labels[0] is not None and not _same(*labels):
            count += 1
            example = example or _example(task, rows)
    if not count:
        return []
    rows_have = "1 of the repeated texts has" if count == 1 else f"{count} of the repeated texts have"
    return [f"task {task.name}: {rows_have} another label than the row that is kept: {example}; {task.conflict_advice}"]


def _same(label: Any, other: Any) -> bool:
    if isinstance(label, np.ndarray):
        return other is not None and np.array_equal(label, other)
    return bool(label == other)


def _example(task: Labels, rows: tuple[Row, Row]) -> str:
    labels = [_raw_label(task, row) for row in rows]
    where = [row.where for row in rows]
    if all(isinstance(label, list) for label in labels) and task.label_level == "word":
        pairs = enumerate(zip(*labels, strict=False))
        word = next((word for word, (label, other) in pairs if label != other), None)
        if word is not None:  # the first word that differs, in place of two whole sentences
            labels = [tags[word] for tags in labels]
            where = [row.where_word(word) if row.words else f"{row.where}, word {word + 1}," for row in rows]
    return " where ".join(f"{line} has {quoted(label)}" for line, label in zip(where, labels, strict=True))


def _raw_label(task: Labels, row: Row) -> Any:
    label = task.raw_label(row)
    if label is None:
        label = task.parse(row)
    return [task.labels[index] for index in np.flatnonzero(label == 1)] if isinstance(label, np.ndarray) else label


def length_remark(tasks: Sequence[Labels], counts: Counts, max_length: int) -> str:
    """A clause on texts that were too long, such as "3 texts cut to 64 tokens".

    Args:
        tasks: The tasks that read the rows.
        counts: The counts of these rows.
        max_length: As for read_examples.
    """
    if not counts.extra:
        return f"{count(counts.truncated, 'text')} cut to {count(max_length, 'token')}"
    remark = (
        f"{count(counts.long, 'long text')} read in {count(counts.extra, 'further window')} of {count(max_length, 'token')}"
    )
    first_only = [task.name for task in tasks if not task.windows]
    read = "reads" if len(first_only) == 1 else "read"
    return f"{remark}, of which {', '.join(first_only)} {read} the first only" if first_only else remark


def label_remarks(tasks: Sequence[Labels], counts: Counts) -> list[str]:
    """Remarks on missing labels and truncated target texts, a line each.

    Args:
        tasks: The tasks whose labels were read.
        counts: The counts of their rows.
    """
    lines = [f"task {name}: {count(blank, 'row has', 'rows have')} no label" for name, blank in counts.blank.items() if blank]
    for task in tasks:
        if counts.truncated_targets[task.name]:
            texts = count(counts.truncated_targets[task.name], "target text")
            lines.append(f"task {task.name}: {texts} cut to {count(task.target_length, 'token')}")
    return lines
