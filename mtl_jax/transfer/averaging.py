"""Averages of the parameters over a run, which often score better than the last parameters: pure functions.

A run evaluates the average and keeps it as its result; training itself continues with the parameters, unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError

KINDS = ("none", "ema", "last")
FORM = "none, ema[:decay=D] or last:n=N"
DECAY = 0.999


class Average(NamedTuple):
    """The state of an average; part of the train state.

    Attributes:
        mean: The average, a tree like the trainable leaves.
        kept: For last: leaves [n - 1, ...], the values at the evaluations before, the latest first; else None.
        times: i32[], number of steps, or of evaluations, so far.
    """

    mean: Any
    kept: Any
    times: jax.Array


class Averaging(NamedTuple):
    """How an average is made.

    Attributes:
        init: Trainable leaves -> Average, or None if nothing is averaged.
        follow: (Average, leaves after a step) -> Average; part of the step.
        collect: (Average, leaves) -> Average, applied before an evaluation; None: nothing is done.
    """

    init: Callable[[Any], Average | None]
    follow: Callable[[Any, Any], Any]
    collect: Callable[[Average, Any], Average] | None = None


def as_it_is(average: Any, leaves: Any) -> Any:
    """Returns the average unchanged: the `follow` of an average that changes at evaluations only."""
    return average


def none() -> Averaging:
    """No average: the parameters themselves are evaluated."""
    return Averaging(lambda leaves: None, as_it_is)


def ema(decay: float = DECAY) -> Averaging:
    """The debiased exponential moving average over the steps so far; step t of n has the weight decay^(n - t).

    With m_n = decay m_(n-1) + (1 - decay) x_n and m_0 = 0, the average m_n / (1 - decay^n) (the debiasing of Adam, Kingma and
    Ba, 2015) moves by (1 - decay) / (1 - decay^n) of the way to x_n. Computed like this, a leaf that does not change keeps its
    bits.

    Args:
        decay: Above 0 and below 1.
    """
    log_decay = math.log(decay)

    def follow(average: Average, leaves: Any) -> Average:
        times = average.times + 1
        share = (1 - decay) / -jnp.expm1(times * log_decay)  # 1 - decay^n would lose digits for a decay near 1
        mean = jax.tree.map(lambda mean, leaf: mean + share.astype(mean.dtype) * (leaf - mean), average.mean, leaves)
        return Average(mean, None, times)

    return Averaging(lambda leaves: Average(leaves, None, jnp.zeros((), jnp.int32)), follow)


def last(n: int) -> Averaging:
    """The plain mean over the last n evaluations, or over all if there were fewer.

    Args:
        n: At least 2. The state has n copies of the leaves.
    """

    def init(leaves: Any) -> Average:
        kept = jax.tree.map(lambda leaf: jnp.zeros((n - 1, *leaf.shape), leaf.dtype), leaves)
        return Average(leaves, kept, jnp.zeros((), jnp.int32))

    def collect(average: Average, leaves: Any) -> Average:
        filled_K = jnp.arange(n - 1) < average.times

        def mean(leaf: jax.Array, kept: jax.Array) -> jax.Array:
            filled = filled_K.reshape(-1, *[1] * leaf.ndim)
            return leaf + jnp.where(filled, kept - leaf, 0).sum(axis=0) / (1 + filled_K.sum()).astype(leaf.dtype)

        kept = jax.tree.map(lambda leaf, kept: jnp.concatenate([leaf[None], kept[:-1]]), leaves, average.kept)
        return Average(jax.tree.map(mean, leaves, average.kept), kept, average.times + 1)

    return Averaging(init, as_it_is, collect)


def make(text: str) -> Averaging:
    """The averaging that a text names: "none", "ema", "ema:decay=0.99", "last:n=5".

    Raises:
        UserError: The name is unknown, or its option is missing or refused.
    """
    name, _, options = name_options.parse(text, "averaging", KINDS, form=FORM)
    if name == "none" and not options:
        return none()
    if name == "ema" and set(options) <= {"decay"}:
        decay = name_options.number(options.get("decay", DECAY))
        if not 0 < decay < 1:
            raise UserError(f"averaging is {text!r}; decay must be a number above 0 and below 1")
        return ema(decay)
    if name == "last" and set(options) == {"n"}:
        n = name_options.number(options["n"])
        if not (n >= 2 and n == int(min(n, 1e9))):
            raise UserError(f"averaging is {text!r}; n must be a whole number of at least 2")
        return last(int(n))
    raise UserError(f"averaging is {text!r}; write {FORM}")
