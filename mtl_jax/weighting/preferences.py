"""Rules from the losses and a preference: how much each task counts beside the others, as a direction of the losses.

The objective is one number of the losses L and the preferences r, above 0, and the weights are its derivative by the losses. To
see a whole Pareto front, train one run for each of many preferences: an ablation does, in one program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.weighting.base import TINY, Rule, Signals, Weights, named, present, stack, unstack
from mtl_jax.weighting.options import number

SHORT = 1e-6  # losses, or distances of losses relative to the largest, that are shorter than this have no direction


@named
def cosmos(lam: float = 1.0, weights: Mapping[str, float] | None = None) -> Rule:
    """A weighted sum of the losses, less the cosine of losses and preferences (Ruchte and Grabocka 2021, COSMOS).

    The objective is r . L - lam (r . L) / (|r| |L|). lam = 0 is a weighted sum; a larger lam keeps the losses in the
    proportions of the preferences. A weight may be negative, where lam is large beside |L|. The paper draws new preferences in
    every step and gives them to the network as an input, too; here they are fixed. Heads are weighted: they follow the
    objective, like all parameters.

    Args:
        lam: The pull towards the preferences; not negative. The paper's values are 0.01 to 8.
        weights: {task: preference}, above 0; None: 1 each. In an experiment they are its weights.

    Raises:
        UserError: An option is out of range; at init, a task has no preference or a preference no task.
    """
    number("weighting cosmos: lam", lam, least=0)

    def objective(losses_K: jax.Array, preference_K: jax.Array) -> jax.Array:
        largest = _largest(losses_K, SHORT)
        scaled_K = losses_K / largest
        length = jnp.sqrt(scaled_K @ scaled_K + (SHORT / largest) ** 2)
        return preference_K @ losses_K - lam * (_direction(preference_K) @ scaled_K) / length

    return _of_objective("cosmos", objective, weights, 0.0)


@named
def pbi(theta: float = 5.0, weights: Mapping[str, float] | None = None, reference: float | Mapping[str, float] = 0.0) -> Rule:
    """Penalty-based boundary intersection: near the origin, and near the preferences' direction (Zhang and Li 2007, MOEA/D).

    With u = r / |r| and f = L - reference: d_1 = f . u, d_2 = |f - d_1 u|, and the objective is d_1 + theta d_2. theta = 0 is
    a weighted sum; a larger theta keeps the losses in the proportions of the preferences. A weight may be negative: of a loss
    that is small beside its preference. Heads are weighted: they follow the objective, like all parameters.

    Args:
        theta: The weight of the distance from the direction; not negative. The paper takes 5.
        weights: {task: preference}, above 0; None: 1 each. In an experiment they are its weights.
        reference: A lower bound of the losses, one number for all or {task: number}.

    Raises:
        UserError: An option is out of range; at init, a task has no preference or reference, or one of them no task.
    """
    number("weighting pbi: theta", theta, least=0)

    def objective(shifted_K: jax.Array, preference_K: jax.Array) -> jax.Array:
        direction_K, largest = _direction(preference_K), _largest(shifted_K, TINY)
        along = (shifted_K / largest) @ direction_K
        apart_K = shifted_K / largest - along * direction_K
        # Where the losses have the direction of the preferences, the distance has no derivative: this takes 0.
        return largest * (along + theta * jnp.sqrt(apart_K @ apart_K + SHORT**2))

    return _of_objective("pbi", objective, weights, reference)


def _largest(losses_K: jax.Array, least: float) -> jax.Array:
    """The largest absolute loss, f32[], as a constant: neither squares of losses over it nor its multiples overflow."""
    return jax.lax.stop_gradient(jnp.clip(jnp.abs(losses_K).max(), least, 1e30))


def _direction(preference_K: jax.Array) -> jax.Array:
    """The preferences at length 1; 0 if there are none."""
    length = jnp.sqrt(preference_K @ preference_K)
    return preference_K / jnp.where(length > 0, length, 1.0)


def _of_objective(
    name: str,
    objective: Callable[[jax.Array, jax.Array], jax.Array],
    weights: Mapping[str, float] | None,
    reference: float | Mapping[str, float],
) -> Rule:
    """A rule without state whose weights are the derivative of an objective by the losses.

    Args:
        name: The rule's name, for errors.
        objective: (losses less their reference, preferences) to f32[]; of absent tasks both are 0.
        weights: {task: preference}, or None.
        reference: As for pbi().
    """
    for task, weight in (weights or {}).items():
        number(f"weighting {name}: the preference of {task}", weight, above=0)
    for lowest in reference.values() if isinstance(reference, Mapping) else (reference,):
        number(f"weighting {name}: reference", lowest)

    def init(names: Sequence[str]) -> Any:
        for field, by_task in (("weights", weights), ("reference", reference)):
            if not isinstance(by_task, Mapping) or (field == "weights" and not by_task):
                continue
            for task in by_task:
                if task not in names:
                    raise unknown(f"task in {field} of weighting {name!r}:", task, names)
            if missing := [task for task in names if task not in by_task]:
                raise UserError(f"weighting {name}: no {field} for {listed(missing)}")
        return ()

    def of_losses(losses_K: jax.Array, signals: Signals) -> jax.Array:
        tasks, present_K = sorted(signals.losses), present(signals)
        low_K = stack({task: reference[task] if isinstance(reference, Mapping) else reference for task in tasks})
        preference_K = stack({task: (weights or {}).get(task, 1.0) for task in tasks})
        shifted_K = jnp.where(present_K, losses_K - low_K, 0.0)
        return objective(shifted_K, jnp.where(present_K, preference_K, 0.0))

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        return unstack(jax.grad(of_losses)(stack(signals.losses), signals), signals), state

    return Rule(init=init, update=update, objective=lambda state, signals: of_losses(stack(signals.losses), signals))
