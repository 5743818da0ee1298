"""Canaries: rows of random words that are planted among the training rows, to measure what a model remembers of single rows.

A canary is a training row with its text replaced by random words of the training texts, and where a task writes texts, its
target text, too. Whether a model remembers it shows beside rows that could have been planted and were not.

Carlini et al., 2019, The secret sharer, https://arxiv.org/abs/1802.08232.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.data import row_keys
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels
from mtl_jax.data.source import Source


class Maker:
    """Makes the canaries of a source, and rows that could have been canaries.

    Args:
        source: The source.
        tasks: The tasks of the experiment.
        train: Its training rows, without canaries.

    Raises:
        UserError: A task of the source reads labels of words.
    """

    def __init__(self, source: Source, tasks: Sequence[Labels], train: Sequence[Row]):
        self.source, self.train = source, train
        self.tasks = [task for task in tasks if task.source == source.name]
        for task in self.tasks:
            if task.label_level not in ("example", "target") or task.needs_offsets:
                raise UserError(
                    f"source {source.name!r}: canaries are rows of random words, and task {task.name!r} has labels of words or "
                    "places in the text; plant them in a source of whole texts"
                )
        names = [name for name in (source.text, source.pair) if name]
        self.vocabulary = sorted({word for row in train for name in names for word in _words(row.columns[name])})

    def row(self, number: int, trial: int = 0) -> Row:
        """A canary as a row; with a trial above 0 another row of the same kind, which is not planted.

        Where a task writes texts, rows of one canary have the same text and differ in the target; else they differ in the text.

        Args:
            number: The canary, from 0.
            trial: 0 for the canary itself.
        """
        canaries = self.source.canaries
        seeds = [canaries.seed, zlib.crc32(self.source.name.encode()), number]
        columns = dict(self.train[int(np.random.default_rng(seeds).integers(len(self.train)))].columns)
        targets = [name for task in self.tasks for name in task.text_columns]
        for place, name in enumerate([*(name for name in (self.source.text, self.source.pair) if name), *targets]):
            varies = not targets or name in targets
            rng = np.random.default_rng([*seeds, place + 1, trial if varies else 0])
            columns[name] = " ".join(self.vocabulary[n] for n in rng.integers(len(self.vocabulary), size=canaries.words))
        return Row(columns, f"canary {number} of source {self.source.name}")


def planted(source: Source, tasks: Sequence[Labels], parts: Any) -> Any:
    """The splits of a source with its canaries after the other training rows.

    Args:
        source: The source.
        tasks: The tasks of the experiment.
        parts: The Splits of the source.

    Raises:
        UserError: As Maker.
    """
    canaries = source.canaries
    if not canaries.count:
        return parts
    train = list(parts.rows["train"])
    maker = Maker(source, tasks, train)
    rows = [row for number in range(canaries.count) for row in [maker.row(number)] * canaries.repeats]
    digests = [row_keys.digest(row_keys.key(source, row)) for row in rows]
    all_digests = {**parts.text_digests, "train": [*parts.text_digests["train"], *digests]}
    return parts._replace(rows={**parts.rows, "train": [*train, *rows]}, text_digests=all_digests)


def _words(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else list(value or ())
