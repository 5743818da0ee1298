"""Rows that Python code gives: dicts of columns from the reader of a script's format, or from a script itself."""

from __future__ import annotations

import datetime
import math
import numbers
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mtl_jax.core import row_texts
from mtl_jax.core.errors import UserError
from mtl_jax.data.formats.records import columns
from mtl_jax.data.formats.rows import Read, Row

_VALUES = (str, bytes, numbers.Number, np.generic, datetime.date, datetime.time)  # their str() is a text that people expect


def as_rows(make: Callable[[], Any], where: Callable[[int], str], what: str) -> Iterator[Read]:
    """The rows that a function returns, one by one, in place of one that is not a row its error.

    Args:
        make: Returns an iterable of dicts; it may also have Row and UserError in it.
        where: From a row's number, counted from 0, to its place for error lines.
        what: The function, for errors.

    Raises:
        UserError: The function fails, at its call or at one of the rows, or returns something else.
    """
    number = 0
    try:
        items = make()
        if isinstance(items, str | bytes | Mapping) or not hasattr(items, "__iter__"):
            raise UserError(f"{where(0)}: {what} returned {type_of(items)}; it must return an iterable of dicts, one a row")
        for item in items:
            yield as_row(item, where(number))
            number += 1
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where(number)}: {what} failed: {failure(error)}") from error


def failure(error: Exception) -> str:
    """An exception of a user's function, and the line of code that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = f", {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return f"{type(error).__name__}: {row_texts.why(error)}{file} ({place.filename}:{place.lineno})"


def as_row(item: Any, where: str) -> Read:
    """A row of Python values as a Row, its values as those of a jsonl file; an error where it cannot be a row.

    Args:
        item: {column: text, list of words, number, true or false, None, or answers}; a Row or UserError is returned as it is.
        where: Its place, for error lines.
    """
    if isinstance(item, Row | UserError):
        return item
    if not isinstance(item, Mapping):
        return UserError(f"{where}: the row is {type_of(item)}; it must be a dict of columns")
    try:
        for name, value in item.items():
            if not isinstance(name, str):
                raise ValueError(f"the column name {row_texts.quoted(name)} is not a text")
            _check(name, value)
        return Row(columns(item), where)
    except UnicodeEncodeError:
        return UserError(f"{where}: a text has half of a surrogate pair, which is not a character")
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: {error}")


def type_of(value: Any) -> str:
    """What a value is, for error lines: "None", "a list", "an int"."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _check(name: str, value: Any) -> None:
    """Raises ValueError for a value that no column can have."""
    if isinstance(value, str):
        if not value.isascii():
            value.encode()  # a text that cannot be written would fail much later
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check(f"{name}.{key}", part)
    elif isinstance(value, list | tuple | np.ndarray):
        for part in value.flat if isinstance(value, np.ndarray) else value:
            _check(name, part)
    elif isinstance(value, float | np.floating) and math.isnan(value):
        raise ValueError(f"column {row_texts.quoted(name)} is NaN; give None where there is no value")
    elif value is not None and not isinstance(value, _VALUES):
        raise ValueError(
            f"column {row_texts.quoted(name)} is {type_of(value)}; give a text, a number, None, or a list of words"
        )
