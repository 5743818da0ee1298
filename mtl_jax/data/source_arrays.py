"""The examples of a source as arrays, which batches are filled from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax.data import units
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.examples import Examples
from mtl_jax.data.labels import Labels
from mtl_jax.data.redraw import Redraw
from mtl_jax.data.tokenize import Ragged


@dataclasses.dataclass(frozen=True)
class SourceArrays:
    """The examples of one source as arrays: what batches are filled from, and what a worker process receives.

    Attributes:
        source: The source's name.
        first_id: Id of the first example.
        tokens: N arrays i32[len].
        types: N arrays i32[len]; None where all are 0.
        labels: {task: [N, *label_shape], or N arrays [len] for labels of words or tokens and for target texts}.
        targets: The tasks whose labels are target texts.
        units: The places of the examples that stay together, for each unit; None: every example is a unit.
        redraw: The augmentations that draw in every pass; None: the source has none.
    """

    source: str
    first_id: int
    tokens: Ragged
    types: Ragged | None
    labels: dict[str, np.ndarray | Ragged]
    targets: tuple[str, ...] = ()
    units: Ragged | None = None
    redraw: Redraw | None = None

    def __len__(self) -> int:
        """The number of units, which is that of examples where each is a unit."""
        return len(self.tokens if self.units is None else self.units)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """i64[N], tokens of each example."""
        return self.tokens.lengths

    def slots(self, batching: Batching) -> int:
        """The most units in a row."""
        return batching.slots // (1 if self.units is None else max(int(self.units.lengths.max(initial=1)), 1))

    def examples(self, tickets: np.ndarray) -> np.ndarray:
        """From tickets of units, pass * units + unit, to those of their examples, pass * examples + example."""
        if self.units is None:
            return tickets
        passes, numbers = np.divmod(tickets, len(self.units))
        groups = [self.units[number] for number in numbers.tolist()]
        counts = [len(group) for group in groups]
        return np.concatenate(groups).astype(np.int64) + np.repeat(passes, counts) * len(self.tokens)

    def only(self, places: np.ndarray | None) -> SourceArrays:
        """The source with these examples alone as its units; None: as it is."""
        if places is None:
            return self
        return dataclasses.replace(self, units=Ragged(places.astype(np.int32), np.arange(len(places) + 1)))

    def packing_lengths(self, batching: Batching) -> np.ndarray:
        """Tokens that each unit takes of a row, i64; scaled up where its target texts take a larger share."""
        lengths = self._by_unit(self.lengths)
        for name in self.targets:
            labels: Any = self.labels[name]
            targets = self._by_unit(labels.lengths)
            lengths = np.maximum(lengths, -(-targets * batching.row_length // batching.target_row_length))
        return lengths if self.redraw is None else self.redraw.planned(lengths, batching.row_length)

    def _by_unit(self, lengths: np.ndarray) -> np.ndarray:
        """The sums over the examples of each unit, i64."""
        return lengths if self.units is None else np.add.reduceat(lengths[self.units.values], self.units.starts[:-1])


def source_arrays(examples: Examples, tasks: Sequence[Labels]) -> SourceArrays:
    """The examples of a source, with the labels of those tasks that belong to the source."""

    def flat(arrays: Sequence[np.ndarray], dtype: Any) -> Ragged:
        return arrays if isinstance(arrays, Ragged) else Ragged.of(arrays, dtype)

    labels: dict[str, np.ndarray | Ragged] = {}
    for task in tasks:
        if task.source == examples.source:
            values = examples.labels[task.name]
            labels[task.name] = flat(values, task.dtype) if task.label_level != "example" else values
    types = None if examples.types is None else flat(examples.types, np.int32)
    targets = tuple(task.name for task in tasks if task.name in labels and task.label_level == "target")
    together = units.units_of(examples.row_of, examples.data, [task for task in tasks if task.source == examples.source])
    return SourceArrays(examples.source, examples.first_id, flat(examples.tokens, np.int32), types, labels, targets, together)
