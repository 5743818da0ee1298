"""Rows to numbers: token ids and labels of every split."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.data.sources import SPLITS, Row, Source, Splits, read
from mtl_jax.errors import UserError
from mtl_jax.tasks import Classification, Task


class Examples(NamedTuple):
    """The examples of one source in one split.

    Attributes:
        source: The source's name.
        first_id: Examples have consecutive ids, split by split and in it source by source; this is the first one's.
        tokens: N arrays i32[length], special tokens included.
        labels: {task: [N]} in the task's dtype, for the tasks of this source.
    """

    source: str
    first_id: int
    tokens: list[np.ndarray]
    labels: dict[str, np.ndarray]


class Corpus(NamedTuple):
    """All data of a run.

    Attributes:
        splits: {split: {source: Examples}}, sources in the experiment's order.
        tasks: The tasks, label sets filled in.
        notes: One line for each source: sizes, repeated texts, truncated texts.
    """

    splits: dict[str, dict[str, Examples]]
    tasks: tuple[Task, ...]
    notes: list[str]

    def describe(self) -> dict[str, Any]:
        """JSON-able: label sets, and for each source the number of examples and a SHA-256 of their tokens and labels."""
        sources: dict[str, dict[str, Any]] = {}
        for split, parts in self.splits.items():
            for name, part in parts.items():
                digest = hashlib.sha256()
                for ids in part.tokens:
                    digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
                for task in sorted(part.labels):
                    digest.update(part.labels[task].tobytes())
                sources.setdefault(name, {})[split] = {"examples": len(part.tokens), "sha256": digest.hexdigest()}
        return {"labels": {task.name: list(task.labels) for task in self.tasks}, "sources": sources}

    @property
    def size(self) -> int:
        """Number of examples over all splits and sources."""
        return sum(len(e.tokens) for split in self.splits.values() for e in split.values())


def read_sources(sources: Sequence[Source], tasks: Sequence[Task]) -> dict[str, Splits]:
    """Reads the sources that the tasks use.

    Raises:
        UserError: A source cannot be read.
    """
    used = {task.source for task in tasks}
    return {source.name: read(source) for source in sources if source.name in used}


def texts(sources: Sequence[Source], data: dict[str, Splits], split: str) -> list[str]:
    """The texts of one split over all sources."""
    columns = {source.name: source.text for source in sources}
    return [row.columns[columns[name]] for name, splits in data.items() for row in splits.rows[split]]


def make_corpus(
    sources: Sequence[Source], tasks: Sequence[Task], data: dict[str, Splits], tokenizer: Any, max_length: int
) -> Corpus:
    """Finds label sets, parses every label and tokenises every text.

    Args:
        sources: The declared sources.
        tasks: The declared tasks; an empty label set is filled with the labels found in the source.
        data: What read_sources returned.
        tokenizer: A transformers fast tokenizer.
        max_length: Longest example in tokens, special tokens included; longer ones are cut and counted.

    Raises:
        UserError: A label column does not exist or a label is outside the label set; names file and line.
    """
    columns = {source.name: source.text for source in sources}
    tasks = tuple(_with_labels(task, data[task.source]) for task in tasks)
    splits: dict[str, dict[str, Examples]] = {split: {} for split in SPLITS}
    cut = dict.fromkeys(data, 0)
    next_id = 0
    for split in SPLITS:
        for name, parts in data.items():
            rows = parts.rows[split]
            labels = {task.name: _labels(task, rows) for task in tasks if task.source == name}
            tokens, too_long = tokenize(tokenizer, [row.columns[columns[name]] for row in rows], max_length)
            for row, ids in zip(rows, tokens, strict=True):
                if not len(ids):
                    raise UserError(f"{row.where}: the text has no token that the vocabulary knows")
            splits[split][name] = Examples(name, next_id, tokens, labels)
            next_id += len(rows)
            cut[name] += len(too_long)
    notes = [
        f"source {name}: {'/'.join(str(len(parts.rows[split])) for split in SPLITS)} train/dev/test, "
        f"{parts.repeated} repeated texts dropped, {cut[name]} texts cut to {max_length} tokens"
        for name, parts in data.items()
    ]
    return Corpus(splits, tasks, notes)


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of each text, and the places of the texts that were cut to max_length.

    Args:
        tokenizer: A transformers fast tokenizer.
        texts: Any number of texts.
        max_length: Longest result, special tokens included.
    """
    if not texts:
        return [], []
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    too_long = [i for i, row in enumerate(ids) if len(row) > max_length]
    if too_long:
        shorter = tokenizer([texts[i] for i in too_long], truncation=True, max_length=max_length)["input_ids"]
        for i, row in zip(too_long, shorter, strict=True):
            ids[i] = row
    return [np.asarray(row, np.int32) for row in ids], too_long


def _with_labels(task: Task, splits: Splits) -> Task:
    """The task with its label set: as given, or every label that stands in the source."""
    if not isinstance(task, Classification) or task.labels:
        return task
    found = {_column(task, row) for rows in splits.rows.values() for row in rows}
    return dataclasses.replace(task, labels=tuple(sorted(found)))


def _labels(task: Task, rows: list[Row]) -> np.ndarray:
    labels = np.empty(len(rows), task.dtype)
    for i, row in enumerate(rows):
        try:
            labels[i] = task.parse(_column(task, row))
        except ValueError as error:
            raise UserError(f"{row.where}: task {task.name!r}: {error}") from error
    return labels


def _column(task: Task, row: Row) -> str:
    if task.column not in row.columns:
        raise UserError(
            f"{row.where}: source {task.source!r} has no column {task.column!r} for task {task.name!r}; "
            f"columns: {', '.join(row.columns)}"
        )
    return row.columns[task.column]
