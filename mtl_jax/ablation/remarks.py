"""A remark on an ablation's program before its runs are trained: whether the weights that vary change anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mtl_jax.ablation.plan import Program
from mtl_jax.experiment import Experiment, rule_of, weighs_heads
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.weighting import schedules

NOTHING_SHARED = "no parameter that tasks share is trained"
LARGEST_EPS = 1e-7  # up to it, Adam's epsilon is negligible beside the gradients of heads


def weights_do_nothing(program: Program, plans: Sequence[PhasePlan]) -> str:
    """A line for a program whose runs differ in weights that change nothing; "" for others.

    If no shared parameter is trained, a weight only scales the gradient of its own head. A head that follows its plain loss
    does not depend on it, and Adam divides a constant factor out again, also with decoupled decay. Adam does not do so if a
    regulariser also changes the head or if the weight changes with the step; nor does SGD. Clipping scales all heads by a
    common factor that depends on the weights, and a weight of 0 stops its head.

    Args:
        program: The program.
        plans: The plans of the phases of its template.
    """
    by_run = [_constant_weights(run.experiment) for run in program.runs]
    constant = [weights for weights in by_run if weights is not None]
    if len(constant) < len(by_run) or len({tuple(weights.items()) for weights in constant}) < 2:
        return ""
    if any(any(jax.tree.leaves(plan.mask["trunk"])) for plan in plans):
        return ""
    optimizer = program.template.optimizer
    if not any(weighs_heads(program.template, rule_of(program.template, plan.phase)) for plan in plans):
        return f"{NOTHING_SHARED}, and heads follow their plain losses: points that differ only in weights are equal"
    if optimizer.name not in ("adam", "adamw") or any(run.experiment.optimizer.eps > LARGEST_EPS for run in program.runs):
        return ""
    if any(plan.regularisers for plan in plans):
        return ""
    exceptions = [f"the effect of clipping at norm {optimizer.clip_norm:g}"] if optimizer.clip_norm else []
    exceptions += ["heads whose weight is 0"] if any(0 in weights.values() for weights in constant) else []
    return (
        f"{NOTHING_SHARED}, and Adam divides a constant weight out of a head's gradient again: points that differ only in "
        f"weights are equal{', except for ' if exceptions else ''}{' and '.join(exceptions)}"
    )


def _constant_weights(experiment: Experiment) -> dict[str, Any] | None:
    """{task: weight} if every weight is one number in all phases; else None."""
    by_phase: list[dict[str, Any]] = []
    for phase in experiment.phases:
        weights = phase.weights or (experiment.weights if experiment.weighting in ("fixed", "scheduled") else {})
        parsed = {task: schedules.parse(weight, task) for task, weight in sorted(weights.items())}
        if not weights or any(callable(weight) for weight in parsed.values()):
            return None
        by_phase.append(parsed)
    return by_phase[0] if all(weights == by_phase[0] for weights in by_phase) else None
