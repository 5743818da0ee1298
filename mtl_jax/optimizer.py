"""The optimizer of a phase, from its configuration to optax."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.errors import UserError, unknown

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How the trainable parameters follow the gradient.

    Attributes:
        name: adamw, adam or sgd.
        learning_rate: Peak rate, for phases that name none of their own.
        schedule: After the warm-up: constant; linear or cosine decay to 0 at the end of the phase; or inverse_sqrt, with the
            square root of the warm-up's steps over the steps so far (Vaswani et al., 2017), which does not depend on the end.
        warmup: Share of a phase's steps over which the rate rises from 0.
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


def schedule(config: Optimizer, peak: float, steps: int) -> optax.Schedule:
    """Learning rate by step of the phase."""
    warmup = round(config.warmup * steps)
    rise = optax.linear_schedule(0.0, peak, warmup)
    rest = max(1, steps - warmup)
    fall = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "inverse_sqrt": lambda step: peak * jax.lax.rsqrt(1.0 + jnp.asarray(step, jnp.float32) / max(1, warmup)),
    }[config.schedule]
    # The first step of a warm-up from exactly 0 would be wasted: count from 1.
    return lambda step: optax.join_schedules([rise, fall], [warmup])(step + (1 if warmup else 0))


def build(config: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    """The optax chain: clip, then the update. It is given the trainable leaves only."""
    if config.name == "adamw":

        def decayed(params: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

        update = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed)
    elif config.name == "adam":
        update = optax.adam(rate, b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        update = optax.sgd(rate, momentum=config.b1)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(), update)
