"""The numbers in which the runs of a program differ: arrays with an axis over runs, put back into the experiment under vmap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.ablation import fields
from mtl_jax.experiment import Experiment
from mtl_jax.weighting import schedules

Numbers = dict[str, Any]


def collect(experiments: Sequence[Experiment]) -> Numbers:
    """{field: f32[N]} of the numbers that are not the same in all; f32[N, steps] where one of them is a schedule.

    Args:
        experiments: Those of one program, N of them.
    """
    found: Numbers = {}
    steps = range(sum(phase.steps for phase in experiments[0].phases))
    for path in fields.numbers(experiments[0]):
        values = [fields.get(experiment, path) for experiment in experiments]
        if all(value == values[0] for value in values):
            continue
        if any(isinstance(value, str) for value in values):
            found[".".join(path)] = np.stack([np.asarray(schedules.over(value, steps, path[-1])) for value in values])
        else:
            found[".".join(path)] = np.array(values, np.float32)
    return found


def insert(experiment: Experiment, numbers: Mapping[str, jax.Array]) -> Experiment:
    """The experiment with the numbers of one run.

    Args:
        experiment: One of the program.
        numbers: {field: f32[] or f32[steps]}; they may be traced.
    """
    for text, value in numbers.items():
        experiment = fields.put(experiment, tuple(text.split(".")), _at_each_step(value) if value.ndim else value)
    return experiment


def _at_each_step(values_S: jax.Array) -> schedules.Schedule:
    return lambda step: values_S[jnp.clip(step, 0, len(values_S) - 1)]
