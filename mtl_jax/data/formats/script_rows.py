"""Rows of a source that a script has in memory or makes: read like those of a file, and hashed like one.

A function is called once for every pass over the rows, so that they never need to be in memory together; a pass that gives
other rows than the first is an error, because a run could then not be repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mtl_jax.core.errors import UserError, listed
from mtl_jax.data.formats import hf
from mtl_jax.data.formats.python_rows import as_rows, type_of
from mtl_jax.data.formats.records import Records
from mtl_jax.data.formats.rows import Read, Row
from mtl_jax.data.source import FIELDS, SPLITS, ScriptRows, Source

FORMS = "it must be a list of dicts, one a row, a DataFrame, a Dataset, or a function that returns an iterator of dicts"


def open_rows(source: Source, split: str) -> Records | Iterator[Read]:
    """The rows of a split that a script gave, in place of a bad one its error.

    Raises:
        UserError: They cannot be read, there are none, or a second pass gives other rows.
    """
    opened = _open(source, split)
    return opened if isinstance(opened, Records) else _unchanged(source, split, opened)


def record(source: Source, split: str) -> dict[str, Any]:
    """{"rows": their number, "sha256": of their columns as canonical JSON}; an error line counts as its text.

    The first call reads the rows once.

    Raises:
        UserError: They cannot be read, or there are none.
    """
    rows = _given(source, split)
    if rows.record is None:
        digest = _Digest()
        for item in _open(source, split):
            digest.add(item)
        if not digest.rows:
            raise UserError(f"source {source.name!r}: {FIELDS[split][1]} has no rows")
        rows.record = digest.record()
    return rows.record


def check_present(source: Source) -> None:
    """Raises UserError if rows of a source came from a script, and this is a Source of config.json, which has their record."""
    for split in SPLITS:
        rows = source.script_rows(split)
        if rows is not None and rows.values is None:
            field = FIELDS[split][1]
            raise UserError(
                f"source {source.name!r}: its {field} came from a script; give a path, or call this from the script"
            )


def records(source: Source) -> dict[str, dict[str, Any]]:
    """{field: record()} of the fields of a source that have rows of a script, such as "rows"."""
    return {FIELDS[split][1]: record(source, split) for split in SPLITS if source.script_rows(split) is not None}


class _Digest:
    """Number and SHA-256 of rows that are added one by one."""

    def __init__(self) -> None:
        self.rows, self._hash = 0, hashlib.sha256()

    def add(self, item: Read) -> None:
        self.rows += 1
        value = item.columns if isinstance(item, Row) else str(item)
        self._hash.update(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    def record(self) -> dict[str, Any]:
        return {"rows": self.rows, "sha256": self._hash.hexdigest()}


def _unchanged(source: Source, split: str, items: Iterator[Read]) -> Iterator[Read]:
    first, digest = record(source, split), _Digest()
    for item in items:
        digest.add(item)
        yield item
    if digest.record() != first:
        raise UserError(
            f"source {source.name!r}: {FIELDS[split][1]} had {first['rows']} rows in its first pass, and other rows, "
            f"{digest.rows}, in the next: every pass must give the same rows in the same order; does a seed change?"
        )


def _given(source: Source, split: str) -> ScriptRows:
    rows = source.script_rows(split)
    assert rows is not None
    return rows


def _open(source: Source, split: str) -> Records | Iterator[Read]:
    field, values = FIELDS[split][1], _given(source, split).values
    prefix = f"source {source.name!r}"
    check_present(source)
    if isinstance(values, str | bytes):
        raise UserError(f"{prefix}: {field} is a text; a file is named by {FIELDS[split][0]}")
    if hasattr(values, "__next__"):
        once = f"{prefix}: {field} is {type_of(values)}, which can be read only once"
        raise UserError(f"{once}; give the function that makes it, without calling it")
    if isinstance(values, Mapping):
        raise UserError(f"{prefix}: {field} is {type_of(values)} with the keys {listed(values)}; {FORMS}")
    if all(hasattr(values, name) for name in ("features", "column_names", "__len__")):
        return hf.rows_of(values, f"{source.name}.{field}")
    if all(hasattr(values, name) for name in ("itertuples", "notna", "astype")):
        make = _frame(values, f"{prefix}: {field}")
    elif callable(values):
        make = values
    elif hasattr(values, "__iter__"):
        make = _same(values)
    else:
        raise UserError(f"{prefix}: {field} is {type_of(values)}; {FORMS}")
    return as_rows(make, lambda number: f"{source.name}.{field}[{number}]", f"{field} of {prefix}")


def _same(values: Any) -> Callable[[], Any]:
    return lambda: values


def _frame(frame: Any, where: str) -> Callable[[], Iterator[dict[str, Any]]]:
    """A function that returns the rows of a pandas DataFrame as dicts; a missing value is None."""
    names = [str(name) for name in frame.columns]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where} has two columns {twice!r}; every column needs a different name")

    def make() -> Iterator[dict[str, Any]]:
        objects = frame.astype(object).where(frame.notna(), None)
        return (dict(zip(names, row, strict=True)) for row in objects.itertuples(index=False, name=None))

    return make
