"""Signals of a training step: how much a step on one task's gradient lowers the loss of another.

All are functions of jax arrays that may be jitted. Row i, column j of a matrix is the effect of task i on task j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.affinity.estimator_inputs import matrix
from mtl_jax.core.errors import UserError

TINY = 1e-30  # below every squared norm that is not 0 in float32


def gradient_cosines(gram: jax.Array) -> jax.Array:
    """The cosines of the task gradients, f32[K, K]; 0 for a gradient that is 0.

    Args:
        gram: f32[K, K], their inner products, from weighting.gram or the Signals of a rule.

    References:
        Yu et al., 2020, Gradient Surgery for Multi-Task Learning, https://arxiv.org/abs/2001.06782

    Examples:
        >>> mtl_jax.affinity.gradient_cosines([[4.0, 0.0], [0.0, 9.0]]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    gram = jnp.asarray(gram)
    norms_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
    products_KxK = norms_K[:, None] * norms_K
    return jnp.where(products_KxK > TINY, jnp.clip(gram / jnp.maximum(products_KxK, TINY), -1.0, 1.0), 0.0)


def tag_lookahead(losses: jax.Array, losses_after: jax.Array) -> jax.Array:
    """TAG's affinity, exact, f32[K, K]: 1 - L_j(theta - eta g_i) / L_j(theta).

    Args:
        losses: f32[K], the losses at theta; all above 0.
        losses_after: f32[K, K], row i after a step on task i's gradient, as lookahead_losses returns them.

    References:
        Fifty et al., 2021, Efficiently Identifying Task Groupings for Multi-Task Learning, https://arxiv.org/abs/2109.04617
    """
    return 1.0 - jnp.asarray(losses_after) / jnp.asarray(losses)


def tag_first_order(gram: jax.Array, losses: jax.Array, learning_rate: float | jax.Array) -> jax.Array:
    """TAG's affinity to first order in the learning rate, f32[K, K]: eta <g_i, g_j> / L_j.

    Under a rule that needs the Gram matrix it costs nothing more.

    Args:
        gram: f32[K, K], inner products of the task gradients.
        losses: f32[K], in the same order; all above 0.
        learning_rate: eta, the rate of the step.

    References:
        As tag_lookahead; the expansion is ours.
    """
    return learning_rate * jnp.asarray(gram) / jnp.asarray(losses)


def lookahead_losses(
    losses_of: Callable[[Any], jax.Array], params: Any, gradients: Any, learning_rate: float | jax.Array
) -> jax.Array:
    """The losses after a step on each task's gradient, f32[K, K], all K steps at once.

    Args:
        losses_of: From parameters to the losses f32[K], of the same rows every time.
        params: A tree of the shared parameters.
        gradients: A tree like params with a leading axis over the K tasks.
        learning_rate: eta, the rate of the steps.
    """

    def after(gradient: Any) -> jax.Array:
        return losses_of(jax.tree.map(lambda leaf, slope: leaf - learning_rate * slope, params, gradient))

    return jax.vmap(after)(gradients)


def step_signals(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], np.ndarray]:
    """{(source, target): f64[N, 4]} for the steps of a run in which both have examples, from its metrics.jsonl.

    The columns are the cosine of their gradients, the norms of the source's and the target's gradient, and the target's loss.
    A run has them if its weighting rule compares task gradients; otherwise the result is empty.

    Args:
        records: The objects of metrics.jsonl.
    """
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for record in records:
        cosines = record.get("cosines", ())
        tasks = [name.removeprefix("gradient_norm/") for name in record if name.startswith("gradient_norm/")]
        for row, source in enumerate(tasks if len(cosines) else ()):
            for column, target in enumerate(tasks):
                if source != target:
                    norms = (record[f"gradient_norm/{name}"] for name in (source, target))
                    values = (cosines[row][column], *norms, record[f"loss/{target}"])
                    rows.setdefault((source, target), []).append(values)
    arrays = {pair: np.array(values, np.float64) for pair, values in rows.items()}
    kept = {pair: array[np.isfinite(array).all(axis=1) & (array[:, 3] > 0)] for pair, array in arrays.items()}
    return {pair: array for pair, array in kept.items() if len(array)}


def gradient_cosine(signals: Any) -> float:
    """The mean cosine of the gradients of source and target over the steps of a run of both, from -1 to 1.

    Args:
        signals: f[N, 4], as step_signals() has them.

    Raises:
        UserError: The array has another form.

    References:
        Yu et al., 2020, https://arxiv.org/abs/2001.06782
    """
    return float(_signals("gradient_cosine", signals)[:, 0].mean())


def tag(signals: Any) -> float:
    """TAG's first-order affinity, divided by the learning rate: the mean of <g_i, g_j> / L_j over the steps of a run of both.

    Args:
        signals: f[N, 4], as step_signals() has them.

    Raises:
        UserError: The array has another form.

    References:
        As tag_lookahead.
    """
    cosines, sources, targets, losses = _signals("tag", signals).T
    return float((cosines * sources * targets / losses).mean())


def _signals(estimator: str, signals: Any) -> np.ndarray:
    array = matrix(estimator, "signals", signals)
    if array.shape[1] != 4 or not (array[:, 3] > 0).all():
        raise UserError(f"{estimator}: signals must have the columns cosine, two norms, and a loss above 0")
    return array
