"""The augmentations of a run: which apply to which source, and whether they fit its tasks, before any row is read."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError, listed
from mtl_jax.data import row_edits, row_keys
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels
from mtl_jax.data.source import Augmentation, AugmentedRows, Source

LEVELS = {
    "word": "labels of words",
    "token": "labels of tokens",
    "target": "target texts",
    "answer": "answers in the text",
}


def of_source(source: Source, run_augmentations: Sequence[Augmentation] = ()) -> tuple[Augmentation, ...]:
    """The augmentations of a source: its own, then those of the run."""
    return (*source.augment, *run_augmentations)


def in_passes(augmentations: Iterable[Augmentation]) -> tuple[Augmentation, ...]:
    """Those that draw anew in every pass."""
    return tuple(augmentation for augmentation in augmentations if not augmentation.added)


def names(augmentations: Sequence[Augmentation]) -> list[str]:
    """A name for each: that of its kind, with its place where the kind is there twice."""
    kinds = [type(augmentation).__name__ for augmentation in augmentations]
    return [f"{kind}_{place}" if kinds.count(kind) > 1 else kind for place, kind in enumerate(kinds)]


def check(
    sources: Sequence[Source], tasks: Sequence[Labels], run_augmentations: Sequence[Augmentation] = (), *, private: bool = False
) -> None:
    """Checks the augmentations of all sources that tasks use.

    Args:
        sources: The sources.
        tasks: The tasks.
        run_augmentations: The augmentations of the run.
        private: Whether training is private: a made row may then have texts of its own row only, and stand in its place.

    Raises:
        UserError: A field makes no sense, or an augmentation does not fit a task of its source.
    """
    for source in sources:
        source_tasks = [task for task in tasks if task.source == source.name]
        for field, augmentations in ((f"source {source.name!r}: augment", source.augment), ("augment", run_augmentations)):
            for place, augmentation in enumerate(augmentations if source_tasks else ()):
                where = f"{field}.{place} ({type(augmentation).__name__})"
                check_one(augmentation, where)
                check_tasks(augmentation, where, source_tasks)
                if private and (augmentation.added or augmentation.joins_rows):
                    what = "adds rows" if augmentation.added else "puts texts of other rows into a row"
                    raise UserError(f"{where} {what}, so one row would count more than once: not for private training")
                if source.canaries.count:
                    raise UserError(f"{where}: source {source.name!r} has canaries, which must stay as they are; leave one out")


def check_one(augmentation: Augmentation, where: str) -> None:
    """Raises UserError where a field of an augmentation makes no sense."""
    check_shares(augmentation, where, "share")
    if augmentation.added < 0:
        raise UserError(f"{where}: added is {augmentation.added}; it must be a number of rows, or 0 for a draw in every pass")
    if not augmentation.added and not augmentation.in_passes:
        raise UserError(
            f"{where}: added is 0, but a model makes its rows, which takes too long in every pass; set it to 1 or more"
        )
    augmentation.check(where)


def check_shares(augmentation: Augmentation, where: str, *fields: str) -> None:
    """Raises UserError unless the fields are numbers from 0 to 1."""
    for field in fields:
        value = getattr(augmentation, field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{where}: {field} is {value!r}; it must be at least 0 and at most 1")


def check_tasks(augmentation: Augmentation, where: str, tasks: Sequence[Labels]) -> None:
    """Raises UserError where an augmentation does not keep the labels of one of the tasks right."""
    for task in tasks:
        if task.corrupts:  # a masked LM makes its labels from the text that it gets
            continue
        level = "answer" if task.needs_offsets else task.label_level
        if level not in augmentation.keeps:
            labels = LEVELS.get(level, "labels of texts")
            kept = listed(LEVELS.get(name, "labels of texts") for name in augmentation.keeps)
            raise UserError(
                f"{where} does not fit task {task.name!r}, a {type(task).__name__} with {labels}: it keeps {kept} right; "
                "declare it at the sources that it fits, or give the task a source of its own"
            )


def rows_of(source: Source, tasks: Sequence[Labels], rows: Sequence[Row]) -> AugmentedRows:
    """What the augmentations of a source know of it.

    Args:
        source: The source.
        tasks: The tasks of the run.
        rows: Its training rows.
    """
    source_tasks = tuple(task for task in tasks if task.source == source.name)
    return AugmentedRows(source, row_edits.text_columns(source, tasks), source_tasks, rows)


def generator(augmentation: Augmentation, source: str, place: int, key: bytes, seeds: Sequence[int]) -> np.random.Generator:
    """The random numbers with which an augmentation makes a row: of the row's text, not of its place.

    Args:
        augmentation: The augmentation.
        source: The name of the row's source.
        place: The augmentation's place among those of the source.
        key: row_keys.digest() of the row.
        seeds: Seed and pass; or the number of the made row.
    """
    words = np.frombuffer(key, np.uint32).tolist()
    return np.random.default_rng([augmentation.seed, zlib.crc32(source.encode()), place, *words, *seeds])


def problem(source: Source, row: Row, held_out: frozenset[bytes]) -> str:
    """The reason why a made row cannot be trained on; "" if it can.

    Args:
        source: Its source.
        row: The row.
        held_out: Digests of the texts of dev and test, of all sources.
    """
    try:
        key = row_keys.key(source, row)
    except UserError:
        return "empty"
    return "held out" if text_digest(source, key) in held_out else ""


def text_digest(source: Source, key: str) -> bytes:
    """The digest of a row's key; a pair and the swapped pair have the same one, as in Splits.text_digests."""
    return row_keys.digest(min(key, row_keys.swapped(key)) if source.pair else key)


def held_out_texts(data: Mapping[str, Any]) -> frozenset[bytes]:
    """The digests of all texts in dev and test, from {source: its Splits}."""
    return frozenset(digest for parts in data.values() for split in ("dev", "test") for digest in parts.text_digests[split])
