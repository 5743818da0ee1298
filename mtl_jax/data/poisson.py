"""Poisson sampling: in every step each example is drawn independently, with one probability for the examples of a source.

This is the sampling that the accountants of private training assume. Batches have as many examples as chance gives, in arrays
of a fixed number of rows; the probability that a batch has more than fit is bounded, and counted against delta.

Shapes in names: N examples of a source.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.core.errors import UserError, unknown

SAMPLINGS = ("shuffled", "poisson")
OVERFLOW = 1e-16  # the most, in a step, for which expected_rows is chosen


@dataclasses.dataclass(frozen=True)
class PoissonSchedule:
    """How many rows of each source a step is expected to have.

    Attributes:
        parts: For each mixture its number of steps and {source: expected rows of a step}; the last also holds for later steps.
        sizes: {source: its training examples}.
        rows: The most rows of a batch.
    """

    parts: tuple[tuple[int, dict[str, float]], ...]
    sizes: dict[str, int]
    rows: int

    def expected(self, step: int) -> dict[str, float]:
        """{source: expected rows} of a step, from 0."""
        for steps, expected in self.parts[:-1]:
            if step < steps:
                return expected
            step -= steps
        return self.parts[-1][1]

    def rates(self, step: int) -> dict[str, float]:
        """{source: the probability with which each of its examples is drawn} in a step, from 0."""
        return {source: rows / self.sizes[source] for source, rows in self.expected(step).items()}

    def rates_until(self, steps: int) -> dict[str, list[tuple[float, int]]]:
        """{source: [(rate, the number of steps with it)]} of the first `steps` steps."""
        rates: dict[str, list[tuple[float, int]]] = {source: [] for source in self.sizes}
        for number, (part_steps, _) in enumerate(self.parts):
            start = sum(part[0] for part in self.parts[:number])
            last = number == len(self.parts) - 1
            taken = max(0, steps - start) if last else min(part_steps, max(0, steps - start))
            for source, rate in self.rates(start).items() if taken else ():
                rates[source].append((rate, taken))
        return rates

    def overflow(self, steps: int) -> float:
        """A bound on the probability that any of the first `steps` batches has more than `rows` rows.

        It also holds for a data set with one example more.
        """
        if sum(self.sizes.values()) < self.rows:
            return 0.0
        largest = [
            sum(expected.values()) + max(rows / self.sizes[source] for source, rows in expected.items())
            for _, expected in self.parts
        ]
        return steps * max(overflow(self.rows, expected) for expected in largest)

    def constant(self) -> bool:
        """Whether every step has the same rows of each source."""
        return False

    def constant_counts(self, steps: range) -> dict[str, int] | None:
        """{source: rows} if these steps have the same number of rows of each source: never."""
        return None

    def capacity(self, steps: range) -> dict[str, int]:
        """{source: rows}: the most rows of the source in any of these steps."""
        return {source: min(self.rows, size) for source, size in self.sizes.items()}


def schedule(batching: Any, sizes: Mapping[str, int], shares: Sequence[tuple[int, Mapping[str, float]]]) -> PoissonSchedule:
    """The schedule of a run.

    Args:
        batching: Its Batching.
        sizes: {source: its training examples}.
        shares: For each mixture its number of steps and {source: share of the rows}.

    Raises:
        UserError: A source has fewer examples than a step is expected to have of it.
    """
    total = batching.expected_rows or expected_rows(batching.rows, sum(sizes.values()))
    parts = tuple((steps, {source: total * share for source, share in of_mixture.items()}) for steps, of_mixture in shares)
    for _, expected in parts:
        for source, rows in expected.items():
            if rows > sizes[source]:
                raise UserError(
                    f"batch.sampling poisson: a step is expected to have {rows:g} rows of source {source!r}, which has "
                    f"{sizes[source]}; lower batch.expected_rows, or give the source a smaller share"
                )
    return PoissonSchedule(parts, dict(sizes), batching.rows)


def overflow(rows: int, expected: float) -> float:
    """Chernoff's bound on the probability that more than `rows` independent draws succeed, of which `expected` are expected."""
    if expected == 0:
        return 0.0
    first = rows + 1
    return math.exp(min(0.0, first - expected - first * math.log(first / expected))) if first > expected else 1.0


def expected_rows(rows: int, examples: int) -> int:
    """The largest expected number of rows for which a batch overflows with a probability of at most OVERFLOW, at least 1.

    Args:
        rows: The most rows of a batch.
        examples: The training examples of all sources; where all of them fit, no batch overflows.
    """
    if examples <= rows:
        return max(1, examples // 2)
    return max((expected for expected in range(1, rows) if overflow(rows, expected) <= OVERFLOW), default=1)


def check(batching: Any) -> None:
    """Raises UserError where the sampling of a Batching does not go with its other fields."""
    if batching.sampling not in SAMPLINGS:
        raise unknown("batch.sampling", batching.sampling, SAMPLINGS)
    if batching.sampling != "poisson":
        if batching.expected_rows:
            raise UserError(f"batch.expected_rows is for the sampling poisson, but batch.sampling is {batching.sampling}")
        return
    if batching.packed:
        raise UserError(
            "batch.sampling poisson draws every example alone, so examples cannot share a row: add --batch.no-packed"
        )
    if batching.mixture_end:
        raise UserError("batch.mixture_end: with the sampling poisson each phase has one mixture; give phases their own")
    if not 0 <= batching.expected_rows <= batching.rows:
        raise UserError(
            f"batch.expected_rows is {batching.expected_rows}; it must be at most batch.rows, {batching.rows}, or 0"
        )
