"""Held-out rows with copies in train, and training rows with copies under another label: counts and examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.audit.copies import KINDS, Pairs, copies, matches, pool
from mtl_jax.audit.row_views import Joined, Rows, View, views
from mtl_jax.audit.text_keys import Text, sides
from mtl_jax.core import row_texts
from mtl_jax.core.errors import UserError
from mtl_jax.data.source import Source

EXAMPLES = 10  # of an overlap or a conflict


class Example(NamedTuple):
    """Two rows that are copies.

    Attributes:
        kind: One of KINDS, or "meaning".
        similarity: From the threshold to 1.
        row: File and line, or record, of the held-out row; in a conflict, of one training row.
        train_row: File and line, or record, of the training row.
        text: The compared text of the first row.
        train_text: The compared text of the training row.
        labels: In a conflict, the labels of the two rows.
    """

    kind: str
    similarity: float
    row: str
    train_row: str
    text: str
    train_text: str
    labels: tuple[str, str] | tuple[()] = ()


class Overlap(NamedTuple):
    """Held-out rows with copies among the training rows of a source.

    Attributes:
        source: The source of the held-out rows.
        split: Their split, "dev" or "test".
        train_source: The source of the training rows.
        view: The way of comparing, one of VIEWS.
        rows: {kind: number of held-out rows whose closest copy is of this kind}.
        of: Number of held-out rows of that split.
        train_rows: Number of training rows that are copies of one of them.
        dropped: How many of those training rows a run drops before it trains.
        examples: Ten of the pairs, or all.
    """

    source: str
    split: str
    train_source: str
    view: str
    rows: dict[str, int]
    of: int
    train_rows: int
    dropped: int
    examples: tuple[Example, ...]


class Conflict(NamedTuple):
    """Training rows that are copies of one another and have different labels.

    Attributes:
        task: The task whose labels differ.
        source: Its source.
        rows: {kind: number of training rows whose closest copy under another label is of this kind}.
        of: Number of training rows.
        examples: Ten of the pairs, or all.
    """

    task: str
    source: str
    rows: dict[str, int]
    of: int
    examples: tuple[Example, ...]


class Copied(NamedTuple):
    """The copies of one view: held-out rows with a copy in a source's training rows, and training rows with a held-out copy.

    Attributes:
        held_out: i64[M, 3]: row, group of the training rows, and kind of the closest copy.
        train: i64[K, 3]: row, group of the held-out rows, and kind of the closest copy.
        pairs: The pairs of different texts.
        numbers: i64, the number of each entry of the view in the pool.
    """

    held_out: np.ndarray
    train: np.ndarray
    pairs: Pairs
    numbers: np.ndarray


def copied(view: View, rows: Rows, near: float) -> Copied:
    """The copies of held-out rows in train, for one view.

    Args:
        view: The view.
        rows: All rows.
        near: The least similarity.
    """
    collected = pool(view.texts)
    numbers = collected.number_of
    groups = rows.group_of[view.row_of]
    in_train = np.array([split == "train" for _, split in rows.groups])[groups]
    left, right = (np.unique(numbers[mask & (numbers >= 0)]) for mask in (in_train, ~in_train))
    pairs = copies(collected, near, left, right)
    # For each text of train and group of held-out rows the kind of the closest copy, and the same for held-out texts.
    train = _closest(pairs.first, pairs.second, pairs.kinds, view, numbers, groups, in_train)
    held_out = _closest(pairs.second, pairs.first, pairs.kinds, view, numbers, groups, ~in_train)
    return Copied(held_out, train, pairs, numbers)


def _closest(
    own: np.ndarray,
    others: np.ndarray,
    kinds: np.ndarray,
    view: View,
    numbers: np.ndarray,
    groups: np.ndarray,
    mine: np.ndarray,
) -> np.ndarray:
    """i64[M, 3]: rows of `mine` with a copy, the group of the copy, and the kind of the closest copy; by row and group.

    Two whole rows are not compared in a view of single texts, because the view of rows compares them.
    """
    theirs = ~mine & (numbers >= 0)
    entries = _unique(np.stack([numbers[theirs], groups[theirs], view.whole[theirs]], axis=1))
    origin, other = matches(others, entries[:, 0])
    texts = _least(np.stack([own[origin], entries[other, 1], entries[other, 2], kinds[origin]], axis=1))
    mine = np.flatnonzero(mine & (numbers >= 0))
    origin, entry = matches(texts[:, 0], numbers[mine])
    allowed = ~(view.whole[mine[entry]] & texts[origin, 2].astype(bool)) if not view.whole.all() else slice(None)
    origin, entry = origin[allowed], entry[allowed]
    return _least(np.stack([view.row_of[mine[entry]], texts[origin, 1], texts[origin, 3]], axis=1))


def _unique(values: np.ndarray) -> np.ndarray:
    return np.unique(values.astype(np.int64), axis=0) if len(values) else values.astype(np.int64)


def _least(values: np.ndarray) -> np.ndarray:
    """The different rows of i64[M, C], by all columns but the last, each with the least value of the last."""
    values = _unique(values)
    if not len(values):
        return values
    return values[np.concatenate([[True], (values[1:, :-1] != values[:-1, :-1]).any(axis=1)])]


def overlaps(sources: Sequence[Source], tasks: Sequence[Any], rows: Rows, near: float) -> list[Overlap]:
    """Every held-out split, source of training rows and view with copies.

    Args:
        sources: The sources.
        tasks: Their tasks, which name target texts.
        rows: All rows.
        near: The least similarity of near copies.
    """
    return [
        overlap
        for name, view in views(sources, tasks, rows).items()
        for overlap in overlaps_of(name, view, copied(view, rows, near), rows)
    ]


def overlaps_of(name: str, view: View, found: Copied, rows: Rows) -> Iterator[Overlap]:
    """The overlaps of one view, by held-out split and source of the training rows.

    Args:
        name: The view's name.
        view: The view.
        found: Its copies.
        rows: All rows.
    """
    sizes = np.bincount(rows.group_of, minlength=len(rows.groups))
    groups = rows.group_of[found.held_out[:, 0]]
    for group, train_group in sorted(set(zip(groups.tolist(), found.held_out[:, 1].tolist(), strict=True))):
        entries = found.held_out[(groups == group) & (found.held_out[:, 1] == train_group)]
        train_rows = found.train[(found.train[:, 1] == group) & (rows.group_of[found.train[:, 0]] == train_group), 0]
        yield Overlap(
            rows.groups[group][0],
            rows.groups[group][1],
            rows.groups[train_group][0],
            name,
            _by_kind(entries[:, 2]),
            int(sizes[group]),
            len(train_rows),
            int(rows.dropped[train_rows].sum()),
            tuple(_examples(entries, train_group, found, view, rows)),
        )


def _by_kind(kinds: np.ndarray) -> dict[str, int]:
    return dict(zip(KINDS, np.bincount(kinds, minlength=len(KINDS)).tolist(), strict=True))


def _chosen(kinds: np.ndarray) -> list[int]:
    """Indices of EXAMPLES entries, from all kinds that occur."""
    rank = np.zeros(len(kinds), np.int64)
    for kind in range(len(KINDS)):
        rank[kinds == kind] = np.arange(int((kinds == kind).sum()))
    return np.lexsort([kinds, rank])[:EXAMPLES].tolist()


def _examples(entries: np.ndarray, train_group: int, found: Copied, view: View, rows: Rows) -> Iterable[Example]:
    """Examples of held-out rows i64[M, 3] with a copy in a group of training rows."""
    in_group = rows.group_of[view.row_of] == train_group
    for index in _chosen(entries[:, 2]):
        row, _, kind = entries[index].tolist()
        places = np.flatnonzero((view.row_of == row) & (found.numbers >= 0))
        pairs = np.flatnonzero(np.isin(found.pairs.second, found.numbers[places]) & (found.pairs.kinds == kind))
        others = np.flatnonzero(in_group & np.isin(found.numbers, found.pairs.first[pairs]))
        if not view.whole.all():
            others = others[~(view.whole[others] & view.whole[places].all())]
        other = int(others[0])
        pair = int(pairs[found.pairs.first[pairs] == found.numbers[other]][0])
        place = int(places[found.numbers[places] == found.pairs.second[pair]][0])
        yield _example(rows, view, found.pairs, pair, place, other)


def _example(
    rows: Rows, view: View, pairs: Pairs, pair: int, place: int, other: int, labels: tuple[str, str] | tuple[()] = ()
) -> Example:
    return Example(
        KINDS[pairs.kinds[pair]],
        round(float(pairs.similarities[pair]), 4),
        rows.rows[view.row_of[place]].where,
        rows.rows[view.row_of[other]].where,
        joined_text(view.texts[place]),
        joined_text(view.texts[other]),
        labels,
    )


def joined_text(text: Text) -> str:
    """A text, or the two texts of a pair; empty in a private run."""
    return row_texts.plain(" | ".join(sides(text)))


def conflicts(sources: Sequence[Source], tasks: Sequence[Any], rows: Rows, near: float) -> list[Conflict]:
    """The tasks whose source has training rows that are copies of one another with different labels.

    Only tasks with a label for each row are checked, not tasks with labels of words or tokens, or with target texts.

    Args:
        sources: The sources.
        tasks: Their tasks.
        rows: All rows.
        near: The least similarity of near copies.
    """
    result = []
    for group, (name, split) in enumerate(rows.groups):
        labelled = [task for task in tasks if task.source == name and task.level == "example"]
        if split != "train" or not labelled:
            continue
        source = next(source for source in sources if source.name == name)
        members = np.flatnonzero(rows.group_of == group)
        of_group = Joined([[rows.rows[row] for row in members.tolist()]])
        part = Rows([(name, split)], np.zeros(len(members), np.int64), of_group, rows.dropped[members])
        view = views([source], [], part, ["row"])["row"]
        collected = pool(view.texts)
        numbers = collected.number_of
        pairs = copies(collected, near, np.unique(numbers[numbers >= 0]))
        for task in labelled:
            labels = [_label(task, row) for row in part.rows]
            conflict = _conflict(labels, numbers, pairs, part, view)
            if conflict is not None:
                result.append(Conflict(task.name, name, conflict[0], len(members), conflict[1]))
    return result


def _label(task: Any, row: Any) -> str:
    """The label of a row as a text; "" if it has none, or cannot be read, which training reports."""
    try:
        label = task.raw_label(row)
        label = task.parse(row) if label is None else label
    except (ValueError, UserError):
        return ""
    if label is None:
        return ""
    return label if isinstance(label, str) else str(label.tolist() if isinstance(label, np.ndarray) else label)


def _conflict(
    labels: list[str], numbers: np.ndarray, pairs: Pairs, rows: Rows, view: View
) -> tuple[dict[str, int], tuple[Example, ...]] | None:
    """Counts and examples of the rows with a copy under another label; None if there are none."""
    index_of = {label: index for index, label in enumerate(sorted({*labels} - {""}))}
    codes = np.array([index_of.get(label, -1) for label in labels], np.int64)
    known = (numbers >= 0) & (codes >= 0)
    texts = _unique(np.stack([numbers[known], codes[known]], axis=1))
    twice = pairs.first != pairs.second
    left = np.concatenate([pairs.first, pairs.second[twice]])
    right = np.concatenate([pairs.second, pairs.first[twice]])
    kinds, index = np.concatenate([pairs.kinds, pairs.kinds[twice]]), np.arange(len(pairs.first))
    index = np.concatenate([index, index[twice]])
    origin, mine = matches(left, texts[:, 0])
    again, theirs = matches(right[origin], texts[:, 0])
    origin, mine = origin[again], mine[again]
    unlike = texts[mine, 1] != texts[theirs, 1]
    origin, mine, theirs = origin[unlike], mine[unlike], theirs[unlike]
    if not len(origin):
        return None
    best = np.lexsort([kinds[origin], mine])
    best = best[np.concatenate([[True], mine[best][1:] != mine[best][:-1]])]
    keys = numbers * (len(index_of) + 1) + codes + 1
    text_keys = texts[:, 0] * (len(index_of) + 1) + texts[:, 1] + 1
    entry, _ = matches(text_keys[mine[best]], np.where(known, keys, -1))
    kind_of = kinds[origin[best]]
    # Of two rows that conflict, one example is enough.
    first = text_keys[mine[best]] < text_keys[theirs[best]]
    first = first if first.any() else np.ones_like(first)
    candidates = np.flatnonzero(first)
    examples = []
    for chosen in candidates[_chosen(kind_of[candidates])].tolist():
        place, second = (int(np.flatnonzero(known & (keys == text_keys[text[best[chosen]]]))[0]) for text in (mine, theirs))
        pair = int(index[origin[best[chosen]]])
        examples.append(_example(rows, view, pairs, pair, place, second, (labels[place], labels[second])))
    return _by_kind(kind_of[entry]), tuple(examples)
