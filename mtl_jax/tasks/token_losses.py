"""Losses of tokens over a large vocabulary, without the logits of all of them at once.

Shapes in names: R rows, U tokens a row, H width, V vocabulary, c tokens of a row at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Logits of so many numbers are there at once: 128 MiB. Of a large vocabulary all of a batch would take gigabytes.
AT_ONCE = 2**25


def token_losses(
    logits: Callable[[jax.Array], jax.Array],
    hidden_RxUxH: jax.Array,
    target_RxU: jax.Array,
    vocabulary: int,
    smoothing: float = 0.0,
) -> jax.Array:
    """f32[R, U, 3]: of each token its loss, its negative log-likelihood, and 1 if it is the likeliest, else 0; in nats.

    Where there are too many logits, c of the U places at a time are gone through, and made again for the gradient.

    Args:
        logits: f[R, c, H] -> f32[R, c, V].
        hidden_RxUxH: What logits are made of.
        target_RxU: The tokens.
        vocabulary: V.
        smoothing: Share of the target probability spread evenly over the vocabulary (Szegedy et al., 2016).
    """
    R, U, H = hidden_RxUxH.shape
    parts = -(-U // max(1, min(U, AT_ONCE // (R * vocabulary))))
    chunk = -(-U // parts)

    def of_chunk(hidden_RxcxH: jax.Array, target_Rxc: jax.Array) -> jax.Array:
        logits_RxcxV = logits(hidden_RxcxH)
        norm_Rxc = jax.nn.logsumexp(logits_RxcxV, axis=-1)
        own_Rxc = jnp.take_along_axis(logits_RxcxV, target_Rxc[..., None], axis=-1)[..., 0]
        likelihood_Rxc = norm_Rxc - own_Rxc
        loss_Rxc = likelihood_Rxc
        if smoothing:
            even_Rxc = norm_Rxc - logits_RxcxV.mean(axis=-1)
            loss_Rxc = (1 - smoothing) * likelihood_Rxc + smoothing * even_Rxc
        right_Rxc = (own_Rxc >= jax.lax.stop_gradient(logits_RxcxV).max(axis=-1)).astype(jnp.float32)
        return jnp.stack([loss_Rxc, likelihood_Rxc, right_Rxc], axis=-1)

    if parts == 1:
        return of_chunk(hidden_RxUxH, target_RxU)
    spare = parts * chunk - U
    hidden_RxUxH = jnp.pad(hidden_RxUxH, ((0, 0), (0, spare), (0, 0)))
    target_RxU = jnp.pad(target_RxU, ((0, 0), (0, spare)))
    # Cut along U: the rows stay where they are, each on its device.
    hidden_PxRxcxH = jnp.moveaxis(hidden_RxUxH.reshape(R, parts, chunk, H), 1, 0)
    target_PxRxc = jnp.moveaxis(target_RxU.reshape(R, parts, chunk), 1, 0)
    outputs_PxRxcx3 = jax.lax.map(lambda part: jax.checkpoint(of_chunk)(*part), (hidden_PxRxcxH, target_PxRxc))
    return jnp.moveaxis(outputs_PxRxcx3, 0, 1).reshape(R, parts * chunk, 3)[:, :U]
