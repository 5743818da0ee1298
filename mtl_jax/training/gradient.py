"""TODO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.data.batches import Batch
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.batch_parts import add_up, in_parts, part_key
from mtl_jax.training.forward import Encode, Look, label_counts, mean_losses, whole_batch
from mtl_jax.training.train_state import TrainState
from mtl_jax.weighting import Rule, Signals, solve


class Held(NamedTuple):
    """Regularisers of what the model makes of a batch.

    Attributes:
        counts: Batch -> what their sums are divided by, a tree of f32[].
        losses: (heads' params, Encoded, {task: outputs}, rows, counts of the batch, references) -> {regulariser: f32[]}, the
            rows' part in it.
        weights: Step -> {regulariser: f32[]}.
    """

    counts: Callable[[Batch], Any]
    losses: Callable[[Any, Encoded, dict[str, jax.Array], Batch, Any, Any], dict[str, jax.Array]]
    weights: Callable[[jax.Array], dict[str, jax.Array]]


NOTHING_HELD = Held(lambda batch: {}, lambda *seen: {}, lambda step: {})


class Measured(NamedTuple):
    """What the losses of a batch ask for.

    Attributes:
        gradient: Of the weighted sum, a tree like the trainable leaves.
        losses: As in Metrics; so are counts, weights, gram, held, held_weights and residual.
        rule_state: The rule's new state.
    """

    gradient: Any
    losses: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    gram: jax.Array | None
    rule_state: Any
    held: dict[str, jax.Array]
    held_weights: dict[str, jax.Array]
    residual: jax.Array | None = None


# (trainable leaves, frozen leaves, batch, feature table, state, what regularisers hold on to) -> Measured
Measure = Callable[[Any, Any, Batch, jax.Array | None, TrainState, Any], Measured]


def by_losses(
    encode: Encode,
    tasks: tuple[Task, ...],
    rule: Rule,
    *,
    trains_trunk: bool,
    weigh_heads: bool = True,
    accumulate: int = 1,
    held: Held = NOTHING_HELD,
    look: Look = whole_batch,
) -> Measure:
    """Losses -> weights -> gradient, in one backward pass: for rules that look at the losses only.

    Args:
        encode: encode_tokens(trunk), or look_up where the whole trunk is frozen and its features are known.
        tasks: The tasks, label sets filled in.
        rule: The weighting rule.
        trains_trunk: Whether any part of the trunk trains. A frozen trunk is a fixed function: no dropout in it.
        weigh_heads: Whether a head's own gradient is multiplied by its task's weight, as in the weighted sum; else it is
            trained by its plain loss. A head whose weight is below 0 stands still.
        accumulate: Parts of a batch that are gone through one after another. The weights are those of the whole batch: with
            more than one part, a rule that looks at the losses costs a second forward pass.
        held: Regularisers that look at the same forward pass; the rule does not see them.
        look: What each task's head sees of a batch.
    """

    def measure(
        trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState, references: Any = None
    ) -> Measured:
        trunk_key, head_key, rule_key = jax.random.split(state.step_key(), 3)
        counts, held_counts, held_weights = label_counts(tasks, batch), held.counts(batch), held.weights(state.step)

        def forward(trained: Any, part: Batch, number: jax.Array | int) -> tuple[Any, Encoded]:
            params = trees.merge(trained, frozen)
            key = part_key(trunk_key, number, accumulate) if trains_trunk else None
            encoded = encode(params["trunk"], part, key, table)
            return head_losses(trained["heads"], encoded, part, number), encoded

        def head_losses(heads: Any, encoded: Encoded, part: Batch, number: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            """The losses of the tasks, and those of the regularisers."""
            params, key = trees.merge(heads, frozen["heads"]), part_key(head_key, number, accumulate)
            outputs: dict[str, jax.Array] = {}
            own: dict[str, jax.Array] = {}
            for n, task in enumerate(tasks):
                seen, rows = look(task, encoded, part)
                outputs[task.name] = task.apply(params[task.name], seen, rows, jax.random.fold_in(key, n))
                own |= mean_losses((task,), outputs, rows, counts)
            return own, held.losses(params, encoded, outputs, part, held_counts, references)

        def weigh(losses: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], Any]:
            weights, *rest = solve(rule, state.rule_state, Signals(losses, None, state.step, rule_key, counts))
            return weights, rest

        def gradient_of(part: Batch, number: Any, choose: Any) -> tuple[Any, Any, Any]:
            losses, pull, encoded = jax.vjp(lambda trained: forward(trained, part, number), trained, has_aux=True)
            weights, rest = choose(losses[0])
            (gradient,) = pull((weights, held_weights))
            if not weigh_heads:

                def plain(heads: Any) -> jax.Array:
                    own, beside = head_losses(heads, encoded, part, number)
                    return sum(own.values()) + sum(held_weights[name] * loss for name, loss in beside.items())

                gradient = gradient | {"heads": jax.grad(plain)(trained["heads"])}
            else:
                gradient = gradient | {"heads": _not_uphill(gradient["heads"], weights)}
            return gradient, losses, (weights, rest)

        if accumulate == 1:
            gradient, (losses, beside), (weights, (rule_state, residual)) = gradient_of(batch, 0, weigh)
        else:
            parts = in_parts(batch, accumulate)
            # Where the rule does not look at the losses, nothing asks for this pass, and XLA leaves it out.
            weights, (rule_state, residual) = weigh(add_up(lambda part, number: forward(trained, part, number)[0][0], parts))
            gradient, (losses, beside) = add_up(
                lambda part, number: gradient_of(part, number, lambda _: (weights, ()))[:2], parts
            )
        residual = None if rule.solve is None else residual
        return Measured(gradient, losses, counts, weights, None, rule_state, beside, held_weights, residual)

    return measure


def _not_uphill(gradients: dict[str, Any], weights: dict[str, jax.Array]) -> dict[str, Any]:
    """Gradients of the heads, 0 where the weight that they were multiplied by is negative."""
    return gradients | {
        name: jax.tree.map(lambda leaf, w=weight: jnp.where(w < 0, 0.0, leaf), gradients[name])
        for name, weight in weights.items()
    }
