"""The optimizer of a phase, from its configuration to optax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.transfer import optax_rules
from mtl_jax.transfer.freezing import ParamRule

OPTIMIZERS = ("adamw", "adam", "sgd")
# Numbers that an optimizer does not look at.
UNUSED = {"adam": ("weight_decay",), "sgd": ("weight_decay", "b2", "eps")}
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "slanted_triangular")


@dataclasses.dataclass(frozen=True)
class Optimizer(Configuration):
    """How the trainable parameters follow the gradient.

    Attributes:
        name: adamw, adam or sgd.
        learning_rate: Peak rate, for phases that name none of their own.
        schedule: After the warm-up: constant; linear or cosine decay that would reach 0 in the step after the phase's last; or
            inverse_sqrt, with the square root of the warm-up's steps over the steps so far (Vaswani et al., 2017), which does
            not depend on the end; or slanted_triangular (Howard and Ruder, 2018), which rises from peak / ratio and falls back
            to it.
        warmup: Share of a phase's steps over which the rate rises, to its peak in the last of them: from one step above 0, but
            for slanted_triangular.
        ratio: For slanted_triangular: the highest rate over the lowest.
        weight_decay: AdamW's decoupled decay, on parameters of two and more dimensions only (no biases, no norms).
        clip_norm: Largest norm of the trainable part's gradient; 0 for no clipping.
        b1: Adam's decay of the first moment; SGD's momentum.
        b2: Adam's decay of the second moment.
        eps: Adam's epsilon.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup: float = 0.1
    ratio: float = 32.0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


def check(config: Optimizer) -> None:
    """Raises UserError where a field of Optimizer makes no sense."""
    if config.name not in OPTIMIZERS:
        raise unknown("optimizer", config.name, OPTIMIZERS)
    if config.schedule not in SCHEDULES:
        raise unknown("schedule", config.schedule, SCHEDULES)
    if not 0 <= config.warmup <= 1:
        raise UserError(f"optimizer.warmup is {config.warmup}; it is a share, from 0 to 1")
    for field in ("learning_rate", "weight_decay", "clip_norm"):
        if not getattr(config, field) >= 0:
            raise UserError(f"optimizer.{field} is {getattr(config, field)}; it must not be negative")
    if not 1 <= config.ratio < math.inf:
        raise UserError(f"optimizer.ratio is {config.ratio}; it is the highest rate over the lowest, so at least 1")


def check_rule(config: Optimizer, rule: ParamRule) -> None:
    """Raises UserError where a parameter rule asks for what this optimizer does not have."""
    if rule.schedule and rule.schedule not in SCHEDULES:
        raise unknown(f"schedule of the rule {rule.pattern!r}:", rule.schedule, SCHEDULES)
    if rule.weight_decay is not None and config.name != "adamw":
        raise UserError(f"the rule {rule.pattern!r}: weight_decay is for adamw, and optimizer.name is {config.name}")


def schedule(config: Optimizer, peak: float, steps: int) -> optax.Schedule:
    """Learning rate by step of the phase, 0 in none of them.

    Steps count from 0. Of W steps of warm-up, step t has the share (t + 1) / W of the peak; of the N steps of the phase, the
    last one has 1 / (N - W + 1) of it with a linear schedule, or 1 / N where there is no warm-up.
    """
    warmup = round(config.warmup * steps)
    if config.schedule == "slanted_triangular":
        return slanted_triangular(peak, steps, warmup, config.ratio)
    rise = optax.linear_schedule(0.0, peak, warmup)
    # The first step of a warm-up from exactly 0 would be wasted: count from 1, to one more.
    counted = 1 if warmup else 0
    rest = max(1, steps + counted - warmup)
    fall = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda step: _cosine(peak, rest, step),
        "inverse_sqrt": lambda step: peak * jax.lax.rsqrt(1.0 + jnp.asarray(step, jnp.float32) / max(1, warmup)),
    }[config.schedule]
    return lambda step: optax.join_schedules([rise, fall], [warmup])(step + counted)


def _cosine(peak: float, steps: int, step: Any) -> jax.Array:
    """peak * (1 + cos(pi step / steps)) / 2; written as a square, since in float32 the sum is 0 long before the end."""
    left = 1.0 - jnp.minimum(jnp.asarray(step, jnp.float32), steps) / steps
    return peak * jnp.sin(0.5 * jnp.pi * left) ** 2


def slanted_triangular(peak: float, steps: int, cut: int, ratio: float = 32.0) -> optax.Schedule:
    """ULMFiT's schedule (Howard and Ruder, 2018): peak * (1 + p * (ratio - 1)) / ratio.

    At step t = 1, 2 ... p = t / cut up to the cut, then 1 - (t - cut) / (steps - cut). That is the paper's
    1 - (t - cut) / (cut * (1 / cut_frac - 1)) where the cut is that share of the steps exactly; where it is rounded, the
    paper's p falls below 0.

    Args:
        peak: The highest rate.
        steps: In all.
        cut: The step of the highest rate; 0: it only falls.
        ratio: The highest rate over the lowest.
    """

    def rate(step: Any) -> jax.Array:
        t = jnp.asarray(step, jnp.float32) + 1.0
        p = jnp.where(t < cut, t / max(1, cut), 1 - (t - cut) / max(1, steps - cut))
        return peak * (1 + p * (ratio - 1)) / ratio

    return rate


def build(config: Optimizer, decided: Any, peak: float, steps: int) -> optax.GradientTransformation:
    """The optax chain: clip, the moments of all that trains, then each leaf's own decay, rate and schedule.

    Args:
        config: The optimizer.
        decided: freezing.decide(params, rules): the rule of each parameter.
        peak: Highest rate.
        steps: Length of the phase.

    Returns:
        A transformation over the trainable leaves only. moving.carry takes its state from one phase to the next.
    """
    names = {rule.schedule for rule in jax.tree.leaves(decided)}
    schedules = {
        name: schedule(dataclasses.replace(config, schedule=name or config.schedule), peak, steps) for name in names | {""}
    }
    scale = optax.trace(config.b1) if config.name == "sgd" else optax_rules.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale,
        optax_rules.scale_by_rules(decided, schedules, config.weight_decay if config.name == "adamw" else 0.0),
    )
