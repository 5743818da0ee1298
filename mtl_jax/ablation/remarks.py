"""What is to be said of an ablation's programs before their runs are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mtl_jax.ablation.plan import Program
from mtl_jax.experiment import Experiment, rule_of, weighs_heads
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.weighting import schedules

NOTHING_SHARED = "nothing that tasks share trains"
LARGEST_EPS = 1e-7  # up to it, Adam's epsilon is nothing beside the gradients of heads


def weights_do_nothing(program: Program, plans: Sequence[PhasePlan]) -> str:
    """A line that says so where runs differ in weights that change nothing; else "".

    Where no shared parameter trains, a weight only scales the gradient of its own head. A head that follows its plain loss does
    not see it, and Adam divides a constant factor out again: it does with decoupled decay, too. It does not where a regulariser
    pulls at the same head, where a weight changes with the step, or with SGD; clipping scales all heads together, by a factor
    that the weights decide; and a weight of 0 stops its head.

    Args:
        program: The runs.
        plans: The phases of its template, worked out.
    """
    given = [_constant_weights(run.experiment) for run in program.runs]
    known = [weights for weights in given if weights is not None]
    if len(known) < len(given) or len({tuple(weights.items()) for weights in known}) < 2:
        return ""
    if any(any(jax.tree.leaves(plan.mask["trunk"])) for plan in plans):
        return ""
    optimizer = program.template.optimizer
    if not any(weighs_heads(program.template, rule_of(program.template, plan.phase)) for plan in plans):
        return (
            "nothing that tasks share trains, and heads follow their plain losses: points that differ in weights only are equal"
        )
    if optimizer.name not in ("adam", "adamw") or any(run.experiment.optimizer.eps > LARGEST_EPS for run in program.runs):
        return ""
    if any(plan.regularisers for plan in plans):
        return ""
    but = [f"for what clipping at norm {optimizer.clip_norm:g} makes of them"] if optimizer.clip_norm else []
    but += ["for heads whose weight is 0"] if any(0 in weights.values() for weights in known) else []
    apart = f", but {' and '.join(but)}" if but else ""
    return (
        f"{NOTHING_SHARED}, and Adam divides a constant weight out of a head's gradient again: points that differ in weights "
        f"only are equal{apart}"
    )


def _constant_weights(experiment: Experiment) -> dict[str, Any] | None:
    """{task: weight} where it is one number in all phases; else None."""
    found: list[dict[str, Any]] = []
    for phase in experiment.phases:
        weights = phase.weights or (experiment.weights if experiment.weighting in ("fixed", "scheduled") else {})
        parsed = {task: schedules.parse(weight, task) for task, weight in sorted(weights.items())}
        if not weights or any(callable(weight) for weight in parsed.values()):
            return None
        found.append(parsed)
    return found[0] if all(weights == found[0] for weights in found) else None
