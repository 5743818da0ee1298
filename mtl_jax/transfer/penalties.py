"""Keeping parameters near their values before: the penalties L2-SP and EWC, with its Fisher information, and Mixout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.configuration import Configuration
from mtl_jax.models.dropout import bernoulli


@dataclasses.dataclass(frozen=True)
class Mixout(Configuration):
    """Mixout (Lee et al., 2020) during training; evaluation uses the parameters themselves.

    Attributes:
        p: The share of numbers that are replaced by their initial values, from 0 (none) to below 1; the paper uses 0.7 to 0.9.
        parameters: A regular expression: the trainable parameters that are mixed. The authors' code takes weight matrices.

    Examples:
        >>> experiment = dataclasses.replace(EXPERIMENT, mixout=mtl_jax.Mixout(p=0.7))
    """

    p: float = 0.0
    parameters: str = "trunk/.*/kernel"


def l2sp(params: Any, start: Any, new: Any = (), *, alpha: float = 0.1, beta: float = 0.01) -> jax.Array:
    """alpha / 2 ||params - start||^2 + beta / 2 ||new||^2, f32[] (Li et al., 2018, https://arxiv.org/abs/1802.01483).

    Args:
        params: A tree of pretrained parameters.
        start: Their initial values, a tree like params.
        new: A tree of parameters without pretrained values, such as those of heads; may be empty.
        alpha: Strength of the pull of params towards their initial values.
        beta: Strength of the pull of new parameters towards 0.
    """
    change = jax.tree.map(lambda leaf, initial: leaf - initial, params, start)
    return alpha / 2 * squared_norm(change) + beta / 2 * squared_norm(new)


def squared_norm(tree: Any) -> jax.Array:
    """The sum of the squares of all numbers of a tree, f32[]."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return sum(squares, jnp.zeros(()))


def ewc(params: Any, anchor: Any, fisher: Any) -> jax.Array:
    """1/2 sum_i F_i (params_i - anchor_i)^2, f32[]: equation 3 of Kirkpatrick et al., 2017, https://arxiv.org/abs/1612.00796.

    The paper's lambda is the weight of this loss.

    Args:
        params: A tree of parameters.
        anchor: Their values after the source was learned, a tree like params.
        fisher: The diagonal of the Fisher information at the anchor, a tree like params.
    """
    terms = jax.tree.map(
        lambda leaf, before, f: jnp.sum(f * jnp.square((leaf - before).astype(jnp.float32))), params, anchor, fisher
    )
    return jax.tree.reduce(jnp.add, terms, jnp.zeros(())) / 2


def fisher(log_likelihood: Callable[[Any, Any], jax.Array], params: Any, examples: Any) -> Any:
    """The diagonal of the Fisher information, a tree like the parameters: the mean over examples of squared gradients.

    Args:
        log_likelihood: (params, example) -> f32[], the log-likelihood of an example's label. Labels that are drawn from the
            model itself give the Fisher information, labels of the data the empirical Fisher information.
        params: A tree of parameters.
        examples: A tree of arrays [N, ...], N examples.
    """
    count = len(jax.tree.leaves(examples)[0])
    return jax.tree.map(lambda leaf: leaf / count, squared_gradients(log_likelihood, params, examples))


def squared_gradients(log_likelihood: Callable[[Any, Any], jax.Array], params: Any, examples: Any) -> Any:
    """The sum over examples of their squared gradients, computed one by one so that memory holds one gradient at a time.

    Args:
        log_likelihood: As in fisher().
        params: As in fisher().
        examples: As in fisher().
    """

    def add(total: Any, example: Any) -> tuple[Any, None]:
        gradient = jax.grad(log_likelihood)(params, example)
        return jax.tree.map(lambda sum_, leaf: sum_ + jnp.square(leaf.astype(jnp.float32)), total, gradient), None

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    return jax.lax.scan(add, zero, examples)[0]


def mixout(key: jax.Array, params: Any, start: Any, p: float) -> Any:
    """The parameters with each number replaced by its initial value with probability p, corrected to keep the mean.

    start + M (params - start) / (1 - p), where M is 1 with probability 1 - p, else 0. That is the paper's
    ((1 - M) start + M params - p start) / (1 - p), rearranged (Lee et al., 2020, https://arxiv.org/abs/1909.11299).
    With p = 0 the result is the parameters themselves.

    Args:
        key: A PRNG key.
        params: A tree of parameters.
        start: Their initial values, a tree like params.
        p: From 0 to below 1.
    """
    if p == 0:
        return params
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def mix(key: jax.Array, leaf: jax.Array, initial: jax.Array) -> jax.Array:
        kept = bernoulli(key, 1 - p, leaf.shape)
        return jnp.where(kept, initial + (leaf - initial) / (1 - p), initial)

    mixed = [mix(key, leaf, initial) for key, leaf, initial in zip(keys, leaves, jax.tree.leaves(start), strict=True)]
    return jax.tree.unflatten(treedef, mixed)
