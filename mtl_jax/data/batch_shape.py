"""The shape of a batch, one for all steps of a run, and its checks."""

from __future__ import annotations

import dataclasses
import itertools

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.data import mixture, poisson

SHORTEST = 16  # tokens of shorter_rows()


@dataclasses.dataclass(frozen=True)
class Batching(Configuration):
    """Shape of a batch. It is the same in every step of a run, so that one compiled program is enough.

    Attributes:
        rows: R, rows in a global batch, over all sources and devices.
        row_length: T, tokens in a row, and so the longest example; longer texts are truncated and counted.
        target_length: U, tokens in a row of target texts, for tasks that have them; 0: row_length. Examples share a row if both
            their texts and their target texts fit.
        examples_per_row: S, the most examples that are packed in a row.
        mixture: How often each source is seen, by rows: uniform; proportional to its training tokens; temperature:t=T, by
            size^(1/T); capped:cap=C, by at most C tokens; fixed; or one of the script's (mtl_jax.data.register_mixture). The
            shares hold exactly over the run, not in every step.
        mixture_end: The mixture at the run's last step: shares change linearly from mixture to this one. Empty: no change.
        shares: For the mixture fixed: a number for each source.
        packed: Whether short examples share a row. Else each example has its own row, with padding after it.
        buckets: Without packing: row lengths, ascending. A batch of short examples gets the smallest length that fits; each
            length is a compiled program. Empty: always row_length.
        accumulate: Number of parts that a training batch is processed in, one after another, if its activations do not fit in
            memory; divides rows. The step is the same as with the whole batch.
        recompute: Number of parts of a training batch that the trunk reads one after another and, for the gradient, once more:
            its activations are then those of a part, and the gradient is that of the whole batch, also for losses that compare
            all its texts (Gao et al., 2021, GradCache). 1: the trunk reads the batch once.
        workers: Processes that make training batches; 0: a thread. The batches are the same.
        sampling: How the examples of a training batch are drawn. shuffled: pass after pass, each in a new order. poisson: in
            every step each example independently, with one probability for the examples of a source, so that a batch has as
            many as chance gives; private training needs it.
        expected_rows: For the sampling poisson: the expected number of rows of a batch. A batch that has more than rows loses
            the others. 0: the most for which that happens once in 10^16 batches.

    Examples:
        >>> mtl_jax.Batching(rows=32, row_length=128, mixture="temperature:t=2").mixture
        'temperature:t=2'
    """

    rows: int = 32
    row_length: int = 64
    target_length: int = 0
    examples_per_row: int = 12
    mixture: str = "uniform"
    mixture_end: str = ""
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    packed: bool = True
    buckets: tuple[int, ...] = ()
    accumulate: int = 1
    workers: int = 0
    sampling: str = dataclasses.field(default="shuffled", metadata=ONLY_IF_SET)
    expected_rows: int = dataclasses.field(default=0, metadata=ONLY_IF_SET)
    recompute: int = dataclasses.field(default=1, metadata=ONLY_IF_SET)

    @property
    def slots(self) -> int:
        """S, the most examples of a row."""
        return self.examples_per_row if self.packed else 1

    @property
    def target_row_length(self) -> int:
        """U, tokens in a row of target texts."""
        return self.target_length or self.row_length


def check(batching: Batching) -> None:
    """Raises UserError where a field of Batching makes no sense."""
    mixture.check(batching.mixture, batching.mixture_end, batching.shares)
    if batching.workers < 0:
        raise UserError(f"batch.workers is {batching.workers}; it must not be negative")
    for field in ("rows", "row_length", "examples_per_row", "accumulate", "recompute"):
        if getattr(batching, field) < 1:
            raise UserError(f"batch.{field} must be at least 1")
    if batching.target_length < 0:
        raise UserError(f"batch.target_length is {batching.target_length}; it must be a number of tokens, or 0 for row_length")
    if batching.buckets and batching.packed:
        raise UserError("batch.buckets are for rows that are not packed: add --batch.no-packed, or leave them out")
    if list(batching.buckets) != sorted(set(batching.buckets)) or not all(
        0 < b <= batching.row_length for b in batching.buckets
    ):
        raise UserError(f"batch.buckets must be ascending lengths of at most batch.row_length, {batching.row_length}")
    if batching.rows % batching.accumulate:
        raise UserError(f"batch.accumulate is {batching.accumulate}; it must divide batch.rows, {batching.rows}")
    poisson.check(batching)


def shorter_rows(row_length: int) -> tuple[int, ...]:
    """Lengths of rows below the full one: 16 tokens, and each twice the one before.

    Examples:
        >>> shorter_rows(100)
        (16, 32, 64)
    """
    return tuple(itertools.takewhile(lambda length: length < row_length, (SHORTEST << n for n in itertools.count())))
