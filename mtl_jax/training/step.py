"""The train step: losses, weights, gradient, update. Pure; the whole program in one screen.

Shapes in names: R rows, T tokens a row, S examples a row, H trunk width, O outputs of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.data.batches import Batch
from mtl_jax.models.encoded import Encoded
from mtl_jax.models.pooling import segment_mean
from mtl_jax.tasks import Task
from mtl_jax.training.parts import add_up, in_parts, part_key
from mtl_jax.training.state import TrainState
from mtl_jax.transfer import averaging, freezing
from mtl_jax.transfer.adapters import Adapted
from mtl_jax.trunks import token_table
from mtl_jax.weighting import Rule, Signals, solve, weighted_sum


class Metrics(NamedTuple):
    """What a step reports; read by the host one step late.

    Attributes:
        losses: {task: f32[]}, mean loss over the labelled examples (or tokens) of the step; 0 where there are none.
        counts: {task: f32[]}, number of those examples, or tokens.
        weights: {task: f32[]}.
        total: f32[], the weighted sum, regularisers included.
        gradient_norm: f32[], of the trainable part, before clipping.
        gram: f32[K, K], inner products of the task gradients in sorted order; NaN where the rule did not look at them in this
            step, None if it never does.
        seen: i32[N, 3], of each source the rows, examples and tokens of the batch, over all hosts.
        held: {regulariser: f32[]}, their losses.
        held_weights: {regulariser: f32[]}.
        residual: f32[], of what the rule solved for its weights, as weighting.solve gives it; NaN where it solved nothing in
            this step, None if it never does.
    """

    losses: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    total: jax.Array
    gradient_norm: jax.Array
    gram: jax.Array | None
    seen: jax.Array
    held: dict[str, jax.Array]
    held_weights: dict[str, jax.Array]
    residual: jax.Array | None = None


# (trunk params, batch, dropout key or None for none, feature table or None) -> Encoded
Encode = Callable[[Any, Batch, jax.Array | None, jax.Array | None], Encoded]


def encode_tokens(trunk: Any, needs: Collection[str] = ("pooled",)) -> Encode:
    """Runs the trunk over the tokens, and makes of them what the heads need.

    Args:
        trunk: A linen module with the call signature of models.encoder.Encoder, or one with adapters.
        needs: Fields of Encoded; the others are None.
    """

    def encode(params: Any, batch: Batch, key: jax.Array | None, table: jax.Array | None) -> Encoded:
        own_adapters = {"source": batch.source} if isinstance(trunk, Adapted) else {}
        output = trunk.apply(
            {"params": params},
            batch.tokens,
            (batch.segments > 0).astype(jnp.int32),
            token_type_ids=batch.types,
            position_ids=batch.positions,
            segment_ids=batch.segments,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
            **own_adapters,
        )
        return Encoded(
            tokens=output.hidden if "tokens" in needs else None,
            pooled=segment_mean(output.hidden, batch.segments, batch.index.shape[-1]) if "pooled" in needs else None,
            table=token_table(params) if "table" in needs else None,
        )

    return encode


def look_up(params: Any, batch: Batch, key: jax.Array | None, table_NxH: jax.Array | None) -> Encoded:
    """The Encode of a frozen trunk whose features are known: row i of the table belongs to the example with id i."""
    assert table_NxH is not None
    return Encoded(pooled=table_NxH[jnp.maximum(batch.index, 0)])  # an empty slot, -1, reads some row; it has no label


def needs(tasks: tuple[Task, ...]) -> tuple[str, ...]:
    """The fields of Encoded that the tasks' heads read."""
    return tuple(field for field in Encoded._fields if any(field in task.needs for task in tasks))


def apply_heads(
    tasks: tuple[Task, ...], params: dict[str, Any], encoded: Encoded, batch: Batch, key: jax.Array | None
) -> dict[str, jax.Array]:
    """{task: outputs f32[R, S, O], f32[R, T, O] or f32[R, U, O], by level} of every head; a key means dropout."""

    return {
        task.name: task.apply(params[task.name], encoded, batch, None if key is None else jax.random.fold_in(key, number))
        for number, task in enumerate(tasks)
    }


def label_counts(tasks: tuple[Task, ...], batch: Batch) -> dict[str, jax.Array]:
    """{task: f32[]}: how many examples, or tokens, have a label."""
    blank = {}
    for task in tasks:
        places = {"example": batch.index, "token": batch.tokens, "target": batch.labels[task.name]}[task.level].shape[:2]
        blank[task.name] = jnp.zeros((*places, task.outputs))
    return {task.name: task.loss(blank[task.name], batch.labels[task.name], batch)[1] for task in tasks}


def mean_losses(
    tasks: tuple[Task, ...], outputs: dict[str, jax.Array], batch: Batch, counts: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """{task: f32[]}: the sum of the losses over all rows and devices, divided once by the number of labelled examples.

    Args:
        tasks: The tasks.
        outputs: What apply_heads returned.
        batch: The rows.
        counts: {task: f32[]}, labelled examples or tokens; of the rows here, or of the batch that they are a part of.
    """
    sums = {task.name: task.loss(outputs[task.name], batch.labels[task.name], batch)[0] for task in tasks}
    return {name: total / jnp.maximum(counts[name], 1.0) for name, total in sums.items()}


# (task, Encoded, rows) -> what its head sees of them: Encoded and rows, with all labels that the task has.
Look = Callable[[Task, Encoded, Batch], tuple[Encoded, Batch]]


def whole_batch(task: Task, encoded: Encoded, batch: Batch) -> tuple[Encoded, Batch]:
    """The Look of a head that sees every row."""
    return encoded, batch


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
        trained, frozen = freezing.split(state.params, mask)
        found = measure(trained, frozen, batch, table, state, references)
        updates, opt_state = optimizer.update(found.gradient, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        params, average = freezing.merge(trained, frozen), follow(state.average, trained)
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


def count_seen(batch: Batch, sources: int) -> jax.Array:
    """i32[N, 3]: of each source its rows in a batch, their examples, their tokens."""
    of_source_RxN = batch.source[:, None] == jnp.arange(sources)
    examples_R, tokens_R = (batch.index >= 0).sum(axis=1), (batch.segments > 0).sum(axis=1)
    per_row_Rx3 = jnp.stack([jnp.ones_like(examples_R), examples_R, tokens_R], axis=1)
    return jnp.einsum("rn,rk->nk", of_source_RxN.astype(per_row_Rx3.dtype), per_row_Rx3)


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
            params = freezing.merge(trained, frozen)
            key = part_key(trunk_key, number, accumulate) if trains_trunk else None
            encoded = encode(params["trunk"], part, key, table)
            return head_losses(trained["heads"], encoded, part, number), encoded

        def head_losses(heads: Any, encoded: Encoded, part: Batch, number: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            """The losses of the tasks, and those of the regularisers."""
            params, key = freezing.merge(heads, frozen["heads"]), part_key(head_key, number, accumulate)
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
