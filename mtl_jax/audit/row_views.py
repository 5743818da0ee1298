"""The rows of an experiment's sources, and the texts of each row that an audit compares.

Rows are compared in four ways: whole rows (a text, a pair in either order, a question with its context); single texts, if one
of the two rows is a pair; contexts of questions; target texts of translations and summaries.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.audit.text_keys import Text
from mtl_jax.data import row_keys, splits
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import SPLITS, Source
from mtl_jax.data.splits import Splits

VIEWS = ("row", "single text", "context", "target")


class Joined:
    """Sequences of rows joined into one; each row is read when it is needed."""

    def __init__(self, parts: Sequence[Sequence[Row]]):
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self._parts)

    def __getitem__(self, index: int) -> Row:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][int(index - self._starts[part])]


class Rows(NamedTuple):
    """All rows of the sources of an experiment.

    Attributes:
        groups: (source, split) of each group of rows.
        group_of: i64[N], the group of each row.
        rows: The N rows; rows of data sets on disk stay on disk.
        dropped: bool[N], whether a run drops the row before it trains.
    """

    groups: list[tuple[str, str]]
    group_of: np.ndarray
    rows: Joined
    dropped: np.ndarray


def collect(data: Mapping[str, Splits], kept: Mapping[str, Splits] | None = None) -> Rows:
    """The rows of all splits, and, if `kept` is given, which training rows were dropped.

    Args:
        data: {source: its splits}.
        kept: The same without training rows that are in dev or test of another source.
    """
    groups: list[tuple[str, str]] = []
    group_of: list[np.ndarray] = []
    joined: list[Sequence[Row]] = []
    dropped: list[bool] = []
    for name, parts in data.items():
        for split in SPLITS:
            joined.append(parts.rows[split])
            gone = [False] * len(parts.rows[split])
            if split == "train" and kept is not None:
                remaining = set(kept[name].text_digests["train"])
                gone = [digest not in remaining for digest in parts.text_digests["train"]]
                joined.append([splits.row_at(reference) for reference, _ in parts.repeats])
                gone += [True] * len(parts.repeats)
            group_of.append(np.full(len(gone), len(groups)))
            groups.append((name, split))
            dropped += gone
    return Rows(groups, np.concatenate(group_of), Joined(joined), np.array(dropped, bool))


class View(NamedTuple):
    """The texts of the rows that one way of comparing uses.

    Attributes:
        texts: Texts, or pairs.
        row_of: i64, the row of each.
        whole: bool, whether each is its whole row.
    """

    texts: list[Text]
    row_of: np.ndarray
    whole: np.ndarray


def views(sources: Sequence[Source], tasks: Sequence[Any], rows: Rows, names: Sequence[str] = VIEWS) -> dict[str, View]:
    """{view: its texts}, for the views that the sources have.

    Args:
        sources: The sources.
        tasks: Their tasks, which name target texts.
        rows: The rows.
        names: The views that are wanted.
    """
    declared = {source.name: source for source in sources}
    targets = {
        name: sorted({column for task in tasks if task.source == name for column in task.text_columns}) for name in declared
    }
    entries: dict[str, list[tuple[Text, int, bool]]] = {view: [] for view in names}

    def add(view: str, texts: Iterable[Text], number: int, whole: bool = False) -> None:
        if view in entries:
            entries[view] += [(text, number, whole) for text in texts]

    for number, (group, row) in enumerate(zip(rows.group_of.tolist(), rows.rows, strict=True)):
        source = declared[rows.groups[group][0]]
        texts = tuple(row_keys.text_of(source, row, kind) for kind in (("text", "pair") if source.pair else ("text",)))
        context = row.columns.get("context") if isinstance(row.columns.get("answers"), list) else None
        if isinstance(context, str) and "context" not in (source.text, source.pair):
            add("context", [context], number)
            add("row", [(*texts, context)], number, whole=True)
        else:
            add("row", [texts[0] if len(texts) == 1 else texts], number, whole=True)
        add("single text", texts, number, whole=len(texts) == 1)
        for column in targets[source.name]:
            value = row.columns.get(column)
            add("target", [text for text in (value if isinstance(value, list) else [value]) if text], number)
    if all(whole for _, _, whole in entries.get("single text", ())):
        entries.pop("single text", None)
    return {
        view: View([text for text, _, _ in items], _array(row for _, row, _ in items), _array(whole for _, _, whole in items))
        for view, items in entries.items()
        if items
    }


def _array(values: Any) -> np.ndarray:
    return np.array(list(values))
