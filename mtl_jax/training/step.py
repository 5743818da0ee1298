"""The train step: losses, weights, gradient, update. Pure; the whole program in one screen.

Shapes in names: R rows, T tokens a row, S examples a row, H trunk width, O outputs of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from mtl_jax.core import trees
from mtl_jax.data.batches import Batch
from mtl_jax.training.forward import count_seen
from mtl_jax.training.gradient import Measure
from mtl_jax.training.train_state import Metrics, TrainState
from mtl_jax.transfer import averaging
from mtl_jax.weighting import weighted_sum


def make_train_step(
    measure: Measure,
    optimizer: optax.GradientTransformation,
    mask: Any,
    sources: int = 0,
    follow: Callable[[Any, Any], Any] = averaging.as_it_is,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step function of a phase, to be jitted by the caller.

    Args:
        measure: by_losses(...) or gram_step.by_gram(...): losses, weights, gradient.
        optimizer: An optax transformation over the trainable leaves.
        mask: freezing.trainable(params, rules).
        sources: N, for Metrics.seen.
        follow: How the average of the trainable leaves follows them.

    Returns:
        (state, batch, feature table or None, references of regularisers or None) -> (new state, Metrics).
    """

    def train_step(
        state: TrainState, batch: Batch, table: jax.Array | None, references: Any = None
    ) -> tuple[TrainState, Metrics]:
        trained, frozen = trees.split(state.params, mask)
        found = measure(trained, frozen, batch, table, state, references)
        updates, opt_state = optimizer.update(found.gradient, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        params, average = trees.merge(trained, frozen), follow(state.average, trained)
        total = weighted_sum(found.weights | found.held_weights, found.losses | found.held)
        norm, seen = optax.tree.norm(found.gradient), count_seen(batch, sources)
        metrics = Metrics(
            found.losses,
            found.counts,
            found.weights,
            total,
            norm,
            found.gram,
            seen,
            found.held,
            found.held_weights,
            found.residual,
        )
        return TrainState(state.step + 1, params, opt_state, found.rule_state, state.key, average), metrics

    return train_step
