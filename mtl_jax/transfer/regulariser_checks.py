"""The regularisers of an experiment together: which tasks they name, and checks before anything is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence, Set

from mtl_jax.core import parts
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.transfer.penalties import Mixout
from mtl_jax.transfer.regularisers import FIELD, Regulariser, check_expression
from mtl_jax.weighting import schedules


def tasks_named_by(regulariser: Regulariser) -> tuple[str, ...]:
    """The tasks in a regulariser's field `tasks`; () if it has none, which means all."""
    tasks: tuple[str, ...] = getattr(regulariser, "tasks", ())
    return tasks


def without_tasks(regularisers: Sequence[Regulariser], dropped: Set[str]) -> tuple[Regulariser, ...]:
    """The regularisers of a run that leaves some tasks out.

    Args:
        regularisers: The experiment's regularisers; one of weight 0 is dropped with the last of its tasks.
        dropped: The tasks that are left out.

    Raises:
        UserError: A regulariser has none of its tasks left; an empty list would mean all tasks.
    """
    remaining: list[Regulariser] = []
    for regulariser in regularisers:
        named = tasks_named_by(regulariser)
        tasks = tuple(task for task in named if task not in dropped)
        if len(tasks) == len(named):
            remaining.append(regulariser)
        elif tasks:
            remaining.append(dataclasses.replace(regulariser, tasks=tasks))  # type: ignore[call-arg]
        elif regulariser.weight not in (0, "0"):
            name = regulariser.name
            raise UserError(
                f"{FIELD}: {name} is of {listed(named)}, which only leaves out; name it there, or set the weight of {name} to 0"
            )
    return tuple(remaining)


def check(regularisers: Sequence[Regulariser], mixout: Mixout, tasks: Sequence[str], phases: Sequence[str], steps: int) -> None:
    """Checks regularisers and mixout before anything is read.

    Args:
        regularisers: The experiment's regularisers.
        mixout: Its mixout.
        tasks: The names of its tasks.
        phases: The names of its phases.
        steps: Number of steps of the run.

    Raises:
        UserError: One line that names the field.
    """
    names = set(tasks)
    for regulariser in regularisers:
        name = regulariser.name
        if not re.fullmatch("[A-Za-z0-9_-]+", name):
            raise UserError(f"{FIELD}: name {name!r}: use letters, digits, '_' and '-' only")
        if name in names:
            owner = "a task" if name in tasks else "another one"
            raise UserError(f"{FIELD}: {name!r} is also the name of {owner}; names must differ")
        names.add(name)
        if regulariser.phase and regulariser.phase not in phases:
            raise unknown(f"phase of {name}:", regulariser.phase, phases)
        schedules.check_steps({name: regulariser.weight}, range(steps), FIELD)
        _check_methods(regulariser)
        regulariser.check()
        for task in tasks_named_by(regulariser):
            if task not in tasks:
                raise unknown(f"task of {name}:", task, tasks)
    if not 0 <= mixout.p < 1:
        raise UserError(f"mixout.p is {mixout.p}; it must be at least 0 and below 1")
    check_expression("mixout.parameters", mixout.parameters)


def _check_methods(regulariser: Regulariser) -> None:
    """Raises UserError unless a class of the user's has one of the two methods with a loss."""
    kind = type(regulariser)
    defined = [name for name in ("penalty", "output_loss") if getattr(kind, name) is not getattr(Regulariser, name)]
    if len(defined) != 1 and parts.origin_of(kind) is not None:
        problem = "has both penalty() and output_loss()" if defined else "has neither penalty() nor output_loss()"
        raise UserError(f"{FIELD}: class {kind.__name__} {problem}; define one of them")
