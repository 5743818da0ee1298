"""The result of mtl_jax.compare: numbers, a table for the terminal, JSON."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tabulate import tabulate

from mtl_jax.core.errors import listed
from mtl_jax.reporting.paired_bootstrap import HELPED, HURT, UNCLEAR, UNDEFINED, Difference

LOWEST = 3  # most conflicts of a task that are named
AGAINST = -0.01  # a mean cosine below it is a conflict


class Alone(NamedTuple):
    """A task trained alone.

    Attributes:
        metric: The task's main metric.
        value: Its mean over the runs, on test.
        runs: Their workdirs.
    """

    metric: str
    value: float
    runs: tuple[str, ...]


class Column(NamedTuple):
    """One joint setting against the runs alone.

    Attributes:
        runs: Workdirs of its runs.
        values: {task: mean of the main metric over the runs, on test}.
        differences: {task: joint minus alone}.
        mean: The mean over the tasks; None for one task.
        worst: The lowest of the differences; its interval is wider, as it was chosen among the tasks. None for one task.
        worst_task: Its task.
        cosines: {task: {other task: mean cosine of their gradients in these runs}}, the lowest first; {} where the runs have
            none.
        covers: What the intervals cover.
    """

    runs: tuple[str, ...]
    values: dict[str, float]
    differences: dict[str, Difference]
    mean: Difference | None
    worst: Difference | None
    worst_task: str
    cosines: dict[str, dict[str, float]]
    covers: str

    def tasks(self, verdict: str) -> list[str]:
        """The tasks with this verdict."""
        return [task for task, difference in self.differences.items() if difference.verdict == verdict]

    def conflicts(self, task: str) -> dict[str, float]:
        """{other task: mean cosine} of the tasks whose gradients are against the task's, the lowest first, at most LOWEST."""
        against = [(other, cosine) for other, cosine in self.cosines.get(task, {}).items() if cosine < AGAINST]
        return dict(against[:LOWEST])

    @property
    def summary(self) -> str:
        """How many tasks are helped and hurt, and whether there is a gain: only if the interval of the mean is above 0."""
        counts = [f"{len(tasks)} {verdict}" for verdict in (HELPED, UNCLEAR, HURT, UNDEFINED) if (tasks := self.tasks(verdict))]
        if self.mean is None:
            return ", ".join(counts)
        gain = {HELPED: "a gain", HURT: "a loss"}.get(self.mean.verdict, "no gain is shown")
        return f"{', '.join(counts)}; on average {gain}"

    @property
    def hurt_lines(self) -> list[str]:
        """A line for each hurt task on the tasks that it is in conflict with."""
        lines = []
        for task in self.tasks(HURT):
            if pairs := [f"{other} {cosine:+.2f}" for other, cosine in self.conflicts(task).items()]:
                lines.append(f"{task} is hurt, and in conflict with {', '.join(pairs)} (mean cosine of the gradients)")
            elif task in self.cosines:
                other, cosine = next(iter(self.cosines[task].items()))
                lowest = f"the lowest mean cosine is {cosine:+.2f}, with {other}"
                lines.append(f"{task} is hurt, but in conflict with no other task: {lowest}")
        if self.tasks(HURT) and not self.cosines:
            lines.append(
                f"{listed(self.tasks(HURT))}: which task is in conflict is not known, as these runs had a rule that does not "
                "compare gradients"
            )
        return lines


class Compared(NamedTuple):
    """Joint runs against runs alone.

    Attributes:
        alone: {task: the runs alone}.
        columns: {name of a joint setting: its column}.
        resamples: Bootstrap samples.
        notes: Lines on runs and tasks that are not compared.
    """

    alone: dict[str, Alone]
    columns: dict[str, Column]
    resamples: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values; null for a number that is not defined."""
        return {
            "alone": {task: {**side._asdict(), "value": _number(side.value)} for task, side in self.alone.items()},
            "joint": {
                name: {
                    "runs": column.runs,
                    "values": {task: _number(value) for task, value in column.values.items()},
                    "differences": {task: _difference(value) for task, value in column.differences.items()},
                    "mean": column.mean and _difference(column.mean),
                    "worst": column.worst and {"task": column.worst_task, **_difference(column.worst)},
                    "cosines": column.cosines,
                    "covers": column.covers,
                    "summary": column.summary,
                }
                for name, column in self.columns.items()
            },
            "resamples": self.resamples,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """A row for each task, their mean and the worst; a column for each joint setting; verdicts and conflicts below."""
        single = next(iter(self.columns.values())) if len(self.columns) == 1 else None
        rows = []
        for task, side in self.alone.items():
            numbers = [plain(side.value), *([plain(single.values.get(task))] if single else [])]
            cells = [shown(column.differences.get(task)) for column in self.columns.values()]
            rows.append([task, side.metric, *numbers, *cells])
        blank = ["", ""] if single else [""]
        if any(column.mean for column in self.columns.values()):
            rows.append(["mean", "", *blank, *(shown(column.mean) for column in self.columns.values())])
            worst = [f"{shown(column.worst)} ({column.worst_task})" if column.worst else "" for column in self.columns.values()]
            rows.append(["worst", "", *blank, *worst])
        names = [f"{name} - alone [95 %]" for name in self.columns]
        heads = ["task", "test metric", "alone", *([next(iter(self.columns))] if single else []), *names]
        lines = [tabulate(rows, heads, "github", disable_numparse=True), ""]
        for name, column in self.columns.items():
            lines.append(f"{name}: {column.summary}. The intervals cover {column.covers}.")
            lines += [f"{name}: {line}" for line in column.hurt_lines]
        return "\n".join([*lines, *self.notes])


def plain(value: float | None) -> str:
    """A number with four decimals, in ASCII; a dash where it is not defined."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def shown(difference: Difference | None) -> str:
    """A difference with its interval and its verdict, in ASCII."""
    if difference is None:
        return ""
    if difference.verdict == UNDEFINED:
        return UNDEFINED
    return f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] {difference.verdict}"


def _difference(difference: Difference) -> dict[str, Any]:
    return {**{name: _number(value) for name, value in difference._asdict().items()}, "verdict": difference.verdict}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
