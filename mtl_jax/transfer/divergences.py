"""Divergences of two models' outputs, or of two passes of one model: R-Drop and distillation are built of them.

Shapes in names: O outputs, H width of a vector.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
    """The mean KL(P || Q) in nats of O independent yes-or-no decisions: logits f[..., O] to f32[...]; as softmax_kl."""
    p, q = p.astype(jnp.float32) / temperature, q.astype(jnp.float32) / temperature
    yes = jax.nn.sigmoid(p) * (jax.nn.log_sigmoid(p) - jax.nn.log_sigmoid(q))
    no = jax.nn.sigmoid(-p) * (jax.nn.log_sigmoid(-p) - jax.nn.log_sigmoid(-q))
    return jnp.mean(yes + no, axis=-1)


def squared_error(p: jax.Array, q: jax.Array) -> jax.Array:
    """The mean squared difference over the last axis: f[..., O] to f32[...]."""
    return jnp.mean(jnp.square(p.astype(jnp.float32) - q.astype(jnp.float32)), axis=-1)


def divergence(kind: str, p: jax.Array, q: jax.Array, temperature: float = 1.0) -> jax.Array:
    """The divergence of Q from P, for outputs f[..., O]: f32[...].

    Args:
        kind: softmax: KL(P || Q) of distributions. sigmoid: the same of O decisions. number: squared difference.
        p: Outputs of P.
        q: Outputs of Q.
        temperature: As in softmax_kl.
    """
    if kind == NUMBER:
        return squared_error(p, q)
    return {SOFTMAX: softmax_kl, SIGMOID: sigmoid_kl}[kind](p, q, temperature)


def r_drop(first: jax.Array, second: jax.Array, kind: str = "softmax") -> jax.Array:
    """1/2 (KL(P1 || P2) + KL(P2 || P1)) of two passes' outputs f[..., O], f32[...].

    Liang et al., 2021, https://arxiv.org/abs/2106.14448; for numbers the squared difference, as in the paper for STS-B.

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

    T^2 keeps the size of the gradient at any temperature. For numbers it is the squared difference.

    Args:
        student: The student's outputs.
        teacher: The teacher's outputs; they get no gradient.
        temperature: T.
        kind: As in divergence().
    """
    scale = 1.0 if kind == NUMBER else temperature**2
    return scale * divergence(kind, jax.lax.stop_gradient(teacher), student, temperature)


def distill_hidden(student: jax.Array, teacher: jax.Array, distance: str = "mse") -> jax.Array:
    """The distance of vectors f[..., H] from the teacher's, f32[...].

    Args:
        student: The student's vectors, projected to the teacher's width if the widths differ.
        teacher: The teacher's vectors; they get no gradient.
        distance: mse: mean squared difference over H (Jiao et al., 2020, https://arxiv.org/abs/1909.10351).
            cosine: 1 - cosine of the two (Sanh et al., 2019, https://arxiv.org/abs/1910.01108).
    """
    student, teacher = student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)
    if distance == "mse":
        return jnp.mean(jnp.square(student - teacher), axis=-1)
    # Squared norms with a floor: the gradient of a norm at 0 is NaN.
    norms = jnp.sum(jnp.square(student), axis=-1) * jnp.sum(jnp.square(teacher), axis=-1)
    return 1.0 - jnp.sum(student * teacher, axis=-1) * jax.lax.rsqrt(jnp.maximum(norms, 1e-24))
