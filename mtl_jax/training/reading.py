"""What the host reads of a step's metrics: a record for the log, and whether something is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtl_jax.training.logs import compare_gradients
from mtl_jax.training.step import Metrics
from mtl_jax.weighting.solvers import TOLERANCE


def read(metrics: Metrics, seen: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, float], dict[str, Any]]:
    """The losses by name, and the record of a step.

    Args:
        metrics: Of one run, on the host.
        seen: {source: {"rows", "examples", "passes": so far}}.
    """
    losses = {name: float(loss) for name, loss in (metrics.losses | metrics.held).items()}
    record: dict[str, Any] = {f"loss/{name}": loss for name, loss in losses.items()}
    record |= {f"weight/{name}": float(weight) for name, weight in (metrics.weights | metrics.held_weights).items()}
    record |= {f"examples/{task}": int(count) for task, count in metrics.counts.items()}
    record |= {"total": float(metrics.total), "gradient_norm": float(metrics.gradient_norm)}
    record |= {"tokens": int(metrics.seen[:, 2].sum())}
    for source, facts in seen.items():
        record |= {f"seen/{source}/{name}": facts[name] for name in ("rows", "examples", "passes")}
    if metrics.gram is not None and np.isfinite(metrics.gram).all():  # else the rule was not due
        tasks = sorted(metrics.losses)
        present = [bool(metrics.counts[task] > 0) for task in tasks]
        record |= compare_gradients(np.asarray(metrics.gram), tasks, present)
    if metrics.residual is not None and np.isfinite(metrics.residual):
        record["solver_residual"] = float(metrics.residual)
    return losses, record


def not_finite(metrics: Metrics) -> str:
    """What is not finite in a step: a task's or regulariser's loss, or the gradient; empty where all is well."""
    for kind, losses in (("task", metrics.losses), ("regulariser", metrics.held)):
        for name, loss in losses.items():
            if not math.isfinite(loss):
                return f"the loss of {kind} {name!r} is {float(loss)}"
    return "" if math.isfinite(metrics.gradient_norm) else "the gradient is not finite"


def unsolved(metrics: Metrics) -> str:
    """A line where a step's weights are not the solution that their rule is after; empty where all is well."""
    if metrics.residual is None or not metrics.residual > TOLERANCE:  # NaN: nothing was solved
        return ""
    return (
        f"the weighting rule's solver left a relative residual of {float(metrics.residual):.2g}, above {TOLERANCE:g}: such "
        "steps are not the rule's; solver_residual in metrics.jsonl has every step's"
    )
