"""Rules that look at nothing but the step."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.errors import UserError, unknown
from mtl_jax.weighting.base import Rule, Signals, Weights, stack, unstack

Schedule = Callable[[jax.Array], jax.Array]

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant_schedule": optax.constant_schedule,
    "cosine_decay_schedule": optax.cosine_decay_schedule,
    "exponential_decay": optax.exponential_decay,
    "linear_schedule": optax.linear_schedule,
    "piecewise_constant_schedule": optax.piecewise_constant_schedule,
    "piecewise_interpolate_schedule": optax.piecewise_interpolate_schedule,
    "polynomial_schedule": optax.polynomial_schedule,
    "warmup_constant_schedule": optax.warmup_constant_schedule,
    "warmup_cosine_decay_schedule": optax.warmup_cosine_decay_schedule,
    "warmup_exponential_decay_schedule": optax.warmup_exponential_decay_schedule,
}


def equal() -> Rule:
    """Every weight is 1: the plain sum of the losses (Caruana 1997). The weights sum to K."""

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        return unstack(jnp.ones(len(signals.losses)), signals), state

    return Rule(init=lambda names: (), update=update)


def fixed(weights: Mapping[str, float | Schedule]) -> Rule:
    """Given weights: L_target + lambda * L_source is fixed({"target": 1, "source": lam}).

    Args:
        weights: {task: weight}; a weight is a number that is finite and not negative, or an optax schedule of the step.
            Their sum is the user's.

    Raises:
        UserError: A weight is negative or not finite; at init, a task has no weight or a weight no task.
    """
    for task, weight in weights.items():
        if isinstance(weight, str):
            raise UserError(f"weights: {task} is {weight!r}; a schedule as text is for the weighting scheduled")
        if not callable(weight) and not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"weights: {task} is {weight}; a weight must be finite and not negative")

    def init(names: Sequence[str]) -> Any:
        for task in weights:
            if task not in names:
                raise unknown("task in weights:", task, names)
        missing = [name for name in names if name not in weights]
        if missing:
            raise UserError(f"weights: no weight for {', '.join(missing)}; give every task one (0 leaves it out)")
        return ()

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        values_K = stack({task: at(weights[task], signals.step) for task in signals.losses})
        return unstack(values_K, signals), state

    return Rule(init=init, update=update)


def scheduled(weights: Mapping[str, float | str | Schedule]) -> Rule:
    """Weights that change with the step: an optax schedule for each task. Their sum is the user's.

    Args:
        weights: {task: weight}; a number, an optax schedule, or the call that makes one as text, so that it can stand in a
            configuration: "linear_schedule(1.0, 0.0, 1000)". The step counts from the start of the run, through all phases.

    Raises:
        UserError: A text is no such call; at init, a task has no weight or a weight no task.
    """
    return fixed({task: parse(weight, task) for task, weight in weights.items()})


def parse(weight: float | str | Schedule, task: str) -> float | Schedule:
    """A weight with its text, if it is one, read: a number, or the call of one of SCHEDULES with literal arguments.

    Raises:
        UserError: It is neither.
    """
    if not isinstance(weight, str):
        return weight
    try:
        return float(weight)
    except ValueError:
        pass  # not a number: a call
    try:
        call = ast.parse(weight, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not a call")
        arguments = [ast.literal_eval(argument) for argument in call.args]
        options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"weights: {task} is {weight!r}; write a number or a schedule such as linear_schedule(1.0, 0.0, 1000)"
        ) from error
    if call.func.id not in SCHEDULES:
        raise unknown(f"schedule in the weight of {task!r}:", call.func.id, SCHEDULES)
    try:
        return SCHEDULES[call.func.id](*arguments, **options)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"weights: {task} is {weight!r}: {error}") from error


def at(weight: float | Schedule, step: jax.Array) -> jax.Array:
    """The weight at a step, f32[]."""
    return jnp.asarray(weight(step) if callable(weight) else weight, jnp.float32)


def check_steps(weights: Mapping[str, float | str | Schedule], steps: range) -> None:
    """Looks at the weights of some steps before any is done.

    Args:
        weights: What fixed() or scheduled() takes.
        steps: The steps of the run in which they count.

    Raises:
        UserError: A weight is negative or not finite in one of them.
    """
    for task, weight in weights.items():
        schedule = parse(weight, task)
        if not callable(schedule):
            continue
        try:
            values_N = jax.vmap(lambda step, weight=schedule: at(weight, step))(jnp.arange(steps.start, steps.stop))
        except (TypeError, ValueError) as error:
            raise UserError(f"weights: the schedule of {task} cannot be evaluated ({error})") from error
        bad_N = ~(jnp.isfinite(values_N) & (values_N >= 0))
        if bad_N.any():
            first = int(jnp.argmax(bad_N))
            raise UserError(
                f"weights: the schedule of {task} is {float(values_N[first])} at step {steps[first]}; "
                "it must be finite and not negative"
            )
