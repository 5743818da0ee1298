"""At the start of a run, training rows that are copies of held-out rows are reported, dropped, or an error.

Whole rows are compared after repeated texts were dropped, so the remaining copies are written differently or are only near. The
default, to report, does not change what a run learns.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.audit.copies import KINDS
from mtl_jax.audit.overlaps import Copied, Overlap, copied, overlaps_of
from mtl_jax.audit.row_views import Rows, collect, views
from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.data.formats.records import Picked
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source
from mtl_jax.data.splits import Splits

MOST_ROWS = 1_000_000  # that are compared where no source asks for more than a report: some 30 seconds
ADVICE = 'mtl-jax audit SCRIPT lists them; a source with copies="drop" leaves them out'


class Examined(NamedTuple):
    """The data of a run after the search for copies.

    Attributes:
        data: {source: its splits}.
        notes: Lines for the log; none if there are no copies.
        record: JSON values for data.json; {} if there are no copies.
        test_copies: {source: {place of a test row: kind of its closest copy among the training rows that are kept}}.
    """

    data: dict[str, Splits]
    notes: list[str]
    record: dict[str, Any]
    test_copies: Mapping[str, Mapping[str, str]] = MappingProxyType({})


def examine(sources: Sequence[Source], data: Mapping[str, Splits]) -> Examined:
    """Searches for training rows that are copies of held-out rows, and reports, drops or refuses them by Source.copies.

    Args:
        sources: The sources of the experiment.
        data: {source: its splits}, for the sources that its tasks use.

    Raises:
        UserError: A source whose `copies` is "fail" has such rows; or none of its rows would be left.
    """
    used = [source for source in sources if source.name in data]
    size = sum(len(rows) for parts in data.values() for rows in parts.rows.values())
    if size > MOST_ROWS and all(source.copies == "report" for source in used):
        note = f"copies: {size:,} rows are too many to be compared at every start; mtl-jax audit SCRIPT compares them"
        return Examined(dict(data), [note], {})
    rows = collect(data)
    view = views(used, (), rows, ["row"])["row"]
    reported: list[Overlap] = []
    result, dropped, notes = dict(data), dict[str, int](), list[str]()
    test_copies: dict[str, dict[str, str]] = {}
    for near, group in itertools.groupby(sorted(used, key=lambda source: source.near), key=lambda source: source.near):
        found = copied(view, rows, near)
        by_train = {source.name: source for source in group}
        copies = [overlap for overlap in overlaps_of("row", view, found, rows) if overlap.train_source in by_train]
        for name, source in by_train.items():
            of_source = [overlap for overlap in copies if overlap.train_source == name]
            if of_source and source.copies == "fail":
                raise UserError(_failure(source, of_source, len(_rows_of(rows, found, name))))
            if of_source and source.copies == "drop":
                gone = _rows_of(rows, found, name)
                dropped[name] = len(gone)
                result[name] = _without(name, data[name], gone)
        _add_test_copies(test_copies, rows, found, [name for name in by_train if name not in dropped])
        reported += copies
        for pair, parts in itertools.groupby(sorted(copies, key=_pair), key=_pair):
            if pair[0] not in dropped:
                notes.append(_note(*pair, len(_rows_of(rows, found, *pair)), list(parts)))
    if notes:
        notes.append(f"copies: {ADVICE}")
    notes += [f"copies: {count(number, 'training row')} of {name} left out as copies" for name, number in dropped.items()]
    return Examined(result, notes, _record(reported, dropped), test_copies)


def _add_test_copies(test_copies: dict[str, dict[str, str]], rows: Rows, found: Copied, train: Sequence[str]) -> None:
    """Adds the test rows with a copy in the training rows of these sources; the closest copy of each counts."""
    for row, group, kind in found.held_out.tolist():
        source, split = rows.groups[rows.group_of[row]]
        if split == "test" and rows.groups[group][0] in train:
            kinds, where = test_copies.setdefault(source, {}), rows.rows[row].where
            kinds[where] = KINDS[min(kind, KINDS.index(kinds.get(where, KINDS[-1])))]


def _rows_of(rows: Rows, found: Copied, name: str, held_out: str = "") -> set[int]:
    """The places of a source's training rows that are copies; only of rows of the source `held_out` if that is given."""
    group = rows.groups.index((name, "train"))
    groups = [number for number, (source, _) in enumerate(rows.groups) if held_out in ("", source)]
    copies = found.train[np.isin(found.train[:, 1], groups), 0]
    return set((copies[rows.group_of[copies] == group] - np.searchsorted(rows.group_of, group)).tolist())


def _without(name: str, parts: Splits, gone: set[int]) -> Splits:
    kept = [index for index in range(len(parts.rows["train"])) if index not in gone]
    if not kept:
        raise UserError(f'source {name!r}: every training row is a copy of a held-out row, and copies is "drop"')
    rows, digests = parts.rows["train"], parts.text_digests["train"]
    train: Sequence[Row] = (
        Picked(rows.records, rows.numbers[kept]) if isinstance(rows, Picked) else [rows[index] for index in kept]
    )
    kept_digests = [digests[index] for index in kept]
    return parts._replace(rows={**parts.rows, "train": train}, text_digests={**parts.text_digests, "train": kept_digests})


def _pair(overlap: Overlap) -> tuple[str, str]:
    return overlap.train_source, overlap.source


def _note(train: str, held_out: str, train_rows: int, copies: list[Overlap]) -> str:
    kinds = {kind: sum(overlap.rows[kind] for overlap in copies) for kind in KINDS}
    where = ", ".join(f"{sum(overlap.rows.values()):,} of {overlap.split}" for overlap in copies)
    how = ", ".join(f"{number:,} {kind}" for kind, number in kinds.items() if number)
    are = "training row of {} is a copy", "training rows of {} are copies"
    return f"copies: {count(train_rows, *(text.format(train) for text in are))} of held-out rows of {held_out}: {where} ({how})"


def _failure(source: Source, copies: list[Overlap], train_rows: int) -> str:
    examples = [f"{example.train_row} of {example.row}" for overlap in copies for example in overlap.examples]
    rows = f"{count(train_rows, 'training row is a copy', 'training rows are copies')} of held-out rows"
    return f'source {source.name!r}: {rows}: {listed(examples)}; copies="drop" leaves them out'


def _record(copies: list[Overlap], dropped: Mapping[str, int]) -> dict[str, Any]:
    """The entry in data.json: numbers without texts."""
    if not copies:
        return {}
    left_out = ("view", "dropped", "examples")
    entries = [{k: v for k, v in overlap._asdict().items() if k not in left_out} for overlap in sorted(copies, key=_pair)]
    return {"overlaps": entries, **({"dropped": dict(dropped)} if dropped else {})}
