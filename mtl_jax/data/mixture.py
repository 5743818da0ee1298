"""How often each source is seen: shares of the rows, and from them the source of every row of a run.

A mixture is text, "NAME" or "NAME:option=number":
    uniform            every source as often
    proportional       by size, in tokens of training data
    temperature:t=T    by size^(1/T); T = 1 is proportional, a large T nearly uniform
    capped:cap=C       by min(size, C)
    fixed              by given numbers

Shapes in names: N sources, R rows of a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError, listed, unknown

# Of each mixture its option, or "" for none.
MIXTURES = {"uniform": "", "proportional": "", "temperature": "t", "capped": "cap", "fixed": ""}
# Runs of up to so many rows are gone through for their largest block; above, it is bounded.
WHOLE_RUN = 2**22


def parse(mixture: str, field: str = "batch.mixture") -> tuple[str, float]:
    """A mixture's name and the value of its option, NaN where it has none.

    Raises:
        UserError: The name is unknown, or its option is missing or refused; the message names the field.
    """
    forms = {name: f"{name}:{option}=NUMBER" if option else name for name, option in MIXTURES.items()}
    name, arguments, options = name_options.parse(mixture, field, MIXTURES, form=forms, arguments=True)
    option = MIXTURES[name]
    if not option:
        if arguments or options:
            raise UserError(f"{field} is {mixture!r}; {name} has no option")
        return name, math.nan
    value = name_options.number(options.get(option))
    if arguments or set(options) != {option} or math.isnan(value):
        raise UserError(f"{field} is {mixture!r}; write {forms[name]}")
    if not 0 < value < math.inf:
        raise UserError(f"{field} is {mixture!r}; {option} must be a number above 0")
    return name, value


def check(mixture: str, mixture_end: str, fixed: Mapping[str, float], at: str = "batch") -> None:
    """Finds what is wrong with the mixtures of a run before its sources are known.

    Raises:
        UserError: One line that names the field.
    """
    names = [parse(mixture, f"{at}.mixture")[0]] + ([parse(mixture_end, f"{at}.mixture_end")[0]] if mixture_end else [])
    if "fixed" in names and not fixed:
        raise UserError(f"{at}.shares is empty, but the mixture is fixed: give every source a number")
    if "fixed" not in names and fixed:
        raise UserError(f"{at}.shares is for the mixture fixed, but {at}.mixture is {mixture!r}")


def shares(
    mixture: str, sizes: Mapping[str, float], fixed: Mapping[str, float] | None = None, field: str = "batch.mixture"
) -> dict[str, float]:
    """{source: share}: which part of the rows belongs to each source; they sum to 1.

    Temperature: https://arxiv.org/abs/1907.05019, section 4; caps ("examples-proportional mixing"):
    https://arxiv.org/abs/1910.10683, section 3.5.2.

    Args:
        mixture: The mixture's text.
        sizes: {source: tokens of training data}.
        fixed: {source: number} for the mixture fixed, which need not sum to 1.
        field: Where the text stands, for errors.

    Raises:
        UserError: The text is no mixture, or the fixed numbers miss a source, name an unknown one, or cannot be shares.
    """
    name, value = parse(mixture, field)
    if name == "fixed":
        found = _fixed(fixed or {}, sizes)
    elif name == "uniform":
        found = dict.fromkeys(sizes, 1.0)
    elif name == "temperature":
        # Divided by the largest first: the power of a small t stays finite.
        largest = max(max(sizes.values()), 1)
        found = {source: (size / largest) ** (1 / value) for source, size in sizes.items()}
    else:
        found = {source: min(float(size), value) if name == "capped" else float(size) for source, size in sizes.items()}
    total = math.fsum(found.values())
    if not total > 0:
        raise UserError(f"{field} is {mixture!r}, but no source has any training data")
    return {source: number / total for source, number in found.items()}


def _fixed(fixed: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, float]:
    missing = [source for source in sizes if source not in fixed]
    if missing:
        raise UserError(f"batch.shares misses {listed(missing)}; give every source a number")
    for source, number in fixed.items():
        if source not in sizes:
            raise unknown("source in batch.shares:", source, sizes)
        if not 0 <= number < math.inf:
            raise UserError(f"batch.shares: {source} is {number}; a share must be a finite number, not negative")
    if not any(fixed.values()):
        raise UserError("batch.shares are all 0; at least one source must be seen")
    return {source: float(fixed[source]) for source in sizes}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which source each row of a run belongs to; a pure function of the row's place.

    Row k = 0, 1, ... of a source is due when the source's share, added up over the rows of the run, reaches k + 1/2. Rows go
    out in order of their due times, the earlier source first where two are equal. With shares that stay the same this is the
    method of Webster and Sainte-Lague: whenever all sources' parts of the rows so far are whole numbers, they have exactly
    these, and between they differ by at most 1/2 + share (N - 2) / 2 rows. A source with a small share is seen in some steps
    only. Where shares change, they do so linearly from the first row to the last, and the sum is an integral.

    Attributes:
        start: {source: share} at the first row.
        end: {source: share} at the last row, the same sources; more rows would go on with it.
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
        # When `slack` rows less are due in all, at most this many of each source are out: the others are sorted.
        base_N = np.maximum(np.floor(self._due_by(max(rows - slack, 0.0))) - 1, 0).astype(np.int64)
        order = self._order(base_N, rows - int(base_N.sum()))
        total_N = base_N + np.bincount(order, minlength=len(base_N))
        return dict(zip(self.start, total_N.tolist(), strict=True))

    def constant(self) -> bool:
        """Whether every step has the same rows of each source."""
        ideal_N = self._ends()[0] * self.rows
        return self.start == self.end and bool(np.allclose(ideal_N, np.round(ideal_N), rtol=0, atol=1e-9))

    def capacity(self) -> dict[str, int]:
        """{source: rows}: the most that the source has in any step; for very long runs a bound of it."""
        start_N, end_N = self._ends()
        if self.constant():
            found_N = np.round(start_N * self.rows)
        elif self.steps * self.rows <= WHOLE_RUN:
            order = self._order(np.zeros(len(start_N), np.int64), self.steps * self.rows).reshape(self.steps, self.rows)
            found_N = np.array([(order == number).sum(axis=1).max(initial=0) for number in range(len(start_N))])
        else:
            # Between the due times of a step's first and last row the shares sum to at most R + N.
            most_N = np.floor(np.maximum(start_N, end_N) * (self.rows + len(start_N))) + 1
            found_N = np.minimum(most_N, self.rows) * (np.maximum(start_N, end_N) > 0)
        return dict(zip(self.start, found_N.astype(int).tolist(), strict=True))

    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(list(self.start.values())), np.array([self.end[source] for source in self.start])

    def _due_by(self, time: float) -> np.ndarray:
        """f64[N]: the shares added up over the first `time` rows, and 1/2: so many rows are due."""
        start_N, end_N = self._ends()
        total = max(self.steps * self.rows, 1)
        within = min(time, total)
        return start_N * within + (end_N - start_N) * within**2 / (2 * total) + end_N * (time - within) + 0.5

    def _due(self, number: int, k: np.ndarray) -> np.ndarray:
        """f64: when rows k of the source with this number are due; infinity for never."""
        start, end = (float(ends[number]) for ends in self._ends())
        total = max(self.steps * self.rows, 1)
        wanted = k + 0.5
        whole = (start + end) / 2 * total
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a share of 0: infinity
            if start == end:
                return wanted / start
            # The root of start x + (end - start) x^2 / (2 total) = wanted, in the form that loses no digits.
            root = np.sqrt(np.maximum(start**2 + 2 * (end - start) * wanted / total, 0.0))
            return np.where(wanted <= whole, 2 * wanted / (start + root), total + (wanted - whole) / end)

    def _order(self, out_N: np.ndarray, count: int) -> np.ndarray:
        """i64[count]: the numbers of the sources that the next rows belong to, after `out_N` rows of each."""
        until_N = self._due_by(out_N.sum() + count + len(out_N) / 2 + 1)
        numbers, times = [], []
        for number, (first, until) in enumerate(zip(out_N, until_N, strict=True)):
            k = np.arange(first, max(int(until) + 2, first))
            numbers.append(np.full(len(k), number))
            times.append(self._due(number, k))
        # Stable, and in the sources' order: that is the rule for equal times.
        first_count = np.argsort(np.concatenate(times), kind="stable")[:count]
        return np.concatenate(numbers)[first_count]


@dataclasses.dataclass(frozen=True)
class InTurn:
    """Schedules of the same sources, one after another.

    Attributes:
        parts: The schedules; after the last one's steps it goes on.
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

    def same(self, steps: range) -> dict[str, int] | None:
        """{source: rows} where each of these steps has the same rows of every source, else None."""
        found = self._in(steps)
        same = all(part.constant() and part.start == found[0].start for part in found)
        return found[0].capacity() if same else None

    def capacity(self, steps: range) -> dict[str, int]:
        """{source: rows}: the most that the source has in any of these steps, or a bound of it."""
        found = [part.capacity() for part in self._in(steps)]
        return {source: max(most[source] for most in found) for source in found[0]}

    def _in(self, steps: range) -> list[Schedule]:
        """The schedules that these steps belong to."""
        start, found = 0, []
        for part in self.parts:
            if start < steps.stop and (steps.start < start + part.steps or part is self.parts[-1]):
                found.append(part)
            start += part.steps
        return found


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
