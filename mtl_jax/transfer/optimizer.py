"""The optimizer of a phase: its configuration, its learning rate by step, and the optax chain that they make."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.transfer import optax_rules
from mtl_jax.transfer import private as privacy
from mtl_jax.transfer.freezing import ParamRule
from mtl_jax.transfer.private import Private

OPTIMIZERS = ("adamw", "adam", "sgd")
# {optimizer: fields that it does not use}
UNUSED = {"adam": ("weight_decay",), "sgd": ("weight_decay", "b2", "eps")}
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "slanted_triangular")


@dataclasses.dataclass(frozen=True)
class Optimizer(Configuration):
    """How gradients become updates of the trainable parameters.

    Attributes:
        name: adamw, adam or sgd.
        learning_rate: Peak rate, for phases without a learning_rate.
        schedule: The rate after the warm-up. constant; linear or cosine: decay that would reach 0 one step after the phase;
            inverse_sqrt: the square root of the warm-up's steps over the steps so far (Vaswani et al., 2017), which does not
            depend on the length of the phase; slanted_triangular (Howard and Ruder, 2018): rises from peak / ratio and falls
            back to it.
        warmup: Share of a phase's steps over which the rate rises: in W such steps, from peak / W to the peak;
            slanted_triangular rises from peak / ratio.
        ratio: For slanted_triangular: the highest rate over the lowest.
        weight_decay: AdamW's decoupled decay, for parameters of two or more dimensions only (no biases, no norms).
        clip_norm: Largest norm of the gradient of all trainable parameters; 0: no clipping.
        b1: Adam's decay of the first moment; SGD's momentum.
        b2: Adam's decay of the second moment.
        eps: Adam's epsilon.
        private: Differentially private training, where its clip is above 0.

    Examples:
        >>> mtl_jax.Optimizer(learning_rate=2e-5, warmup=0.06, clip_norm=1.0).warmup
        0.06
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
    private: Private = dataclasses.field(default=Private(), metadata=ONLY_IF_SET)


def check(config: Optimizer) -> None:
    """Raises UserError if a field of Optimizer is out of range."""
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
    privacy.check(config.private)


def check_rule(config: Optimizer, rule: ParamRule) -> None:
    """Raises UserError if a parameter rule has a schedule or a decay that this optimizer does not have."""
    if rule.schedule and rule.schedule not in SCHEDULES:
        raise unknown(f"schedule of the rule {rule.pattern!r}:", rule.schedule, SCHEDULES)
    if rule.weight_decay is not None and config.name != "adamw":
        raise UserError(f"the rule {rule.pattern!r}: weight_decay is for adamw, and optimizer.name is {config.name}")


def schedule(config: Optimizer, peak: float, steps: int) -> optax.Schedule:
    """The learning rate by step of the phase; it is 0 in no step.

    Steps count from 0. In W steps of warm-up, step t has the share (t + 1) / W of the peak; in a phase of N steps with a linear
    schedule, the last step has the share 1 / (N - W + 1), or 1 / N without a warm-up.
    """
    warmup = round(config.warmup * steps)
    if config.schedule == "slanted_triangular":
        return slanted_triangular(peak, steps, warmup, config.ratio)
    rise = optax.linear_schedule(0.0, peak, warmup)
    # A first step with rate 0 would be wasted, so steps are counted from 1, and to one more.
    offset = 1 if warmup else 0
    rest = max(1, steps + offset - warmup)
    fall = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda step: _cosine(peak, rest, step),
        "inverse_sqrt": lambda step: peak * jax.lax.rsqrt(1.0 + jnp.asarray(step, jnp.float32) / max(1, warmup)),
    }[config.schedule]
    return lambda step: optax.join_schedules([rise, fall], [warmup])(step + offset)


def _cosine(peak: float, steps: int, step: Any) -> jax.Array:
    """peak * (1 + cos(pi step / steps)) / 2, computed as a square, as the sum would be 0 in float32 long before the end."""
    left = 1.0 - jnp.minimum(jnp.asarray(step, jnp.float32), steps) / steps
    return peak * jnp.sin(0.5 * jnp.pi * left) ** 2


def slanted_triangular(peak: float, steps: int, cut: int, ratio: float = 32.0) -> optax.Schedule:
    """ULMFiT's schedule (Howard and Ruder, 2018): peak * (1 + p * (ratio - 1)) / ratio.

    At step t = 1, 2 ..., p = t / cut up to the cut, then 1 - (t - cut) / (steps - cut). That is the paper's
    1 - (t - cut) / (cut * (1 / cut_frac - 1)) if cut is exactly cut_frac of the steps; if it is rounded, the paper's p can fall
    below 0.

    Args:
        peak: The highest rate.
        steps: Number of steps.
        cut: The step with the highest rate; 0: the rate only falls.
        ratio: The highest rate over the lowest.
    """

    def rate(step: Any) -> jax.Array:
        t = jnp.asarray(step, jnp.float32) + 1.0
        p = jnp.where(t < cut, t / max(1, cut), 1 - (t - cut) / max(1, steps - cut))
        return peak * (1 + p * (ratio - 1)) / ratio

    return rate


def build(config: Optimizer, decided: Any, peak: float, steps: int, since: Any = None) -> optax.GradientTransformation:
    """The optax chain: clipping, moments, then the decay, rate and schedule of each leaf.

    Args:
        config: The optimizer.
        decided: freezing.decide(params, rules): the rule of each parameter.
        peak: Highest rate.
        steps: Number of steps of the phase.
        since: For each parameter, the phase in which it started to train, as in scale_by_adam; None: not known.

    Returns:
        A transformation of the trainable leaves only. optax_rules.carry takes its state from one phase to the next.
    """
    names = {rule.schedule for rule in jax.tree.leaves(decided)}
    schedules = {
        name: schedule(dataclasses.replace(config, schedule=name or config.schedule), peak, steps) for name in names | {""}
    }
    adam = optax_rules.scale_by_adam(config.b1, config.b2, config.eps, since)
    return optax.chain(
        optax_rules.clip_by_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.trace(config.b1) if config.name == "sgd" else adam,
        optax_rules.scale_by_rules(decided, schedules, config.weight_decay if config.name == "adamw" else 0.0),
    )
