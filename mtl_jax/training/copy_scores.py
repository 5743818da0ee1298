"""Test scores without the test rows that are copies of training rows, beside those of all test rows.

The outputs are those of the same evaluation; only the rows that are counted differ. So both numbers can be published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax.audit.copies import KINDS
from mtl_jax.core.errors import count
from mtl_jax.core.files import number_of
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.ragged import Ragged
from mtl_jax.tasks import Task
from mtl_jax.training.evaluation import Predictions, for_json
from mtl_jax.training.text_evaluation import Texts, scores_of

SCORES, NUMBERS = "test_without_copies", "test_copies"  # keys of a task in results.json


def without_copies(
    tasks: Sequence[Task],
    split: Mapping[str, Examples],
    predictions: Predictions,
    texts: Texts,
    copies: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[str, Any]]:
    """{task: what results.json says of its test rows that are copies}, of the tasks whose source has some.

    Of a task, SCORES are its metrics on the other test rows; {} where none of these has a label. NUMBERS are the copies by
    kind, and the number of test rows.

    Args:
        tasks: The tasks.
        split: {source: Examples} of test.
        predictions: Their outputs.
        texts: The generated texts, of the tasks that decode.
        copies: {source: {place of a test row: kind of its closest copy in train}}.
    """
    result: dict[str, dict[str, Any]] = {}
    for task in tasks:
        examples, kinds = split[task.source], copies.get(task.source, {})
        if not kinds:  # rows of data sets on disk are then not read
            continue
        kept = np.array([row.where not in kinds for row in examples.data], bool)
        if kept.all():
            continue
        numbers = Counter(kinds[row.where] for row in examples.data if row.where in kinds)
        scores: dict[str, float] = {}
        others = _only(examples, kept)
        if len(others.tokens) and any(_labelled(task, row) for row in others.data):
            outputs = taken(predictions.outputs[task.name], np.flatnonzero(kept[examples.row_of]))
            kept_texts = {name: [pair for pair in pairs if pair[0].where not in kinds] for name, pairs in texts.items()}
            scores = {**task.all_metrics(outputs, others), **scores_of((task,), kept_texts).get(task.name, {})}
        by_kind = {kind: numbers[kind] for kind in KINDS if numbers[kind]}
        result[task.name] = {SCORES: for_json(scores), NUMBERS: {**by_kind, "rows": len(examples.data)}}
    return result


def _labelled(task: Task, row: Row) -> bool:
    return task.corrupts or task.parse(row) is not None


def _only(examples: Examples, kept: np.ndarray) -> Examples:
    """The examples of the rows in bool[rows] `kept`."""
    places = np.flatnonzero(kept[examples.row_of])
    new_row = np.cumsum(kept) - 1
    return examples._replace(
        tokens=taken(examples.tokens, places),
        labels={name: taken(values, places) for name, values in examples.labels.items()},
        types=taken(examples.types, places),
        words=taken(examples.words, places),
        offsets=taken(examples.offsets, places),
        rows=new_row[examples.row_of[places]].astype(np.int32),
        data=[row for row, keep in zip(examples.data, kept.tolist(), strict=True) if keep],
    )


def taken(values: Any, places: np.ndarray) -> Any:
    """The entries at some places of an array, of a Ragged or of a list; None stays None."""
    if values is None:
        return None
    if isinstance(values, np.ndarray):
        return values[places]
    parts = [values[place] for place in places.tolist()]
    return Ragged.of(parts, values.values.dtype, values.values.shape[1:]) if isinstance(values, Ragged) else parts


def line(task: str, metric: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """A line on the test scores of a task without copies, for the table of results; "" where no run has them.

    Args:
        task: The task.
        metric: Its metric.
        entries: The task's entry in each results.json.
    """
    values = [number_of(entry[SCORES][metric]) for entry in entries if metric in entry.get(SCORES, {})]
    if len(values) != len(entries):
        return ""
    numbers = entries[0][NUMBERS]
    kinds = ", ".join(f"{numbers[kind]:,} {kind}" for kind in KINDS if kind in numbers)
    copied = sum(numbers[kind] for kind in KINDS if kind in numbers)
    rows = f"{copied:,} of {count(numbers['rows'], 'test row')}"
    mean = float(np.mean(values))
    return f"{task}: {metric} {mean:.4f} without the {rows} that are copies of training rows ({kinds})"
