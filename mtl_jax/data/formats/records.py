"""Rows of TFDS and hub data sets, which stay on disk and are read by number, and how values become columns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.formats.rows import Read, Row

# How the plain values of a column become text: a function, or {name: ...} for nested columns. None: by str().
Schema = Mapping[str, Any] | Callable[[Any], str | None] | None

_ANSWER = ({"text", "start"}, {"text", "answer_start"})  # keys of an answer


class Records:
    """The records of a TFDS or hub data set as rows.

    Args:
        path: The source's path, for error messages.
        records: A sequence of records, which are mappings.
        schema: As for columns().
    """

    def __init__(self, path: str, records: Any, schema: Schema):
        self.path = path
        self.records = records
        self.schema = schema

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Read]:
        """All rows in order, in place of a bad one its error."""
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
    """Some of the records, in order; only their numbers i64[N] are in memory."""

    def __init__(self, records: Records, numbers: Sequence[int] | np.ndarray):
        self.records = records
        self.numbers = np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Picked: ...
    def __getitem__(self, index: int | slice) -> Row | Picked:
        return Picked(self.records, self.numbers[index]) if isinstance(index, slice) else self.records[int(self.numbers[index])]


def columns(value: Mapping[str, Any], schema: Schema = None, prefix: str = "") -> dict[str, Any]:
    """Columns by name, nested ones as "a.b".

    A str is kept; numbers and true/false become str as in JSON; null becomes None; lists of these become lists. Answers, in
    SQuAD [{"text": ..., "answer_start": ...}, ...] and in the hub {"text": [...], "answer_start": [...]}, become a list of
    {"text", "start"}. Any other list, one of lists or objects, becomes its JSON text, because no column has that shape.

    Raises:
        ValueError: Bytes are not UTF-8, answers and their starts differ in number, or two values have one name.
    """
    result: dict[str, Any] = {}
    for name, part in value.items():
        inner = schema.get(name) if isinstance(schema, Mapping) else None
        if isinstance(part, Mapping) and not _are_answers(part):
            nested = columns(part, inner, f"{prefix}{name}.")
        else:
            nested = {prefix + name: _column(part, inner)}
        twice = result.keys() & nested.keys()
        if twice:
            raise ValueError(f"two values of column {quoted(min(twice))}")
        result |= nested
    return result


@dataclasses.dataclass(frozen=True)
class ClassName:
    """From a class number to its name; -1, a hidden label, becomes None. Without names the number itself is the name."""

    names: tuple[str, ...] = ()

    def __call__(self, number: Any) -> str | None:
        if number is None or int(number) < 0:
            return None
        return self.names[int(number)] if self.names else str(int(number))


@dataclasses.dataclass(frozen=True)
class Number:
    """From a number to its text in its dtype: 3.8 in float32 is not 3.799999952316284."""

    dtype: str

    def __call__(self, number: Any) -> str | None:
        return None if number is None else str(np.dtype(self.dtype).type(number))


def _column(value: Any, schema: Schema) -> Any:
    if isinstance(value, Mapping):
        return _answers(value)
    if isinstance(value, np.ndarray):
        value = value.tolist() if schema is None or value.ndim > 1 else list(value) if value.ndim else value[()]
    if isinstance(value, list | tuple):
        if value and all(isinstance(part, Mapping) and part.keys() in _ANSWER for part in value):
            return [_answer(part["text"], part.get("answer_start", part.get("start"))) for part in value]
        if any(isinstance(part, Mapping | list | tuple | np.ndarray) for part in value):
            return json.dumps(value, ensure_ascii=False, default=_json)
        return [_text(part, schema) for part in value]
    return _text(value, schema)


def _text(value: Any, schema: Schema) -> str | None:
    if callable(schema):
        return schema(value)
    if value is None or isinstance(value, str):
        return value if value is None else str(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    return str(value)


def _are_answers(value: Mapping[str, Any]) -> bool:
    return value.keys() == {"text", "answer_start"} and all(isinstance(v, list | tuple | np.ndarray) for v in value.values())


def _answers(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    if len(value["text"]) != len(value["answer_start"]):
        raise ValueError(f"{count(len(value['text']), 'answer')} at {count(len(value['answer_start']), 'place')}")
    return [_answer(text, start) for text, start in zip(value["text"], value["answer_start"], strict=True)]


def _answer(text: Any, start: Any) -> dict[str, Any]:
    if isinstance(text, bytes):
        text = text.decode()
    if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int | np.integer):
        raise ValueError(f"the answer {quoted(text)} at {quoted(start)} is not a text and a whole number")
    return {"text": text, "start": int(start)}


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
