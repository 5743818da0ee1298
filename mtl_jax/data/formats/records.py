"""Rows that stay on disk: read by number when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from mtl_jax.data.formats.rows import Read, Row
from mtl_jax.data.formats.values import Schema, columns
from mtl_jax.errors import UserError


class Records:
    """The records of a TFDS or hub data set as rows.

    Args:
        path: The source's path, for error messages.
        records: Has a length, and gives a record (a mapping) by its number.
        schema: See values.columns.
    """

    def __init__(self, path: str, records: Any, schema: Schema):
        self.path = path
        self.records = records
        self.schema = schema

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Read]:
        """All of them in order, a bad one as its error."""
        for number in range(len(self)):
            try:
                yield self[number]
            except UserError as error:
                yield error

    def __getitem__(self, number: int) -> Row:
        where = f"{self.path}: record {number}"
        try:
            return Row(columns(self.records[number], self.schema), where)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


class Picked(Sequence[Row]):
    """Some of the records, in order: only their numbers i64[N] are held in memory."""

    def __init__(self, records: Records, numbers: Sequence[int] | np.ndarray):
        self.records = records
        self.numbers = np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Picked: ...
    def __getitem__(self, at: int | slice) -> Row | Picked:
        return Picked(self.records, self.numbers[at]) if isinstance(at, slice) else self.records[int(self.numbers[at])]
