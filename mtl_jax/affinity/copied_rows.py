"""Copies between tasks: rows of a source that the target also has. Copies make a source look too good to every estimator.

They are searched before anything is estimated, and reported. They are not left out: Source(copies="drop") leaves out copies of
held-out rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.audit.copies import KINDS, copies, pool
from mtl_jax.core.errors import count
from mtl_jax.data import row_keys
from mtl_jax.data.source import Source

NEAR = 0.7
MOST_TEXTS = 1_000_000  # that are compared: some 30 seconds
TOO_MANY = "copies: there are more than a million texts; mtl-jax audit SCRIPT looks for copies among them"


class SourceCopies(NamedTuple):
    """Training rows of a source that are copies of rows of a target.

    Attributes:
        rows: {kind: number of the source's rows whose closest copy is of this kind}; kinds as in audit: exact, letters, near.
        of: The source's training rows.
        same_rows: Whether both tasks label the rows of one source; then nothing is compared.
    """

    rows: dict[str, int]
    of: int
    same_rows: bool = False


def source_copies(
    sources: Sequence[Source], source_of: Mapping[str, str], splits: Mapping[str, Mapping[str, Any]], targets: Sequence[str]
) -> dict[str, dict[str, SourceCopies]] | None:
    """{target: {source task: the copies}}, for the pairs that have any.

    A row of a source counts if one of its texts is a copy of a text of any row of the target, in train, dev or test. Texts of
    pairs are compared one by one.

    Args:
        sources: The declared sources, which name the columns with texts.
        source_of: {task: the name of its source}.
        splits: {split: {source: Examples}}, of a corpus.
        targets: The tasks that are targets.

    Returns:
        As above; None if there are more than a million texts, which only mtl-jax audit compares.
    """
    texts: list[str] = []
    number_of_source, number_of_row, in_train = [], [], []
    names = list(dict.fromkeys(source_of.values()))
    used = [source for source in sources if source.name in names]
    total = sum((2 if source.pair else 1) * len(parts[source.name].data) for source in used for parts in splits.values())
    if total > MOST_TEXTS:
        return None
    for source, (split, parts) in itertools.product(used, splits.items()):
        for row, text in _texts(source, parts[source.name].data):
            texts.append(text)
            number_of_source.append(names.index(source.name))
            number_of_row.append(row)
            in_train.append(split == "train")
    collected = pool(texts)
    pairs = copies(collected, NEAR, np.unique(collected.number_of[collected.number_of >= 0]))
    owner, row_of, train = np.array(number_of_source), np.array(number_of_row), np.array(in_train)
    # Each pair in both directions; a text and itself is one pair.
    left, right = np.concatenate([pairs.first, pairs.second]), np.concatenate([pairs.second, pairs.first])
    kinds = np.concatenate([pairs.kinds, pairs.kinds])
    has = np.zeros((len(names), len(collected.texts) + 1), bool)  # whether a source has a text; the last: an empty one
    has[owner, collected.number_of] = True
    has[:, -1] = False
    sizes = {name: len(splits["train"][name].data) for name in names}
    result: dict[str, dict[str, SourceCopies]] = {}
    for target, (source, name) in itertools.product(targets, source_of.items()):
        if source == target:
            continue
        if name == source_of[target]:
            result.setdefault(target, {})[source] = SourceCopies({}, sizes[name], same_rows=True)
            continue
        closest = np.full(len(collected.texts) + 1, len(KINDS))
        shared = has[names.index(source_of[target]), right]
        np.minimum.at(closest, left[shared], kinds[shared])
        is_of_source = train & (owner == names.index(name))
        kind_of_row = np.full(sizes[name], len(KINDS))
        np.minimum.at(kind_of_row, row_of[is_of_source], closest[collected.number_of[is_of_source]])
        rows = {kind: int((kind_of_row == number).sum()) for number, kind in enumerate(KINDS)}
        if any(rows.values()):
            result.setdefault(target, {})[source] = SourceCopies(rows, sizes[name])
    return result


def lines(copies_of: Mapping[str, Mapping[str, SourceCopies]]) -> list[str]:
    """A line for each source with copies of a target, the source with most copies first; and what to do."""
    parts = [(target, source, copied) for target, by_source in copies_of.items() for source, copied in by_source.items()]
    if not parts:
        return []
    parts.sort(key=lambda part: (part[2].same_rows, -sum(part[2].rows.values())))
    result = []
    for target, source, copied in parts:
        if copied.same_rows:
            result.append(f"copies: {source} labels the rows of {target}")
            continue
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in copied.rows.items() if number)
        rows = count(copied.of, "training row")
        result.append(f"copies: {sum(copied.rows.values()):,} of {rows} of {source} have a text of {target} ({kinds})")
    return [*result, "copies: such a source looks better than it is; mtl-jax audit SCRIPT shows the rows"]


def _texts(source: Source, rows: Sequence[Any]) -> Iterator[tuple[int, str]]:
    for number, row in enumerate(rows):
        for kind in ("text", "pair") if source.pair else ("text",):
            yield number, row_keys.text_of(source, row, kind)
