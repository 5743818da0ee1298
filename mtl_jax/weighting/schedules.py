"""Schedules of weights, of tasks and of regularisers: numbers that change with the step, in a configuration as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError, unknown

Schedule = Callable[[jax.Array], jax.Array]
FORM = "a number or a schedule such as linear_schedule(1.0, 0.0, 1000)"


def dann_schedule(init_value: float, end_value: float, transition_steps: int, sharpness: float = 10.0) -> Schedule:
    """The upper half of a sigmoid: steep at first, then flatter and flatter.

    init_value + (end_value - init_value) * (2 / (1 + exp(-sharpness * p)) - 1), where p is the completed share of
    transition_steps. dann_schedule(0, 1, N) is the schedule of Ganin and Lempitsky (2015, https://arxiv.org/abs/1409.7495,
    section 4.1), dann_schedule(1, 0, N) its mirror image, for a source that counts less and less. As in the paper, end_value is
    not quite reached: with a sharpness of 10, all but 0.0001 of the way is done after transition_steps, and the value stays
    there.

    Raises:
        ValueError: transition_steps or sharpness is not above 0.
    """
    _check_above_0(transition_steps=transition_steps, sharpness=sharpness)

    def schedule(step: jax.Array) -> jax.Array:
        done = jnp.clip(jnp.asarray(step, jnp.float32) / transition_steps, 0.0, 1.0)
        return init_value + (end_value - init_value) * (2.0 * jax.nn.sigmoid(sharpness * done) - 1.0)

    return schedule


def sigmoid_schedule(
    init_value: float, end_value: float, transition_steps: int, sharpness: float = 10.0, middle: float = 0.5
) -> Schedule:
    """A whole sigmoid: flat, then steep around the middle, then flat, as in the annealing of losses in RecAdam.

    init_value + (end_value - init_value) / (1 + exp(-sharpness * (p - middle))), where p is the number of steps so far over
    transition_steps, also above 1. That is 1 / (1 + exp(-k (t - t0))) of Chen et al. (2020, https://arxiv.org/abs/2004.12651,
    section 4.2), with k = sharpness / transition_steps and t0 = middle * transition_steps.

    Raises:
        ValueError: transition_steps or sharpness is not above 0.
    """
    _check_above_0(transition_steps=transition_steps, sharpness=sharpness)

    def schedule(step: jax.Array) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) / transition_steps
        return init_value + (end_value - init_value) * jax.nn.sigmoid(sharpness * (done - middle))

    return schedule


def _check_above_0(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is {number}; it must be above 0")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant_schedule": optax.constant_schedule,
    "cosine_decay_schedule": optax.cosine_decay_schedule,
    "dann_schedule": dann_schedule,
    "exponential_decay": optax.exponential_decay,
    "linear_schedule": optax.linear_schedule,
    "piecewise_constant_schedule": optax.piecewise_constant_schedule,
    "piecewise_interpolate_schedule": optax.piecewise_interpolate_schedule,
    "polynomial_schedule": optax.polynomial_schedule,
    "sigmoid_schedule": sigmoid_schedule,
    "warmup_constant_schedule": optax.warmup_constant_schedule,
    "warmup_cosine_decay_schedule": optax.warmup_cosine_decay_schedule,
    "warmup_exponential_decay_schedule": optax.warmup_exponential_decay_schedule,
}


def parse(weight: float | str | Schedule, task: str, field: str = "weights") -> float | Schedule:
    """A weight; one that is text is read: a number, or a name of SCHEDULES with its arguments.

    Args:
        weight: The weight.
        task: The task or regulariser that it belongs to; errors name it.
        field: The field of the configuration that the weight stands in; errors name it.

    Raises:
        UserError: The text is neither.
    """
    if not isinstance(weight, str):
        return weight
    try:
        return float(weight)
    except ValueError:
        pass  # not a number: a schedule
    name, arguments, options = name_options.parse(weight, f"{field}: {task}", form=FORM, arguments=True)
    if name not in SCHEDULES:
        if not arguments and not options:  # a mistyped number, perhaps
            raise UserError(f"{field}: {task} is {weight!r}; write {FORM}")
        raise unknown(f"schedule in the weight of {task!r}:", name, SCHEDULES)
    try:
        return SCHEDULES[name](*arguments, **options)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{field}: {task} is {weight!r}: {error}") from error


def at(weight: float | Schedule, step: jax.Array) -> jax.Array:
    """The weight at a step, f32[]."""
    return jnp.asarray(weight(step) if callable(weight) else weight, jnp.float32)


def check_steps(weights: Mapping[str, float | str | Schedule], steps: range, field: str = "weights") -> None:
    """Checks weights in all steps in which they are used, before the first step.

    Args:
        weights: As for fixed() or scheduled().
        steps: The steps of the run in which the weights are used.
        field: The field of the configuration that they stand in; errors name it.

    Raises:
        UserError: A weight is negative or not finite in one of the steps.
    """
    for task, weight in weights.items():
        values_N = over(weight, steps, task, field)
        bad_N = ~(jnp.isfinite(values_N) & (values_N >= 0))
        if bad_N.any():
            first, name = int(jnp.argmax(bad_N)), f"the schedule of {task}" if callable(parse(weight, task, field)) else task
            raise UserError(
                f"{field}: {name} is {float(values_N[first])} at step {steps[first]}; it must be finite and not negative"
            )


def over(weight: float | str | Schedule, steps: range, task: str, field: str = "weights") -> jax.Array:
    """f32[N]: the weight in each of N steps; the other arguments are as for parse().

    Raises:
        UserError: The weight is neither a number nor a schedule that can be evaluated.
    """
    schedule = parse(weight, task, field)
    if not callable(schedule):
        return jnp.full(len(steps), schedule, jnp.float32)
    try:
        return jax.vmap(lambda step: at(schedule, step))(jnp.arange(steps.start, steps.stop))
    except (TypeError, ValueError) as error:
        raise UserError(f"{field}: the schedule of {task} cannot be evaluated ({error})") from error
