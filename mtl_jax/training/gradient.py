"""The weighted backward pass: a forward pass over a batch, then from weights of its losses to one gradient.

Shapes in names: R rows, T tokens a row, S examples a row, H trunk width, O outputs of a task.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.data.batches import Batch
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.batch_parts import in_parts, part_key, sum_over_parts
from mtl_jax.training.forward import (
    NO_SAVINGS,
    Encode,
    HeadInput,
    HeadInputs,
    Savings,
    every_row,
    label_counts,
    outputs_and_losses,
)
from mtl_jax.training.task_gradients import NO_ADAPTERS
from mtl_jax.training.train_state import StepInputs, TrainState
from mtl_jax.transfer.adapters.stacks import OwnParts

Weights = Mapping[str, jax.Array]


class Backward(NamedTuple):
    """A forward pass over a batch, and its backward pass as a function.

    Attributes:
        losses: {task: f32[]}, the input of the weighting rule.
        counts: {task: f32[]}, labelled examples or tokens.
        pull: (weights of all losses, rows or None, heads' weights or None) -> the gradient of the weighted sum, a tree like the
            trainable leaves, and {task or regulariser: f32[]}, all losses. Rows replace the task gradients; heads' weights,
            {task: f32[]}, replace those of the losses for the heads' own gradients.
        gram: f32[K, K], of the task gradients in sorted order; None: they were not compared.
        rows: A tree like the trunk's trainable leaves that tasks share, each f32[K, ...]: the task gradients for a rule that
            changes them; else None.
        cross: Signals.cross, for a rule that needs it; else None.
        held_out: Signals.held_out, for a rule that needs it; else None.
        along: A tree like the trainable leaves -> {task: f32[]}, the derivative of the losses along it; None: not available.
    """

    losses: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    pull: Callable[[Weights, Any, Weights | None], tuple[Any, dict[str, jax.Array]]]
    gram: jax.Array | None = None
    rows: Any = None
    cross: jax.Array | None = None
    held_out: Callable[[Weights, float], jax.Array] | None = None
    along: Callable[[Any], dict[str, jax.Array]] | None = None


# (trainable leaves, frozen leaves, inputs, (PRNG key of the trunk's dropout, of the heads')) -> Backward
BackwardFn = Callable[[Any, Any, StepInputs, tuple[jax.Array, jax.Array]], Backward]


class StepGradients(NamedTuple):
    """The gradient of a step with all that it was made of.

    Attributes:
        gradient: Of the weighted sum, a tree like the trainable leaves.
        losses: As in StepMetrics; so are counts, weights, gram and residual.
        rule_state: The rule's new state.
    """

    gradient: Any
    losses: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    rule_state: Any
    gram: jax.Array | None = None
    residual: jax.Array | None = None


# (trainable leaves, frozen leaves, inputs, state) -> StepGradients
GradientFn = Callable[[Any, Any, StepInputs, TrainState], StepGradients]


class OutputRegularisers(NamedTuple):
    """Regularisers of the outputs of a forward pass, such as distillation.

    Attributes:
        counts: Batch -> the divisors of their sums, a tree of f32[].
        losses: (heads' params, Encoded, {task: outputs}, rows, counts of the batch, references) -> {regulariser: f32[]}, the
            rows' part in it.
    """

    counts: Callable[[Batch], Any]
    losses: Callable[[Any, Encoded, dict[str, jax.Array], Batch, Any, Any], dict[str, jax.Array]]


NO_REGULARISERS = OutputRegularisers(lambda batch: {}, lambda *outputs: {})


def make_backward(
    encode: Encode,
    tasks: tuple[Task, ...],
    *,
    trains_trunk: bool,
    weigh_heads: bool = True,
    accumulate: int = 1,
    regularisers: OutputRegularisers = NO_REGULARISERS,
    head_inputs: HeadInputs = every_row,
    savings: Savings = NO_SAVINGS,
    own: OwnParts = NO_ADAPTERS,
) -> BackwardFn:
    """One backward pass for all losses, for rules that read the losses only.

    Args:
        encode: encode_tokens(trunk), or cached_features where the whole trunk is frozen and its features are known.
        tasks: The tasks, label sets filled in.
        trains_trunk: Whether any part of the trunk trains. A frozen trunk is a fixed function: no dropout in it.
        weigh_heads: Whether a head's gradient is multiplied by its task's weight, as in the weighted sum; else it is trained
            by its plain loss. A head with a weight below 0 is not changed, nor what its task has of its own in the trunk.
        accumulate: The number of parts of a batch, which are computed one after another. The weights are those of the whole
            batch: with more than one part, a rule that reads the losses costs a second forward pass.
        regularisers: Regularisers of the same forward pass; the rule does not see them.
        head_inputs: The rows of a batch that each task's head reads.
        savings: How the heads save memory.
        own: Which parameters of the trunk belong to single tasks.
    """

    def backward(trained: Any, frozen: Any, inputs: StepInputs, keys: tuple[jax.Array, jax.Array]) -> Backward:
        trunk_key, head_key = keys
        counts, divisors = label_counts(tasks, inputs.batch), regularisers.counts(inputs.batch)

        def head_losses(heads: Any, encoded: Encoded, part: Batch, number: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            """The losses of the tasks, and those of the regularisers."""
            params, key = trees.merge(heads, frozen["heads"]), part_key(head_key, number, accumulate)
            given = {}
            for n, task in enumerate(tasks):
                name, (read, rows) = task.name, head_inputs(task, encoded, part)
                apart = rows._replace(labels={}), rows.labels[name]
                of_key = jax.random.fold_in(key, n)
                given[name] = HeadInput(params[name], read.read_by(name), *apart, counts[name], of_key)
            outputs, losses = outputs_and_losses(tasks, given, savings)
            return losses, regularisers.losses(params, encoded, outputs, part, divisors, inputs.references)

        def forward(trained: Any, part: Batch, number: Any) -> tuple[tuple[dict[str, Any], dict[str, Any]], Encoded]:
            params = trees.merge(trained, frozen)
            key = part_key(trunk_key, number, accumulate) if trains_trunk else None
            encoded = encode(params["trunk"], part, key, inputs.features)
            return head_losses(trained["heads"], encoded, part, number), encoded

        def forward_and_back(part: Batch, number: Any) -> tuple[Any, Callable[[Weights, Weights | None], Any]]:
            """The losses of a part, and its gradient as a function of their weights and of those of the heads."""
            losses, pull, encoded = jax.vjp(lambda trained: forward(trained, part, number), trained, has_aux=True)

            def gradient_of(weights: Weights, of_heads: Weights | None) -> Any:
                (gradient,) = pull(_like(losses, weights))
                if weigh_heads and of_heads is None:
                    heads = _not_uphill(gradient["heads"], {task.name: weights[task.name] for task in tasks})
                else:

                    def plain(heads: Any) -> jax.Array:
                        of_tasks, of_regularisers = head_losses(heads, encoded, part, number)
                        if of_heads is not None:
                            of_tasks = {name: of_heads[name] * loss for name, loss in of_tasks.items()}
                        return sum(of_tasks.values()) + sum(weights[name] * loss for name, loss in of_regularisers.items())

                    heads = jax.grad(plain)(trained["heads"])
                return gradient | {"trunk": own_not_uphill(gradient["trunk"], weights, own), "heads": heads}

            return losses, gradient_of

        def part_along(direction: Any, part: Batch, number: Any) -> dict[str, jax.Array]:
            return jax.jvp(lambda trained: forward(trained, part, number)[0][0], (trained,), (direction,))[1]

        if accumulate == 1:
            losses, gradient_of = forward_and_back(inputs.batch, 0)
            return Backward(
                losses[0],
                counts,
                lambda weights, _, of_heads: (gradient_of(weights, of_heads), losses[0] | losses[1]),
                along=lambda direction: part_along(direction, inputs.batch, 0),
            )
        parts = in_parts(inputs.batch, accumulate)

        def pull_parts(weights: Weights, _: Any, of_heads: Weights | None) -> tuple[Any, dict[str, jax.Array]]:
            def of_part(part: Batch, number: Any) -> tuple[Any, dict[str, jax.Array]]:
                losses, gradient_of = forward_and_back(part, number)
                return gradient_of(weights, of_heads), losses[0] | losses[1]

            return sum_over_parts(of_part, parts)

        # Where the rule does not read the losses, this pass has no use, and XLA removes it.
        losses = sum_over_parts(lambda part, number: forward(trained, part, number)[0][0], parts)
        return Backward(
            losses,
            counts,
            pull_parts,
            along=lambda direction: sum_over_parts(functools.partial(part_along, direction), parts),
        )

    return backward


def beside(backward: BackwardFn, other: BackwardFn) -> BackwardFn:
    """A pass plus the regularisers of another pass, in which the tasks get weight 0.

    Args:
        backward: Of the tasks.
        other: make_backward(...) with regularisers.
    """

    def both(trained: Any, frozen: Any, inputs: StepInputs, keys: tuple[jax.Array, jax.Array]) -> Backward:
        first, second = backward(trained, frozen, inputs, keys), other(trained, frozen, inputs, keys)

        def pull(weights: Weights, rows: Any, of_heads: Weights | None) -> tuple[Any, dict[str, jax.Array]]:
            gradient, losses = first.pull(weights, rows, of_heads)
            zeros = {task: jnp.zeros(()) for task in second.counts}
            of_regularisers, other_losses = second.pull({**weights, **zeros}, None, None)
            return jax.tree.map(jnp.add, gradient, of_regularisers), other_losses | losses

        return first._replace(pull=pull)

    return both


def _like(losses: tuple[dict[str, Any], dict[str, Any]], weights: Weights) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights in the form of the losses."""
    of_tasks, of_regularisers = losses
    return {name: weights[name] for name in of_tasks}, {name: weights[name] for name in of_regularisers}


def own_not_uphill(gradient: Any, weights: Weights, own: OwnParts) -> Any:
    """The trunk's gradient, 0 by parameters of a single task whose weight is negative.

    Args:
        gradient: Of the weighted sum, a tree like the trunk's trainable leaves.
        weights: {task: f32[]}.
        own: Which parameters belong to single tasks.
    """

    def leaf_of(path: Any, leaf: jax.Array) -> jax.Array:
        owners = own.owners(trees.path_name(path))
        if not set(owners) & set(weights):
            return leaf
        uphill = jnp.stack([jnp.asarray(weights.get(owner, 0.0)) < 0 for owner in owners])
        return jnp.where(jnp.repeat(uphill, leaf.size // len(owners)).reshape(leaf.shape), 0.0, leaf)

    return jax.tree_util.tree_map_with_path(leaf_of, gradient)


def _not_uphill(gradients: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """Gradients of the heads, 0 where the weight that they were multiplied by is negative."""
    return gradients | {
        name: jax.tree.map(lambda leaf, w=weight: jnp.where(w < 0, 0.0, leaf), gradients[name])
        for name, weight in weights.items()
    }
