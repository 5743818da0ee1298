"""The source of every row of a run, from each source's share of the rows at its first and at its last step.

Shapes in names: N sources, R rows of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mtl_jax.data.mixture import check, shares

# The largest number of rows for which capacity() is computed exactly; for longer runs it is a bound.
EXACT_ROWS = 2**22


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The source of each row of a run, a pure function of the row's number.

    Row k = 0, 1, ... of a source is due when the source's share, summed over the rows of the run, reaches k + 1/2. Rows are
    ordered by their due times; of equal times the earlier source comes first. With constant shares this is the method of
    Webster and Sainte-Lague: whenever the shares of the rows so far are whole numbers, every source has had exactly that number
    of rows; between these points it differs by at most 1/2 + share (N - 2) / 2 rows. A source with a small share is seen in
    some steps only. Changing shares change linearly from the first row to the last, and the sum is an integral.

    Attributes:
        start: {source: share} at the first row.
        end: {source: share} at the last row, the same sources; it also holds for any rows after the last.
        rows: R, rows of a step.
        steps: Steps of the run.
    """

    start: dict[str, float]
    end: dict[str, float]
    rows: int
    steps: int

    def counts(self, step: int) -> dict[str, int]:
        """{source: rows} of a step, from 0."""
        before, after = self.before(step), self.before(step + 1)
        return {source: after[source] - before[source] for source in self.start}

    def before(self, step: int) -> dict[str, int]:
        """{source: rows} of all steps before this one."""
        rows, slack = step * self.rows, len(self.start) / 2 + 1
        # When `slack` fewer rows are due in total, at most these many of each source are out; the remaining rows are sorted.
        base_N = np.maximum(np.floor(self._due_by(max(rows - slack, 0.0))) - 1, 0).astype(np.int64)
        order = self._order(base_N, rows - int(base_N.sum()))
        total_N = base_N + np.bincount(order, minlength=len(base_N))
        return dict(zip(self.start, total_N.tolist(), strict=True))

    def constant(self) -> bool:
        """Whether every step has the same rows of each source."""
        ideal_N = self._ends()[0] * self.rows
        return self.start == self.end and bool(np.allclose(ideal_N, np.round(ideal_N), rtol=0, atol=1e-9))

    def capacity(self) -> dict[str, int]:
        """{source: rows}: the most rows of the source in any step; an upper bound of it for very long runs."""
        start_N, end_N = self._ends()
        if self.constant():
            most_N = np.round(start_N * self.rows)
        elif self.steps * self.rows <= EXACT_ROWS:
            order = self._order(np.zeros(len(start_N), np.int64), self.steps * self.rows).reshape(self.steps, self.rows)
            most_N = np.array([(order == number).sum(axis=1).max(initial=0) for number in range(len(start_N))])
        else:
            # Between the due times of a step's first and last row the shares sum to at most R + N.
            most_N = np.floor(np.maximum(start_N, end_N) * (self.rows + len(start_N))) + 1
            most_N = np.minimum(most_N, self.rows) * (np.maximum(start_N, end_N) > 0)
        return dict(zip(self.start, most_N.astype(int).tolist(), strict=True))

    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(list(self.start.values())), np.array([self.end[source] for source in self.start])

    def _due_by(self, time: float) -> np.ndarray:
        """f64[N]: how many rows are due at `time`: the shares summed over the first `time` rows, plus 1/2."""
        start_N, end_N = self._ends()
        total = max(self.steps * self.rows, 1)
        within = min(time, total)
        return start_N * within + (end_N - start_N) * within**2 / (2 * total) + end_N * (time - within) + 0.5

    def _due(self, number: int, k: np.ndarray) -> np.ndarray:
        """f64: the due times of rows k of the source with this number; infinity for never."""
        start, end = (float(ends[number]) for ends in self._ends())
        total = max(self.steps * self.rows, 1)
        target = k + 0.5
        whole = (start + end) / 2 * total
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a share of 0: infinity
            if start == end:
                return target / start
            # The root of start x + (end - start) x^2 / (2 total) = target, in the form that loses no digits.
            root = np.sqrt(np.maximum(start**2 + 2 * (end - start) * target / total, 0.0))
            return np.where(target <= whole, 2 * target / (start + root), total + (target - whole) / end)

    def _order(self, out_N: np.ndarray, count: int) -> np.ndarray:
        """i64[count]: the source numbers of the next rows, after `out_N` rows of each source."""
        until_N = self._due_by(out_N.sum() + count + len(out_N) / 2 + 1)
        numbers, times = [], []
        for number, (first, until) in enumerate(zip(out_N, until_N, strict=True)):
            k = np.arange(first, max(int(until) + 2, first))
            numbers.append(np.full(len(k), number))
            times.append(self._due(number, k))
        # The sort is stable, so that of equal times the earlier source comes first.
        first_count = np.argsort(np.concatenate(times), kind="stable")[:count]
        return np.concatenate(numbers)[first_count]


@dataclasses.dataclass(frozen=True)
class ScheduleSequence:
    """Schedules of the same sources, one after another.

    Attributes:
        parts: The schedules; the last one also holds for any steps after its own.
    """

    parts: tuple[Schedule, ...]

    def counts(self, step: int) -> dict[str, int]:
        """{source: rows} of a step, from 0."""
        for part in self.parts[:-1]:
            if step < part.steps:
                return part.counts(step)
            step -= part.steps
        return self.parts[-1].counts(step)

    def constant(self) -> bool:
        """Whether every step has the same rows of each source."""
        return all(part.constant() and part.start == self.parts[0].start for part in self.parts)

    def constant_counts(self, steps: range) -> dict[str, int] | None:
        """{source: rows} if every one of these steps has the same number of rows of each source, else None."""
        schedules = self._in(steps)
        constant = all(part.constant() and part.start == schedules[0].start for part in schedules)
        return schedules[0].capacity() if constant else None

    def capacity(self, steps: range) -> dict[str, int]:
        """{source: rows}: the most rows of the source in any of these steps, or an upper bound of it."""
        capacities = [part.capacity() for part in self._in(steps)]
        return {source: max(capacity[source] for capacity in capacities) for source in capacities[0]}

    def fewest(self, steps: range) -> dict[str, float]:
        """{source: rows}: its share of a step's rows where that is least in these steps; 0 where it has none at all."""
        ends = [
            {source: share * part.rows for source, share in shares.items()}
            for part in self._in(steps)
            for shares in (part.start, part.end)
        ]
        return {source: min(rows[source] for rows in ends) for source in ends[0]}

    def _in(self, steps: range) -> list[Schedule]:
        """The schedules that contain these steps."""
        start, schedules = 0, []
        for part in self.parts:
            if start < steps.stop and (steps.start < start + part.steps or part is self.parts[-1]):
                schedules.append(part)
            start += part.steps
        return schedules


def schedule(
    mixture: str, mixture_end: str, fixed: Mapping[str, float], sizes: Mapping[str, float], rows: int, steps: int
) -> Schedule:
    """The schedule of a run.

    Args:
        mixture: The mixture at the first row.
        mixture_end: The mixture at the last row; "": the same.
        fixed: {source: number} for the mixture fixed.
        sizes: {source: tokens of training data}, in the run's order.
        rows: Rows of a step.
        steps: Steps of the run.

    Raises:
        UserError: A mixture or the fixed numbers are refused.
    """
    check(mixture, mixture_end, fixed)
    start = shares(mixture, sizes, fixed)
    return Schedule(start, shares(mixture_end, sizes, fixed, "batch.mixture_end") if mixture_end else start, rows, steps)
