"""Grad-TAG: the losses that training on any subset of tasks would reach, from one joint run, without that training.

Near the joint run's parameters a row's loss is a function of a linear model: the row's output there, plus its gradient times a
change of the parameters. Training on a subset then means fitting that change, a small vector after a random projection, to the
subset's rows. The estimate is the effect of the change on another task's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.affinity.estimator_inputs import matrix
from mtl_jax.core.errors import UserError, count, unknown

MARGINS, ROOTS = 1.0, 0.0  # the first column of linear rows: losses log(1 + exp(-v)), or v^2
RIDGE = 1e-2  # of the change of parameters, over the mean squared gradient of the rows that are fitted
STEPS = 50  # of Newton, at most
TOLERANCE = 1e-9  # of the decrease of the objective, over its value


def project(gradient: Any, dimensions: int, seed: int = 0) -> jax.Array:
    """A gradient as a vector f32[dimensions] whose inner products are those of the gradients, in expectation.

    Every parameter is added to a random entry with a random sign: a count sketch, which needs no matrix.

    Args:
        gradient: A tree of arrays.
        dimensions: D, at least 1.
        seed: Seed of entries and signs; the same for all gradients.

    References:
        Charikar, Chen and Farach-Colton, 2002, Finding Frequent Items in Data Streams,
        https://doi.org/10.1007/3-540-45465-9_59; Weinberger et al., 2009, https://arxiv.org/abs/0902.2206
    """
    whole = jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(gradient)])
    entries, signs = jax.random.split(jax.random.key(seed))
    places = jax.random.randint(entries, whole.shape, 0, dimensions)
    return jax.ops.segment_sum(whole * jax.random.rademacher(signs, whole.shape, jnp.float32), places, dimensions)


def linear_value(loss: jax.Array, margins: bool) -> jax.Array:
    """The value, computed from a row's loss, that counts as linear in the parameters.

    For a cross-entropy it is the log odds of the row's label, log(p / (1 - p)); for a squared error it is the root.

    Args:
        loss: f32[], -log p or a squared error.
        margins: Whether it is a cross-entropy.
    """
    if not margins:
        return jnp.sqrt(jnp.maximum(loss, 1e-12))
    loss = jnp.clip(loss, 1e-6, 30.0)
    return -loss - jnp.log(-jnp.expm1(-loss))


def subset_losses(
    train: Mapping[str, Any], held_out: Mapping[str, Any], subsets: Iterable[Sequence[str]], ridge: float = RIDGE
) -> list[dict[str, float]]:
    """For each subset of tasks, the mean losses of all tasks' held-out rows after training on the subset: [{task: loss}].

    Args:
        train: {task: f[N, 2 + D]}: for each row whether its value is a margin (1) or the root of a squared error (0), the
            value, and its projected gradient. mtl_jax.affinity.make_linear_rows makes them from a run.
        held_out: The same for rows that are not fitted.
        subsets: Names of tasks; an empty one is the joint run itself.
        ridge: The penalty on the change of parameters, over the mean squared gradient; above 0.

    Raises:
        UserError: An array has another form, a task is unknown, or ridge is not above 0.

    References:
        Li et al., 2024, Scalable Multitask Learning Using Gradient-based Estimation of Task Affinity,
        https://arxiv.org/abs/2409.06091. It projects with a Gaussian matrix.

    Examples:
        >>> rows = np.random.default_rng(0).normal(size=(60, 5))
        >>> rows[:, 0] = 0  # squared errors
        >>> losses = mtl_jax.affinity.subset_losses({"a": rows}, {"a": rows}, [[], ["a"]])
        >>> losses[1]["a"] < losses[0]["a"]
        True
    """
    if not ridge > 0:
        raise UserError(f"grad_tag: ridge is {ridge}; it must be above 0")
    fitted, measured = ({name: _checked(name, rows) for name, rows in tasks.items()} for tasks in (train, held_out))
    result = []
    for subset in subsets:
        for name in subset:
            if name not in fitted:
                raise unknown("task of a subset:", name, fitted)
        change = fit_change([fitted[name] for name in subset], ridge) if subset else None
        result.append({name: _mean_loss(rows, change) for name, rows in measured.items()})
    return result


def grad_tag(source_gradients: Any, gradients: Any, ridge: float = RIDGE) -> float:
    """Grad-TAG's affinity: how much joint training lowers the target's loss, as a share of the loss of training alone.

    The target's rows are halved: one half is fitted, alone and with the source's rows, and the loss is that of the other half.
    The result is the mean over both halves.

    Args:
        source_gradients: f[M, 2 + D], the source's rows in a run of both tasks, in the form of subset_losses().
        gradients: f[N, 2 + D], the target's rows in the same run; at least 2.
        ridge: As for subset_losses().

    Raises:
        UserError: As subset_losses(), or the target has one row.

    References:
        As subset_losses().
    """
    source, target = _checked("source_gradients", source_gradients), _checked("gradients", gradients)
    if len(target) < 2:
        raise UserError(f"grad_tag: gradients has {count(len(target), 'row')}; at least 2 are needed, to fit one half")
    gains = []
    for first in (0, 1):
        half, other = target[first::2], target[1 - first :: 2]
        train, subsets = {"target": half, "source": source}, (["target"], ["target", "source"])
        alone, joint = subset_losses(train, {"target": other}, subsets, ridge)
        gains.append(1 - joint["target"] / max(alone["target"], 1e-12))
    return float(np.mean(gains))


def fit_change(parts: Sequence[np.ndarray], ridge: float = RIDGE) -> np.ndarray:
    """The change f64[D] of the projected parameters that lowers the sum of the tasks' mean losses most, by Newton's method.

    Args:
        parts: For each task its rows f64[N, 2 + D].
        ridge: As for subset_losses().
    """
    gradients = [part[:, 2:] for part in parts]
    dimensions = gradients[0].shape[1]
    scale = sum(float((rows**2).sum(axis=1).mean()) for rows in gradients) / dimensions
    penalty = ridge * max(scale, 1e-30)
    change = np.zeros(dimensions)

    def objective(change: np.ndarray) -> float:
        return sum(_mean_loss(part, change) for part in parts) + 0.5 * penalty * float(change @ change)

    value = objective(change)
    for _ in range(STEPS):
        slope, curvature = penalty * change, penalty * np.eye(dimensions)
        for part, rows in zip(parts, gradients, strict=True):
            first, second = _derivatives(part[:, 1] + rows @ change, part[:, 0])
            slope = slope + rows.T @ first / len(rows)
            curvature = curvature + (rows.T * second) @ rows / len(rows)
        step, length = np.linalg.solve(curvature, slope), 1.0
        while (lower := objective(change - length * step)) > value and length > 1e-6:
            length /= 2
        if lower > value:
            break
        change, decrease, value = change - length * step, value - lower, lower
        if decrease <= TOLERANCE * max(abs(value), 1e-12):
            break
    return change


def _mean_loss(rows: np.ndarray, change: np.ndarray | None) -> float:
    values = rows[:, 1] if change is None else rows[:, 1] + rows[:, 2:] @ change
    return float(np.where(rows[:, 0] == MARGINS, np.logaddexp(0, -values), values**2).mean())


def _derivatives(values: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and second derivative of each row's loss by its value."""
    wrong = 0.5 * (1 - np.tanh(values / 2))  # 1 - p
    margins = kinds == MARGINS
    return np.where(margins, -wrong, 2 * values), np.where(margins, wrong * (1 - wrong), 2.0)


def _checked(name: str, rows: Any) -> np.ndarray:
    array = matrix("grad_tag", name, rows)
    if array.shape[1] < 3 or not np.isin(array[:, 0], (MARGINS, ROOTS)).all():
        raise UserError(f"grad_tag: {name} must have the columns 1 or 0, value and gradient, as make_linear_rows has them")
    return array
