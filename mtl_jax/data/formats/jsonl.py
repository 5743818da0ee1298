"""jsonl: a JSON object a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mtl_jax.data.formats.lines import lines
from mtl_jax.data.formats.rows import Read, Row
from mtl_jax.data.formats.values import columns
from mtl_jax.errors import UserError
from mtl_jax.lines import not_by_line

if TYPE_CHECKING:
    from mtl_jax.data.sources import Source

HALF = re.compile(r"\\u[dD][89a-fA-F]")


class _Float(float):
    """A number that remembers how it was written."""

    written: str

    def __new__(cls, written: str) -> _Float:
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written


def read_jsonl(path: str, source: Source) -> Iterator[Read]:
    """Rows of a file with an object on every line that is not blank; see values.columns for what becomes a column.

    Raises:
        UserError: The file is one JSON value: an array, or an object over several lines.
    """
    first = True
    for line in lines(path):
        where = f"{path}:{line.number}"
        if line.text.strip():
            if first and (problem := not_by_line(line.text)):
                raise UserError(f"{where}: {problem}")
            first = False
        if line.error:
            yield line.error
        elif line.text.strip():
            yield _row(line.text, where)


def parse(text: str) -> Any:
    """A JSON value; numbers print as they are written.

    Raises:
        ValueError: No JSON, or text that is not Unicode (half of a surrogate pair).
    """
    value = json.loads(text, parse_float=_Float, parse_constant=_constant)
    if HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("an escape \\ud... that is only half of a character") from error
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write null where there is no value")


def _row(text: str, where: str) -> Read:
    try:
        value = parse(text)
        if not isinstance(value, dict):
            return UserError(f"{where}: not a JSON object")
        return Row(columns(value), where)
    except json.JSONDecodeError as error:
        return UserError(f"{where}: no JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: {error}")
