"""Rows of the training split that are not trained on, for weighting rules that measure their weights on them.

Which rows these are is decided by a hash of the text, or of its document, and by Source.cut_seed: like dev and test, they are
the same for every seed of a run, and after rows are added.

Shapes in names: N batches, R rows of a batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.data import row_keys
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch, fill
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.records import Picked
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels
from mtl_jax.data.packing import best_fit
from mtl_jax.data.source import Source
from mtl_jax.data.source_arrays import source_arrays
from mtl_jax.data.splits import Splits

FEWEST, MOST = 2, 2048  # rows of a source that are held out


def take(source: Source, splits: Splits, share: float, rule: str) -> tuple[Splits, Sequence[Row]]:
    """A source without its held-out rows, and these rows.

    Args:
        source: The source.
        splits: Its rows.
        share: The share of its training rows that is held out, at most MOST rows; a document is held out as a whole.
        rule: The rule that needs them, for the error.

    Raises:
        UserError: Fewer than FEWEST rows would be held out, or as few would be left.
    """
    rows, digests = splits.rows["train"], splits.text_digests["train"]
    wanted = min(round(share * len(rows)), MOST)
    units = [row_keys.group(source, row).encode() for row in rows] if source.group else [b""] * len(rows)
    seed = f"{source.cut_seed}\0held out\0".encode()
    order = [hashlib.sha256(seed + (unit or digest)).digest() for unit, digest in zip(units, digests, strict=True)]
    chosen: set[int] = set()
    last = b""
    for index in sorted(range(len(rows)), key=lambda index: order[index]):
        if len(chosen) >= wanted and order[index] != last:
            break
        chosen.add(index)
        last = order[index]
    if len(chosen) < FEWEST or len(rows) - len(chosen) < FEWEST:
        raise UserError(
            f"weighting {rule}: its share of {share:g} holds out {len(chosen)} of the {count(len(rows), 'training row')} of "
            f"source {source.name!r}; at least {FEWEST} must be held out and {FEWEST} be left: give the source more rows, or "
            "change the share"
        )
    kept = [index for index in range(len(rows)) if index not in chosen]
    trained = splits._replace(
        rows={**splits.rows, "train": _picked(rows, kept)},
        text_digests={**splits.text_digests, "train": [digests[index] for index in kept]},
    )
    return trained, _picked(rows, sorted(chosen))


def _picked(rows: Sequence[Row], indices: Sequence[int]) -> Sequence[Row]:
    if isinstance(rows, Picked):
        return Picked(rows.records, rows.numbers[np.asarray(indices)])
    return [rows[index] for index in indices]


def batches(examples: Sequence[Examples], tasks: Sequence[Labels], batching: Batching, types: bool, shards: int) -> Batch:
    """The held-out rows of all sources as batches of one shape, leaves [N, R, ...].

    R is no larger than a part of a training batch, and no larger than the rows need. Examples of all batches differ, and each
    batch has its share of them.

    Args:
        examples: The held-out rows of each source, with their place in the run's order.
        tasks: The tasks whose labels are in the batches.
        batching: Shape of the training batches.
        types: Whether the training batches have token types.
        shards: The devices that share a batch; R is a multiple of it.
    """
    sources = [source_arrays(part, tasks) for part in examples]
    packed: list[tuple[int, np.ndarray]] = []
    for number, source in enumerate(sources):
        packed += [
            (number, row) for row in best_fit(source.packing_lengths(batching), batching.row_length, source.slots(batching))
        ]
    most = max(batching.rows // batching.accumulate // shards, 1)
    R = min(most, -(-len(packed) // shards)) * shards
    N = -(-len(packed) // R)
    whole = dataclasses.replace(batching, buckets=())
    numbers = np.array([part.place for part in examples], np.int32)

    def batch(first: int) -> Batch:
        filled = fill(sources, packed[first::N], tasks, whole, R, types, lambda _, ticket: np.random.default_rng(ticket))
        return filled._replace(source=np.where(filled.source < 0, -1, numbers[filled.source]).astype(np.int32))

    return _stacked([batch(first) for first in range(N)])


def _stacked(batches: Sequence[Batch]) -> Batch:
    def stack(arrays: Sequence[Any]) -> Any:
        return None if arrays[0] is None else np.stack(arrays)

    fields = {name: stack([getattr(batch, name) for batch in batches]) for name in Batch._fields if name != "labels"}
    return Batch(**fields, labels={task: stack([batch.labels[task] for batch in batches]) for task in batches[0].labels})
