"""Transforms of a step's GradientFn: each takes one and returns one. build_step.py has their order."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.trees import Leaves, leaves_of, put
from mtl_jax.tasks import Task
from mtl_jax.training.gradient import GradientFn, StepGradients
from mtl_jax.training.train_state import StepInputs, TrainState
from mtl_jax.transfer.penalties import mixout
from mtl_jax.transfer.regularisers import Regulariser

# (leaves that train, references) -> f32[]
Penalty = Callable[[Leaves, Any], jax.Array]


def penalty_of(regulariser: Regulariser, phase: str) -> Penalty:
    """The loss of a regulariser of parameters, from the run's references; the phase is that which it begins with."""
    names = regulariser.references(phase)
    return lambda trained, references: regulariser.penalty(trained, {key: references[name] for key, name in names.items()})


def without_tasks(gradient_fn: GradientFn, *, tasks: Collection[str], rows: Sequence[slice]) -> GradientFn:
    """The step of the tasks with a weight, over their rows alone; the result also has the tasks of weight 0.

    L_target + 0 L_source is L_target to the last bit: where a source has the same rows in every step, and all of its tasks
    have weight 0, the step is that of a batch without its rows, dropout included, and costs as much.

    Args:
        gradient_fn: Of the tasks with a weight.
        tasks: The others, whose weight is 0 in every step of the phase.
        rows: batch_parts.weighted_rows(...); none: all rows stay.
    """

    def take(leaf: jax.Array) -> jax.Array:
        parts = [leaf[part] for part in rows]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def without_zero_weights(trained: Any, frozen: Any, inputs: StepInputs, state: TrainState) -> StepGradients:
        inputs = inputs._replace(batch=jax.tree.map(take, inputs.batch)) if rows else inputs
        step = gradient_fn(trained, frozen, inputs, state)
        zeros = {name: jnp.zeros(()) for name in tasks}
        return step._replace(losses=step.losses | zeros, counts=step.counts | zeros, weights=step.weights | zeros)

    return without_zero_weights


def every_row_twice(gradient_fn: GradientFn) -> GradientFn:
    """The step of a batch with every row twice, for R-Drop to compare; counts are those of the original batch."""

    def twice(trained: Any, frozen: Any, inputs: StepInputs, state: TrainState) -> StepGradients:
        doubled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), inputs.batch)
        step = gradient_fn(trained, frozen, inputs._replace(batch=doubled), state)
        return step._replace(counts={task: count / 2 for task, count in step.counts.items()})

    return twice


# (PRNG key, tokens i32[R, T]) -> changed tokens i32[R, T]
Change = Callable[[jax.Array, jax.Array], jax.Array]


def hidden_tokens(tokenizer: Any, share: float) -> Change:
    """The change that replaces a share of the tokens by the mask token, or where there is none by the unknown one.

    Args:
        tokenizer: Its special tokens stay.
        share: The share.
    """
    hidden = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    special = jnp.array(sorted({0, *tokenizer.all_special_ids}), jnp.int32)

    def change(key: jax.Array, tokens_RxT: jax.Array) -> jax.Array:
        chosen_RxT = jax.random.bernoulli(key, share, tokens_RxT.shape) & ~jnp.isin(tokens_RxT, special)
        return jnp.where(chosen_RxT, jnp.int32(hidden), tokens_RxT)

    return change


def with_changed_copies(gradient_fn: GradientFn, *, change: Change, tasks: Sequence[Task]) -> GradientFn:
    """The step of a batch with a changed copy of every row after it; the copies have no labels.

    Args:
        gradient_fn: The step.
        change: What happens to the tokens of a copy.
        tasks: The tasks, for their missing labels.
    """
    missing = {task.name: task.missing for task in tasks}

    def copied(trained: Any, frozen: Any, inputs: StepInputs, state: TrainState) -> StepGradients:
        batch = inputs.batch
        key = jax.random.fold_in(state.step_key(), zlib.crc32(b"consistency"))  # not a small number: split() uses these
        copies = batch._replace(
            tokens=change(key, batch.tokens),
            labels={name: jnp.full_like(labels, missing[name]) for name, labels in batch.labels.items()},
        )
        doubled = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch, copies)
        return gradient_fn(trained, frozen, inputs._replace(batch=doubled), state)

    return copied


def at_mixed_parameters(gradient_fn: GradientFn, *, p: float, paths: Sequence[str], start: str) -> GradientFn:
    """Mixout: the step at mixed parameters, its gradient carried back to the parameters themselves.

    Args:
        gradient_fn: The step.
        p: As in mixout().
        paths: The parameters to mix.
        start: The reference with their start.
    """

    def at_mixed(trained: Any, frozen: Any, inputs: StepInputs, state: TrainState) -> StepGradients:
        key = jax.random.fold_in(state.step_key(), zlib.crc32(b"mixout"))  # not a small number: split() uses these

        def mix(trained: Any) -> Any:
            leaves = leaves_of(trained)
            values, starts = ({path: tree[path] for path in paths} for tree in (leaves, inputs.references[start]))
            return put(trained, mixout(key, values, starts, p))

        mixed, pull = jax.vjp(mix, trained)
        step = gradient_fn(mixed, frozen, inputs, state)
        return step._replace(gradient=pull(step.gradient)[0])

    return at_mixed


def with_penalties(gradient_fn: GradientFn, *, penalties: Mapping[str, Penalty]) -> GradientFn:
    """The step with weight times penalty, of the parameters that train, added to its objective.

    Args:
        gradient_fn: The step; its weights include those of the penalties.
        penalties: {regulariser: its loss}.
    """

    def penalised(trained: Any, frozen: Any, inputs: StepInputs, state: TrainState) -> StepGradients:
        step = gradient_fn(trained, frozen, inputs, state)

        def losses_of(trained: Any) -> dict[str, jax.Array]:
            leaves = leaves_of(trained)
            return {name: penalty(leaves, inputs.references) for name, penalty in penalties.items()}

        losses, pull = jax.vjp(losses_of, trained)
        (gradient,) = pull({name: step.weights[name] for name in penalties})
        return step._replace(gradient=jax.tree.map(jnp.add, step.gradient, gradient), losses=step.losses | losses)

    return penalised
