"""Mixout: in every step some numbers of the parameters are those of the start."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.configuration import Configuration
from mtl_jax.models.dropout import bernoulli


@dataclasses.dataclass(frozen=True)
class Mixout(Configuration):
    """Mixout (Lee et al., 2020) in training; measured are the parameters as they are.

    Attributes:
        p: The share of numbers that are those of the start, from 0 (none) to below 1; the paper takes 0.7 to 0.9.
        parameters: A regular expression: the parameters it is for, where they train. The authors' code takes weight matrices.
    """

    p: float = 0.0
    parameters: str = "trunk/.*/kernel"


def mixout(key: jax.Array, params: Any, start: Any, p: float) -> Any:
    """The parameters, each number with probability p that of the start, corrected so that its mean is the parameter.

    start + M (params - start) / (1 - p), M of 1 with probability 1 - p, else 0: Lee et al., 2020,
    https://arxiv.org/abs/1909.11299: ((1 - M) start + M params - p start) / (1 - p), with its terms gathered.
    With p = 0 these are the parameters themselves.

    Args:
        key: A PRNG key.
        params: A tree of parameters.
        start: The same tree at the start.
        p: From 0 to below 1.
    """
    if p == 0:
        return params
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def mix(key: jax.Array, leaf: jax.Array, then: jax.Array) -> jax.Array:
        own = bernoulli(key, 1 - p, leaf.shape)
        return jnp.where(own, then + (leaf - then) / (1 - p), then)

    mixed = [mix(key, leaf, then) for key, leaf, then in zip(keys, leaves, jax.tree.leaves(start), strict=True)]
    return jax.tree.unflatten(treedef, mixed)
