"""Rules that look at every coordinate of the task gradients, through a transform: signs, extremes, curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, there_are
from mtl_jax.weighting.base import Rule, Signals, Transform, Weights, after_transform, by_rows, named, present, share, unstack
from mtl_jax.weighting.options import number


@named
def graddrop(leak: float = 0.0) -> Rule:
    """Every coordinate keeps the gradients of one sign only, which is drawn by their share (Chen et al. 2020, GradDrop).

    In a coordinate with P = (1 + sum_k g_k / sum_k |g_k|) / 2 and U uniform from 0 to 1: gradients above 0 stay where P > U,
    those below 0 where P < U; the others are multiplied by the leak. The gradient is the sum: the weights are 1. Departs from
    the paper, which does this to activations' gradients: here it is done to the shared parameters' gradients. Heads follow
    their plain losses, as in the paper.

    Args:
        leak: Share of a dropped gradient that is kept, 0 to 1; 1 is the plain sum.

    Raises:
        UserError: The leak is out of range.
    """
    number("weighting graddrop: leak", leak, least=0, most=1)

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        return unstack(jnp.ones(len(signals.losses)), signals), state

    def drop(state: Any, signals: Signals, gradients: Any) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(gradients)
        kept = []
        for n, leaf in enumerate(leaves):
            # Row by row: on a CPU, XLA takes eight times as long to reduce over the leading axis.
            rows = [leaf[k] for k in range(len(leaf))]
            total, size = sum(rows[1:], rows[0]), sum(map(jnp.abs, rows[1:]), jnp.abs(rows[0]))
            positive = 0.5 * (1 + total / jnp.where(size > 0, size, 1.0))
            # 16 random bits a coordinate are enough to draw a sign.
            bits = jax.random.bits(jax.random.fold_in(signals.key, n), positive.shape, jnp.uint16)
            drawn = (bits.astype(jnp.float32) + 0.5) / 65536
            stays = [jnp.where(row > 0, positive > drawn, positive < drawn) for row in rows]
            kept.append(jnp.stack([jnp.where(stay, row, leak * row) for stay, row in zip(stays, rows, strict=True)]))
        return jax.tree.unflatten(treedef, kept), state

    return Rule(
        init=lambda names: (),
        update=after_transform("graddrop", update),
        transform=Transform(lambda gradients: (), drop, by_number=True),
        weighs_heads=False,
    )


@named
def excess_risk(learning_rate: float = 1e-2) -> Rule:
    """Weights grow with the excess of a loss over its lowest value, by its curvature (He et al. 2024, ExcessMTL).

    E_k = sum over coordinates of g_k^2 / sqrt(S_k + 1e-7), where S_k is the sum of g_k^2 over all steps so far;
    w_k <- w_k exp(rate E_k / E_k(first)), scaled to sum to 1 over the present tasks. A task moves from the second step on in
    which it is present. Noisy tasks, whose losses stay high in any case, take no weight from the others. The state has a
    gradient of the trunk for each task, in float32, also in every checkpoint; `excess` is the rule without it. Heads are
    weighted, as in LibMTL.

    Args:
        learning_rate: The rate of the logarithms of the weights, above 0. The default of TorchJD is 1.

    Raises:
        UserError: The rate is not above 0.
    """
    number("weighting excess_risk: learning_rate", learning_rate, above=0)

    def init(names: Sequence[str]) -> Any:
        zeros_K = jnp.zeros(len(names))
        return {"log_weights": zeros_K, "first": zeros_K, "seen": jnp.zeros(len(names), bool)}

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        assert signals.transformed is not None  # after_transform has asked for it
        (risk_K,), present_K = signals.transformed, present(signals)
        growth_K = jnp.where(state["seen"] & present_K, jnp.minimum(risk_K / (state["first"] + 1e-7), 1e6), 0.0)
        logs_K = state["log_weights"] + learning_rate * growth_K
        logs_K = logs_K - logs_K.max()
        first_K = jnp.where(present_K & ~state["seen"], risk_K, state["first"])
        new = {"log_weights": logs_K, "first": first_K, "seen": state["seen"] | present_K}
        return unstack(jax.nn.softmax(logs_K, where=present_K), signals), new

    def sum_squares(squares: Any, signals: Signals, gradients: Any) -> tuple[Any, Any]:
        present_K = present(signals)
        added = jax.tree.map(lambda old, new: old + by_rows(present_K, new) * jnp.square(new), squares, gradients)
        return gradients, added

    def risk(squares: Any, gradients: Any) -> jax.Array:
        def of_leaf(square: jax.Array, gradient: jax.Array) -> jax.Array:
            return (jnp.square(gradient) * jax.lax.rsqrt(square + 1e-7)).reshape(len(gradient), -1).sum(axis=1)

        return jax.tree.reduce(jnp.add, jax.tree.map(of_leaf, squares, gradients))

    def zeros(gradients: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), gradients)

    transform = Transform(zeros, sum_squares, risk)
    return Rule(init=init, update=after_transform("excess_risk", update), transform=transform)


@named
def trimmed_mean(trim: int = 1) -> Rule:
    """The mean of every coordinate without its largest and smallest values (Yin et al. 2018), as in TorchJD.

    Of the gradients of n present tasks the `trim` largest and the `trim` smallest values of each coordinate are left out, or
    fewer where less than one would be left. The gradient is the mean of the others. The weights are 1: each present task's
    gradient is changed to an n-th of that mean. Heads follow their plain losses, as in TorchJD.

    Args:
        trim: Values that are left out at either end; not negative.

    Raises:
        UserError: It is out of range; at init, no value would be left.
    """
    trim = int(number("weighting trimmed_mean: trim", trim, least=0, whole=True))

    def init(names: Sequence[str]) -> Any:
        if len(names) <= 2 * trim:
            raise UserError(
                f"weighting trimmed_mean: trim is {trim}, which needs {2 * trim + 1} tasks, but {there_are(len(names), 'task')}"
            )
        return ()

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        return unstack(jnp.ones(len(signals.losses)), signals), state

    def change(state: Any, signals: Signals, gradients: Any) -> tuple[Any, Any]:
        present_K = present(signals)

        def changed(leaf: jax.Array) -> jax.Array:
            return by_rows(share(present_K), leaf) * _trimmed(leaf, present_K, trim)

        return jax.tree.map(changed, gradients), state

    transform = Transform(lambda gradients: (), change, by_number=True)
    return Rule(init=init, update=after_transform("trimmed_mean", update), transform=transform, weighs_heads=False)


def _trimmed(leaf_Kx: jax.Array, present_K: jax.Array, trim: int) -> jax.Array:
    """The mean over the present rows of every coordinate without its extremes, f32[...].

    Passes of a sorting network over the rows: on a CPU, XLA takes a hundred times as long to sort over the leading axis.
    """
    K, tasks = len(leaf_Kx), present_K.sum()
    rows = [jnp.where(present_K[k], leaf_Kx[k], jnp.inf) for k in range(K)]

    def exchange(low: int, high: int) -> None:
        rows[low], rows[high] = jnp.minimum(rows[low], rows[high]), jnp.maximum(rows[low], rows[high])

    for first in range(trim):  # the smallest to the front
        for k in range(K - 1, first, -1):
            exchange(k - 1, k)
    rows = [jnp.where(row == jnp.inf, -jnp.inf, row) for row in rows]
    for last in range(K - 1, K - 1 - trim, -1):  # the largest to the end
        for k in range(trim, last):
            exchange(k, k + 1)
    most, kept = jnp.minimum(trim, (tasks - 1) // 2), []
    for k, row in enumerate(rows):
        # How many present rows are smaller and larger; those between the ends have enough of both.
        smaller, larger = (k, tasks - 1 - k) if k < trim else (tasks - K + k, K - 1 - k) if k >= K - trim else (most, most)
        kept.append(jnp.where((smaller >= most) & (larger >= most) & jnp.isfinite(row), row, 0.0))
    return sum(kept[1:], kept[0]) / jnp.maximum(tasks - 2 * most, 1)
