"""Reading for task kinds: a row's values in a task's columns, and the examples that have a label."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.row_texts import named, quoted
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels


def column(row: Row, name: str, task: Labels) -> Any:
    """A row's value in a column that a task names.

    Raises:
        UserError: There is no such column.
    """
    if name not in row.columns:
        raise UserError(
            f"{row.where}: source {task.source!r} has no column {name!r} for task {task.name!r}; "
            f"columns: {named(row.columns)} (a row without a label has null or an empty value)"
        )
    return row.columns[name]


def text_of(row: Row, name: str, task: Labels) -> str | None:
    """A row's text in a column that a task names; None where the row has no value.

    Raises:
        UserError: There is no such column, or its value is a list.
    """
    value = column(row, name, task)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{row.where}: task {task.name!r}: column {name!r} has a list, {quoted(value)}; one value is needed")
    return value


def known_rows(task: Labels, examples: Examples) -> np.ndarray:
    """bool[N], which examples have a label; of a label with several numbers one known number is enough."""
    labels = examples.labels[task.name]
    known_Nx = ~np.isnan(labels) if np.isnan(task.missing) else labels != task.missing
    return known_Nx.reshape(len(labels), -1).any(axis=1)


def known(task: Labels, examples: Examples) -> np.ndarray:
    """The labels of the examples that have one: [M, *label_shape]."""
    return examples.labels[task.name][known_rows(task, examples)]


def labelled(task: Labels, outputs: Sequence[np.ndarray] | np.ndarray, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Outputs f32[M, O] and labels [M, *label_shape] of the examples that have a label."""
    return np.asarray(outputs)[known_rows(task, examples)], known(task, examples)


def key_numbers(data: bytes) -> tuple[int, int]:
    """Two numbers of 24 bits that are equal for equal bytes; float32 holds them exactly, so that labels may have them."""
    digest = hashlib.blake2b(data, digest_size=6).digest()
    return int.from_bytes(digest[:3], "big"), int.from_bytes(digest[3:], "big")
