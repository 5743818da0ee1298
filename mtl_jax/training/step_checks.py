"""Checks of a step's metrics: numbers that are not finite, their cause as far as parameters show it, solvers that failed."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from mtl_jax.core.trees import path_name
from mtl_jax.experiment import Experiment
from mtl_jax.training.checkpoint_store import Damaged, Store
from mtl_jax.training.train_state import StepMetrics
from mtl_jax.weighting.solvers import TOLERANCE


def non_finite_metric(metrics: StepMetrics) -> str:
    """A line that names the first loss, or the gradient, that is not finite; "" where all are.

    Args:
        metrics: Of one run, on the host.
    """
    for name in sorted(metrics.losses, key=lambda name: name not in metrics.counts):  # the tasks first
        if not math.isfinite(metrics.losses[name]):
            kind = "task" if name in metrics.counts else "regulariser"
            return f"the loss of {kind} {name!r} is {float(metrics.losses[name])}"
    return "" if math.isfinite(metrics.gradient_norm) else "the gradient is not finite"


def unsolved(metrics: StepMetrics) -> str:
    """A line where the solver of the weighting rule did not reach its tolerance; "" where it did, or there is none."""
    if metrics.residual is None or not metrics.residual > TOLERANCE:  # NaN: nothing was solved
        return ""
    return (
        f"the weighting rule's solver left a relative residual of {float(metrics.residual):.2g}, above {TOLERANCE:g}: the "
        "weights of such a step are not the rule's; metrics.jsonl has solver_residual of every step"
    )


def non_finite_parameter(params: Any) -> str:
    """The path of the first parameter with a number that is not finite; "" where all are."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.asarray(jax.device_get(leaf))
        if not np.isfinite(array.astype(np.float32)).all():
            return path_name(path)
    return ""


def explain_non_finite(step: int, experiment: Experiment, start: Any, store: Store) -> str:
    """The likely cause of a loss or gradient that is not finite, and advice, in one or two sentences.

    Args:
        step: The step, from 1 on.
        experiment: The run's.
        start: The run's parameters before the first step.
        store: The run's checkpoints, all of them on disk.
    """
    bad_steps, intact = _checkpoints(store)
    if step == 1 and (path := non_finite_parameter(start)):
        in_trunk = path.startswith("trunk/")
        origin = f"init_from.path {experiment.init_from.path}" if experiment.init_from.path else "its initialisation"
        if in_trunk and not experiment.init_from.path and (trunk := getattr(experiment.trunk, "path", "")):
            origin = f"trunk.path {trunk}"
        return f"The parameter {path} has numbers that are not finite before the first step: they come from {origin}"
    if bad_steps:
        path = next(iter(bad_steps.values()))
        cause = f"The parameter {path} is not finite in the checkpoint of step {max(bad_steps)} already"
        advice = "try a lower learning rate in another --workdir"
        if intact:
            steps = ", ".join(map(str, sorted(bad_steps)))
            advice += f", or delete the checkpoints of steps {steps} to resume from step {intact}"
        return f"{cause}; {advice}"
    if step == 1:
        return (
            "All parameters are finite and none had changed by then, so the learning rate is not the cause: look for labels "
            "and weights that are too large, and try --dtype float32 if it is another"
        )
    if intact is None:
        return "There is no checkpoint to resume from; try a lower learning rate in another --workdir"
    return f"The checkpoint of step {intact} is intact in {store.folder}; try a lower learning rate in another --workdir"


def _checkpoints(store: Store) -> tuple[dict[int, str], int | None]:
    """{step: a parameter that is not finite} of the newest checkpoints, and the step of the newest one that is finite."""
    bad_steps: dict[int, str] = {}
    for step in reversed(store.steps()):
        try:
            path = non_finite_parameter(store.restore_params(step))
        except Damaged:
            continue
        if not path:
            return bad_steps, step
        bad_steps[step] = path
    return bad_steps, None
