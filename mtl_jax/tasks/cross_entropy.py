"""The loss of one label out of several, of examples or of tokens, and how much each label counts in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.errors import UserError, unknown

MISSING = -1


def cross_entropy(
    outputs: jax.Array,
    labels: jax.Array,
    names: Sequence[str],
    weights: Mapping[str, float],
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy in nats: the sum of weight * loss over what is labelled, and the number of labelled, both f32[].

    Their quotient is a mean over what is labelled and not over the weights: how much an example counts does not depend on which
    labels stand beside it in the batch.

    Args:
        outputs: Logits f[..., O].
        labels: i32[...], places in the label set; -1 where there is no label.
        names: The label set, O labels.
        weights: {label: weight of an example with that label}; 1 for labels that it does not name.
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
        labels_N: Places in the label set; -1 where there is no label.
        names: The label set.
    """
    counts_O = np.bincount(labels_N[labels_N != MISSING], minlength=len(names))
    share = counts_O.sum() / max((counts_O > 0).sum(), 1)
    return {name: float(share / count) for name, count in zip(names, counts_O.tolist(), strict=True) if count}


def check_weights(task: str, balanced: bool, weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises UserError where the weights of labels make no sense.

    Args:
        task: The task's name.
        balanced: Whether they shall be computed.
        weights: The weights as given.
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
