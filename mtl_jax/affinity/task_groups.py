"""Which tasks to train together if only a few models can be served: the best groups by pairwise gains.

A model is trained on a group of tasks and serves some of them; the other tasks of the group only help. A served task's score is
its score alone plus the mean gain from the group's other tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, listed

EXHAUSTIVE = 8  # most tasks for which every division is tried
NODES = 200_000  # of a branch and bound search: some seconds
MARGIN = 1e-12  # differences below it are rounding


class Group(NamedTuple):
    """One model.

    Attributes:
        trained: The tasks that it is trained on.
        served: The tasks that it is used for, among those.
    """

    trained: tuple[str, ...]
    served: tuple[str, ...]


class Grouping(NamedTuple):
    """The models, at most as many as the budget.

    Attributes:
        groups: The models; each task is served by one.
        score: The sum of the served tasks' scores.
        optimal: Whether it is proven that no other grouping has a higher score.
        tried: The number of partial or whole groupings that were compared.
    """

    groups: tuple[Group, ...]
    score: float
    optimal: bool
    tried: int

    @property
    def note(self) -> str:
        """A line on the search if there are too many tasks to compare all divisions; else empty."""
        tasks = sum(len(group.served) for group in self.groups)
        if tasks <= EXHAUSTIVE:
            return ""
        end = "it is proven to be the best" if self.optimal else "the search ended before it was proven to be the best"
        return (
            f"{tasks} tasks are too many to compare all groupings, which is done up to {EXHAUSTIVE}: "
            f"branch and bound looked at {self.tried:,}; {end}"
        )


def groups(
    gains: Any,
    names: Sequence[str],
    budget: int,
    *,
    alone: Mapping[str, float] | None = None,
    nodes: int = NODES,
) -> Grouping:
    """The best grouping of tasks for a budget of models.

    For up to 8 tasks every division into served sets is compared. For more it is branch and bound: tasks are assigned one after
    another, and a partial grouping is dropped if even the best helpers of each task cannot lift it above the best so far.

    Args:
        gains: f[K, K], row i, column j: how much training with task i adds to the score of task j. The diagonal is not read.
        names: The K tasks.
        budget: The most models, at least 1.
        alone: {task: its score when trained alone}; None: 0 for all, so that scores are gains.
        nodes: The most partial groupings of branch and bound.

    Raises:
        UserError: Shapes do not fit, a gain is not finite, a name is missing or twice, or the budget is below 1.

    References:
        Standley et al., 2020, Which Tasks Should Be Learned Together in Multi-task Learning?, https://arxiv.org/abs/1905.07553;
        Fifty et al., 2021, https://arxiv.org/abs/2109.04617

    Examples:
        >>> gains = [[0, 2, -1], [2, 0, -1], [-1, -1, 0]]
        >>> grouping = mtl_jax.affinity.groups(gains, ["a", "b", "c"], budget=2)
        >>> [group.served for group in grouping.groups], grouping.optimal
        ([('a', 'b'), ('c',)], True)
    """
    gains_KxK, alone_K = _checked(gains, names, budget, alone)
    find = _exhaustive if len(names) <= EXHAUSTIVE else _branch_and_bound
    division, optimal, tried = find(gains_KxK, min(budget, len(names)), nodes)
    best = sorted(((*_best_group(gains_KxK, served), served) for served in division), key=lambda group: group[2])
    score = sum(value for value, _, _ in best) + float(alone_K.sum())
    chosen = [Group(*(tuple(names[task] for task in tasks) for tasks in (trained, served))) for _, trained, served in best]
    return Grouping(tuple(chosen), score, optimal, tried)


def _checked(gains: Any, names: Sequence[str], budget: int, alone: Mapping[str, float] | None) -> tuple[np.ndarray, np.ndarray]:
    gains_KxK = np.array(gains, np.float64)
    size = len(names)
    if not size or gains_KxK.shape != (size, size):
        raise UserError(f"gains has shape {gains_KxK.shape} for {size} names; it must be [K, K] with a row for each name")
    if len(set(names)) < size:
        raise UserError(f"a task stands twice among {listed(names)}")
    if budget < 1:
        raise UserError(f"budget is {budget}; it must be at least 1 model")
    np.fill_diagonal(gains_KxK, 0.0)
    if not np.isfinite(gains_KxK).all():
        row, column = np.argwhere(~np.isfinite(gains_KxK))[0]
        raise UserError(f"the gain of {names[column]!r} from {names[row]!r} is not finite")
    missing = [name for name in names if alone is not None and name not in alone]
    if missing:
        raise UserError(f"alone has no score of {listed(missing)}")
    return gains_KxK, np.array([0.0 if alone is None else alone[name] for name in names])


Division = list[tuple[int, ...]]  # the served tasks of each model


def _best_group(gains_KxK: np.ndarray, served: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """The summed mean gain of served tasks, and the tasks of the group that gives it.

    The best group of a given size has the helpers with the largest gains, summed over the served tasks.
    """
    columns = gains_KxK[:, served]
    inside = float(columns[list(served)].sum())
    totals_K = columns.sum(axis=1)
    helpers = [int(task) for task in np.argsort(-totals_K, kind="stable") if task not in served]
    best_value, best_count = (inside / (len(served) - 1) if len(served) > 1 else 0.0), 0
    total = inside
    for number, helper in enumerate(helpers, start=1):
        total += float(totals_K[helper])
        value = total / (len(served) + number - 1)
        if value > best_value:
            best_value, best_count = value, number
    return best_value, tuple(sorted((*served, *helpers[:best_count])))


def _exhaustive(gains_KxK: np.ndarray, budget: int, nodes: int) -> tuple[Division, bool, int]:
    best_value, best_division, tried = -np.inf, [], 0
    values: dict[tuple[int, ...], float] = {}
    for division in _divisions(len(gains_KxK), budget):
        tried += 1
        total = 0.0
        for served in division:
            if served not in values:
                values[served] = _best_group(gains_KxK, served)[0]
            total += values[served]
        if total > best_value + MARGIN:
            best_value, best_division = total, division
    return best_division, True, tried


def _divisions(size: int, budget: int) -> Iterator[Division]:
    """Every division of tasks into at most `budget` sets; among equal beginnings, few sets come first."""

    def extend(task: int, sets: Division) -> Iterator[Division]:
        if task == size:
            yield sets
            return
        for number in range(len(sets)):
            yield from extend(task + 1, [*sets[:number], (*sets[number], task), *sets[number + 1 :]])
        if len(sets) < budget:
            yield from extend(task + 1, [*sets, (task,)])

    return extend(0, [])


def _branch_and_bound(gains_KxK: np.ndarray, budget: int, nodes: int) -> tuple[Division, bool, int]:
    @functools.cache
    def value_of(served: tuple[int, ...]) -> float:
        return _best_group(gains_KxK, served)[0]

    @functools.cache
    def bound_of(served: tuple[int, ...]) -> float:
        return sum(_task_bound(gains_KxK, task, served) for task in served)

    size = len(gains_KxK)
    best_division = _local_search(size, budget, value_of)
    best_value = sum(map(value_of, best_division))
    sequence = np.argsort(-np.abs(gains_KxK).sum(axis=0), kind="stable").tolist()  # the tasks that matter most come first
    remaining = [sum(bound_of((task,)) for task in sequence[number:]) for number in range(size + 1)]
    stack: list[tuple[int, Division]] = [(0, [])]
    tried = 0
    while stack:
        if tried >= nodes:
            return best_division, False, tried
        number, sets = stack.pop()
        tried += 1
        if number == size:
            value = sum(map(value_of, sets))
            if value > best_value + MARGIN:
                best_value, best_division = value, sets
            continue
        task = sequence[number]
        children = [[*sets[:n], tuple(sorted((*sets[n], task))), *sets[n + 1 :]] for n in range(len(sets))]
        children += [[*sets, (task,)]] if len(sets) < budget else []
        bounded = [(sum(map(bound_of, child)) + remaining[number + 1], child) for child in children]
        # The most promising child is on top of the stack.
        stack += [(number + 1, child) for bound, child in sorted(bounded) if bound > best_value + MARGIN]
    return best_division, True, tried


def _task_bound(gains_KxK: np.ndarray, task: int, together: tuple[int, ...]) -> float:
    """The most that a task can gain in any group with these tasks: its mean gain with its own best helpers."""
    mates = [mate for mate in together if mate != task]
    others = np.sort(np.delete(gains_KxK[:, task], [task, *mates]))[::-1]
    totals = gains_KxK[mates, task].sum() + np.concatenate([[0.0], np.cumsum(others)])
    counts = len(mates) + np.arange(len(totals))
    means = np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0)
    return float(means.max())


def _local_search(size: int, budget: int, value_of: Callable[[tuple[int, ...]], float]) -> Division:
    """A good initial grouping: from all tasks in one model, the best move of one task at a time, while it helps."""

    def division(labels: tuple[int, ...]) -> Division:
        return [tuple(task for task in range(size) if labels[task] == label) for label in sorted(set(labels))]

    def value(labels: tuple[int, ...]) -> float:
        return sum(map(value_of, division(labels)))

    labels = (0,) * size
    best = value(labels)
    while True:
        moves = [(*labels[:task], label, *labels[task + 1 :]) for task in range(size) for label in range(budget)]
        top = max(moves, key=value)
        if value(top) <= best + MARGIN:
            return division(labels)
        best, labels = value(top), top
