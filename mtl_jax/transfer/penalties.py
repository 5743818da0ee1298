"""How far the outputs of one model are from those of another, or of another pass: by what the outputs are.

Shapes in names: O outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.configuration import Configuration
from mtl_jax.models.dropout import bernoulli

SOFTMAX, SIGMOID, NUMBER = "softmax", "sigmoid", "number"


def softmax_kl(p: jax.Array, q: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(P || Q) in nats of the softmax distributions over the last axis: logits f[..., O] to f32[...].

    Args:
        p: Logits of P.
        q: Logits of Q.
        temperature: Both are divided by it.
    """
    log_p = jax.nn.log_softmax(p.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(q.astype(jnp.float32) / temperature)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def sigmoid_kl(p: jax.Array, q: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(P || Q) in nats of O independent decisions each, the mean over them: logits f[..., O] to f32[...]; as softmax_kl."""
    p, q = p.astype(jnp.float32) / temperature, q.astype(jnp.float32) / temperature
    yes = jax.nn.sigmoid(p) * (jax.nn.log_sigmoid(p) - jax.nn.log_sigmoid(q))
    no = jax.nn.sigmoid(-p) * (jax.nn.log_sigmoid(-p) - jax.nn.log_sigmoid(-q))
    return jnp.mean(yes + no, axis=-1)


def squared_error(p: jax.Array, q: jax.Array) -> jax.Array:
    """The mean squared difference over the last axis: f[..., O] to f32[...]."""
    return jnp.mean(jnp.square(p.astype(jnp.float32) - q.astype(jnp.float32)), axis=-1)


def divergence(kind: str, p: jax.Array, q: jax.Array, temperature: float = 1.0) -> jax.Array:
    """How far Q is from P, for outputs f[..., O]: f32[...].

    Args:
        kind: softmax: KL(P || Q) of distributions. sigmoid: that of O decisions. number: squared difference.
        p: Outputs of P.
        q: Outputs of Q.
        temperature: As in softmax_kl.
    """
    if kind == NUMBER:
        return squared_error(p, q)
    return {SOFTMAX: softmax_kl, SIGMOID: sigmoid_kl}[kind](p, q, temperature)


def ewc(params: Any, anchor: Any, fisher: Any) -> jax.Array:
    """1/2 sum_i F_i (params_i - anchor_i)^2, f32[] (equation 3 there; its lambda is the weight of this loss).

    Args:
        params: A tree of parameters.
        anchor: The same tree where the source had been learned.
        fisher: The same tree: the diagonal of the Fisher information there.
    """
    terms = jax.tree.map(
        lambda leaf, then, f: jnp.sum(f * jnp.square((leaf - then).astype(jnp.float32))), params, anchor, fisher
    )
    return jax.tree.reduce(jnp.add, terms, jnp.zeros(())) / 2


def fisher(log_likelihood: Callable[[Any, Any], jax.Array], params: Any, examples: Any) -> Any:
    """The diagonal of the Fisher information, a tree like the parameters: the mean over examples of squared gradients.

    Args:
        log_likelihood: (params, example) -> f32[], the log-likelihood of an example's label. With labels that are drawn from
            the model itself this is the Fisher information, with those of the data the empirical one.
        params: A tree of parameters.
        examples: A tree of arrays [N, ...], N examples.
    """
    count = len(jax.tree.leaves(examples)[0])
    return jax.tree.map(lambda leaf: leaf / count, squared_gradients(log_likelihood, params, examples))


def squared_gradients(log_likelihood: Callable[[Any, Any], jax.Array], params: Any, examples: Any) -> Any:
    """The sum over examples of the squared gradient of each: one example after another, so that one gradient is held at a time.

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


def l2sp(params: Any, start: Any, new: Any = (), *, alpha: float = 0.1, beta: float = 0.01) -> jax.Array:
    """alpha / 2 ||params - start||^2 + beta / 2 ||new||^2, f32[] (Li et al., 2018, https://arxiv.org/abs/1802.01483).

    Args:
        params: A tree of the parameters that were there before.
        start: The same tree at the start.
        new: A tree of the parameters that are new, such as those of heads; may be empty.
        alpha: How strongly the former are drawn to their start.
        beta: How strongly the latter are drawn to 0.
    """
    moved = jax.tree.map(lambda leaf, then: leaf - then, params, start)
    return alpha / 2 * squared_norm(moved) + beta / 2 * squared_norm(new)


def squared_norm(tree: Any) -> jax.Array:
    """f32[]: the sum of the squares of all numbers of a tree."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return sum(squares, jnp.zeros(()))


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


def r_drop(first: jax.Array, second: jax.Array, kind: str = "softmax") -> jax.Array:
    """1/2 (KL(P1 || P2) + KL(P2 || P1)) of two passes' outputs f[..., O], f32[...].

    Liang et al., 2021, https://arxiv.org/abs/2106.14448; for numbers the squared difference, as there for STS-B.

    Args:
        first: Outputs of the first pass.
        second: Outputs of the second.
        kind: As in divergence().
    """
    if kind == NUMBER:
        return divergence(kind, first, second)
    return (divergence(kind, first, second) + divergence(kind, second, first)) / 2


def distill(student: jax.Array, teacher: jax.Array, temperature: float = 1.0, kind: str = "softmax") -> jax.Array:
    """T^2 KL(teacher || student) of outputs f[..., O], f32[...] (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

    T^2 keeps the size of the gradient, whatever the temperature. For numbers it is their squared difference.

    Args:
        student: The student's outputs.
        teacher: The teacher's; no gradient goes there.
        temperature: T.
        kind: As in divergence().
    """
    scale = 1.0 if kind == NUMBER else temperature**2
    return scale * divergence(kind, jax.lax.stop_gradient(teacher), student, temperature)


def distill_hidden(student: jax.Array, teacher: jax.Array, distance: str = "mse") -> jax.Array:
    """How far vectors f[..., H] are from the teacher's, f32[...].

    Args:
        student: The student's vectors, projected to the teacher's width where that is another one.
        teacher: The teacher's; no gradient goes there.
        distance: mse: mean squared difference over H (Jiao et al., 2020, https://arxiv.org/abs/1909.10351).
            cosine: 1 - cosine of the two (Sanh et al., 2019, https://arxiv.org/abs/1910.01108).
    """
    student, teacher = student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)
    if distance == "mse":
        return jnp.mean(jnp.square(student - teacher), axis=-1)
    # Squared norms with a floor: the gradient of a norm at 0 is NaN.
    norms = jnp.sum(jnp.square(student), axis=-1) * jnp.sum(jnp.square(teacher), axis=-1)
    return 1.0 - jnp.sum(student * teacher, axis=-1) * jax.lax.rsqrt(jnp.maximum(norms, 1e-24))
