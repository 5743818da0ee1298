"""Distillation: a model learns what another one says, or how it sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_jax.transfer.divergence import NUMBER, divergence


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
