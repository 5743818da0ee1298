"""How far the outputs of one model are from those of another, or of another pass: by what the outputs are.

Shapes in names: O outputs.
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
