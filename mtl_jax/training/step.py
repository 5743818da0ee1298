"""The train step: losses, weights, gradient, update. Pure; the whole program in one screen.

Shapes in names: R rows, T tokens a row, S examples a row, H trunk width, O outputs of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.data.batches import Batch
from mtl_jax.models.head import Head
from mtl_jax.models.pooling import segment_mean
from mtl_jax.tasks import Task
from mtl_jax.training.state import TrainState
from mtl_jax.transfer import freezing
from mtl_jax.weighting import Rule, Signals, weighted_sum


class Metrics(NamedTuple):
    """What a step reports; read by the host one step late.

    Attributes:
        losses: {task: f32[]}, mean loss over the labelled examples of the step; 0 where there are none.
        counts: {task: f32[]}, number of those examples.
        weights: {task: f32[]}.
        total: f32[], the weighted sum.
        gradient_norm: f32[], of the trainable part, before clipping.
    """

    losses: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    total: jax.Array
    gradient_norm: jax.Array


# (trunk params, batch, dropout key or None for none, feature table or None) -> pooled f32[R, S, H]
Encode = Callable[[Any, Batch, jax.Array | None, jax.Array | None], jax.Array]


def encode_tokens(trunk: Any) -> Encode:
    """Runs the trunk over the tokens and pools each example.

    Args:
        trunk: A linen module with the call signature of models.encoder.Encoder.
    """

    def encode(params: Any, batch: Batch, key: jax.Array | None, table: jax.Array | None) -> jax.Array:
        output = trunk.apply(
            {"params": params},
            batch.tokens,
            (batch.segments > 0).astype(jnp.int32),
            position_ids=batch.positions,
            segment_ids=batch.segments,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )
        return segment_mean(output.hidden, batch.segments, batch.index.shape[-1])

    return encode


def look_up(params: Any, batch: Batch, key: jax.Array | None, table_NxH: jax.Array | None) -> jax.Array:
    """The Encode of a frozen trunk whose features are known: row i of the table belongs to the example with id i."""
    assert table_NxH is not None
    return table_NxH[jnp.maximum(batch.index, 0)]  # an empty slot, -1, reads some row; it has no label


def apply_heads(
    tasks: tuple[Task, ...], params: dict[str, Any], pooled_RxSxH: jax.Array, key: jax.Array | None
) -> dict[str, jax.Array]:
    """{task: outputs f32[R, S, O]} of every head on every example."""

    def outputs(number: int, task: Task) -> Any:
        head = Head(task.outputs, task.hidden, task.dropout)
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, number)}
        return head.apply({"params": params[task.name]}, pooled_RxSxH, deterministic=key is None, rngs=rngs)

    return {task.name: outputs(number, task) for number, task in enumerate(tasks)}


def mean_losses(
    tasks: tuple[Task, ...], outputs: dict[str, jax.Array], labels: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Mean loss and number of labelled examples of each task: sums over all rows and devices, divided once."""
    sums = {task.name: task.loss(outputs[task.name], labels[task.name]) for task in tasks}
    counts = {name: count for name, (_, count) in sums.items()}
    return {name: total / jnp.maximum(counts[name], 1.0) for name, (total, _) in sums.items()}, counts


def make_train_step(
    encode: Encode,
    tasks: tuple[Task, ...],
    rule: Rule,
    optimizer: optax.GradientTransformation,
    mask: Any,
) -> Callable[[TrainState, Batch, jax.Array | None], tuple[TrainState, Metrics]]:
    """The step function of a phase, to be jitted by the caller.

    Args:
        encode: encode_tokens(trunk), or look_up where the whole trunk is frozen and its features are known.
        tasks: The tasks, label sets filled in.
        rule: The weighting rule.
        optimizer: An optax transformation over the trainable leaves.
        mask: freezing.trainable(params, rules).

    Returns:
        (state, batch, feature table or None) -> (new state, Metrics).
    """

    trains_trunk = any(jax.tree.leaves(mask["trunk"]))

    def train_step(state: TrainState, batch: Batch, table: jax.Array | None) -> tuple[TrainState, Metrics]:
        trunk_key, head_key, rule_key = jax.random.split(state.step_key(), 3)
        trained, frozen = freezing.split(state.params, mask)

        def objective(trained: Any) -> tuple[jax.Array, Any]:
            params = freezing.merge(trained, frozen)
            # A frozen trunk is a fixed function: no dropout in it.
            pooled_RxSxH = encode(params["trunk"], batch, trunk_key if trains_trunk else None, table)
            outputs = apply_heads(tasks, params["heads"], pooled_RxSxH, head_key)
            losses, counts = mean_losses(tasks, outputs, batch.labels)
            signals = Signals(jax.lax.stop_gradient(losses), None, state.step, rule_key)
            weights, rule_state = rule.update(state.rule_state, signals)
            return weighted_sum(weights, losses), (losses, counts, weights, rule_state)

        (total, (losses, counts, weights, rule_state)), gradient = jax.value_and_grad(objective, has_aux=True)(trained)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
        params = freezing.merge(optax.apply_updates(trained, updates), frozen)
        metrics = Metrics(losses, counts, weights, total, optax.tree.norm(gradient))
        return TrainState(state.step + 1, params, opt_state, rule_state, state.key), metrics

    return train_step
