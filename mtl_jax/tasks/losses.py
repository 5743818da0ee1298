"""Cross-entropy over labels and over a vocabulary, and the weights of labels in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.core.errors import UserError, unknown

MISSING = -1
# So many logits are in memory at once: 128 MiB. With a large vocabulary those of a whole batch would take gigabytes.
LOGITS_AT_ONCE = 2**25


def cross_entropy(
    outputs: jax.Array,
    labels: jax.Array,
    names: Sequence[str],
    weights: Mapping[str, float],
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy in nats: the sum of weight * loss over labelled examples, and their number, both f32[].

    Their quotient is a mean over examples and not over weights, so that the weight of an example does not depend on the other
    labels in the batch.

    Args:
        outputs: Logits f[..., O].
        labels: i32[...], indices into the label set; -1 where there is no label.
        names: The label set, O labels.
        weights: {label: weight of an example with that label}; 1 for labels that are not in it.
        label_smoothing: Share of the target probability spread evenly over the labels.
    """
    known = labels != MISSING
    targets = jax.nn.one_hot(labels, len(names))  # a missing label is a row of zeros
    if label_smoothing:
        targets = optax.smooth_labels(targets, label_smoothing)
    loss = optax.softmax_cross_entropy(outputs.astype(jnp.float32), targets)
    if weights:
        loss *= jnp.array([weights.get(name, 1.0) for name in names], jnp.float32)[labels]
    return jnp.where(known, loss, 0.0).sum(), known.sum().astype(jnp.float32)


def balanced_weights(labels_N: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """n / (K n_c) for each label c that occurs: n labels in all, n_c of them c, K labels that occur.

    Every label then has the same sum of weights, and their mean over the labels_N is 1.

    Args:
        labels_N: Indices into the label set; -1 where there is no label.
        names: The label set.
    """
    counts_O = np.bincount(labels_N[labels_N != MISSING], minlength=len(names))
    share = counts_O.sum() / max((counts_O > 0).sum(), 1)
    return {name: float(share / count) for name, count in zip(names, counts_O.tolist(), strict=True) if count}


def check_weights(task: str, balanced: bool, weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises UserError where the weights of labels make no sense.

    Args:
        task: The task's name.
        balanced: Whether they will be computed.
        weights: The weights in the task's declaration.
        names: The label set; empty where it is not known yet.
    """
    if balanced and weights:
        raise UserError(f"task {task!r}: balanced computes class_weights; give one or the other")
    known = set(names)
    for name, weight in weights.items():
        if known and name not in known:
            raise unknown(f"label in class_weights of task {task!r}:", name, names)
        if not 0 <= weight < np.inf:
            raise UserError(f"task {task!r}: class_weights of {name!r} is {weight}; it must be a number of at least 0")


def token_losses(
    logits: Callable[[jax.Array], jax.Array],
    hidden_RxUxH: jax.Array,
    target_RxU: jax.Array,
    vocabulary: int,
    smoothing: float = 0.0,
) -> jax.Array:
    """f32[R, U, 3]: for each token its loss and negative log-likelihood in nats, and 1 if it is the likeliest, else 0.

    If there are too many logits, they are computed for c of the U tokens at a time, and again for the gradient.

    Args:
        logits: f[R, c, H] -> f32[R, c, V].
        hidden_RxUxH: The vectors that logits are computed from.
        target_RxU: The tokens.
        vocabulary: V.
        smoothing: Share of the target probability spread evenly over the vocabulary (Szegedy et al., 2016).
    """
    R, U, H = hidden_RxUxH.shape
    chunks = -(-U // max(1, min(U, LOGITS_AT_ONCE // (R * vocabulary))))
    chunk = -(-U // chunks)

    def chunk_losses(hidden_RxcxH: jax.Array, target_Rxc: jax.Array) -> jax.Array:
        logits_RxcxV = logits(hidden_RxcxH)
        norm_Rxc = jax.nn.logsumexp(logits_RxcxV, axis=-1)
        target_logit_Rxc = jnp.take_along_axis(logits_RxcxV, target_Rxc[..., None], axis=-1)[..., 0]
        likelihood_Rxc = norm_Rxc - target_logit_Rxc
        loss_Rxc = likelihood_Rxc
        if smoothing:
            even_Rxc = norm_Rxc - logits_RxcxV.mean(axis=-1)
            loss_Rxc = (1 - smoothing) * likelihood_Rxc + smoothing * even_Rxc
        right_Rxc = (target_logit_Rxc >= jax.lax.stop_gradient(logits_RxcxV).max(axis=-1)).astype(jnp.float32)
        return jnp.stack([loss_Rxc, likelihood_Rxc, right_Rxc], axis=-1)

    if chunks == 1:
        return chunk_losses(hidden_RxUxH, target_RxU)
    spare = chunks * chunk - U
    hidden_RxUxH = jnp.pad(hidden_RxUxH, ((0, 0), (0, spare), (0, 0)))
    target_RxU = jnp.pad(target_RxU, ((0, 0), (0, spare)))
    # Divided along U, so that each row stays on its device.
    hidden_PxRxcxH = jnp.moveaxis(hidden_RxUxH.reshape(R, chunks, chunk, H), 1, 0)
    target_PxRxc = jnp.moveaxis(target_RxU.reshape(R, chunks, chunk), 1, 0)
    outputs_PxRxcx3 = jax.lax.map(lambda part: jax.checkpoint(chunk_losses)(*part), (hidden_PxRxcxH, target_PxRxc))
    return jnp.moveaxis(outputs_PxRxcx3, 0, 1).reshape(R, chunks * chunk, 3)[:, :U]
