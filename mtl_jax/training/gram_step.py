"""Losses -> Gram matrix -> weights -> gradient: the measure of a step for rules that compare task gradients."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.data.batches import Batch
from mtl_jax.errors import UserError
from mtl_jax.tasks import Task
from mtl_jax.training import gradients
from mtl_jax.training.state import TrainState
from mtl_jax.training.step import Encode, Measure, Measured, apply_head, mean_losses
from mtl_jax.transfer import freezing
from mtl_jax.weighting import Rule, Signals

TRUNK, REPRESENTATION = "trunk", "representation"


def check(params: Any, mask: Any, gram_over: str) -> Any:
    """The tree of bools that says which parameters the Gram matrix is taken over.

    Args:
        params: The parameters.
        mask: Which of them train.
        gram_over: "trunk", "representation", or a regular expression of parameter paths.

    Raises:
        UserError: The expression is none, or matches no trunk parameter that trains.
    """
    try:
        pattern = re.compile("trunk/.*" if gram_over in (TRUNK, REPRESENTATION) else gram_over)
    except re.error as error:
        raise UserError(f"gram_over {gram_over!r} is no regular expression ({error})") from error

    def chosen(path: Any, train: bool) -> bool:
        name = freezing.path_name(path)
        return train and name.startswith("trunk/") and bool(pattern.fullmatch(name))

    tree = jax.tree_util.tree_map_with_path(chosen, mask)
    if not any(jax.tree.leaves(tree)):
        raise UserError(f"gram_over {gram_over!r} matches no trunk parameter that trains")
    return tree


def by_gram(
    encode: Encode,
    tasks: tuple[Task, ...],
    rule: Rule,
    layout: gradients.Layout,
    over: Any,
    *,
    gram_over: str = TRUNK,
    dtype: Any = jnp.float32,
    weigh_heads: bool = True,
) -> Measure:
    """The measure of a Gram rule.

    Over the whole trunk, the task gradients that make the Gram matrix also make the combined gradient, and nothing is
    computed twice. Over a part of it, or over the representation, the weights come first, and one ordinary backward pass
    follows; a part costs a second forward pass. The representation's gradient is that by a vector added to every example's
    pooled vector, f32[H].

    Args:
        encode: encode_tokens(trunk).
        tasks: The tasks, label sets filled in.
        rule: A rule with needs_gram.
        layout: gradients.layout(...).
        over: check(...), for the trainable part of this phase.
        gram_over: "trunk", "representation", or the expression that `over` was made from.
        dtype: In which the task gradients are held: bfloat16 halves their memory, K times the trainable trunk.
        weigh_heads: Whether a head's own gradient is multiplied by its task's weight, as in the weighted sum; else it is
            trained by its plain loss.
    """
    block_of = {task: block for entries in layout.rounds for task, block in entries}
    names = layout.tasks

    def measure(trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState) -> Measured:
        trunk_key, head_key, rule_key = jax.random.split(state.step_key(), 3)
        blocks = gradients.cut(batch, layout.rows, tasks)
        keys_N = jax.random.split(trunk_key, len(layout.rows))
        head_keys = {task.name: jax.random.fold_in(head_key, number) for number, task in enumerate(tasks)}
        labels = {task.name: blocks.labels[task.name][block_of[task.name]] for task in tasks}

        def encode_block(trunk: Any, block: Batch, key: jax.Array) -> jax.Array:
            return encode(freezing.merge(trunk, frozen["trunk"]), block, key, table)

        def encode_all(trunk: Any) -> jax.Array:
            return jax.vmap(encode_block, in_axes=(None, 0, 0))(trunk, blocks, keys_N)

        def head_losses(heads: Any, pooled: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            params = freezing.merge(heads, frozen["heads"])
            outputs = {t.name: apply_head(t, params[t.name], pooled[t.name], head_keys[t.name]) for t in tasks}
            losses, counts = mean_losses(tasks, outputs, labels)
            return jax.tree.reduce(jnp.add, losses), (losses, counts)

        if gram_over == TRUNK:
            pooled_NxRxSxH, pull_blocks = gradients.encode_blocks(encode_block, trained["trunk"], blocks, keys_N)
        else:
            pooled_NxRxSxH, pull_all = jax.vjp(encode_all, trained["trunk"])
        pooled = {task: pooled_NxRxSxH[block] for task, block in block_of.items()}
        (head_gradients, cotangents), (losses, counts) = jax.grad(head_losses, argnums=(0, 1), has_aux=True)(
            trained["heads"], pooled
        )

        rounds: list[Any]
        if gram_over == REPRESENTATION:
            rounds = [jnp.stack([cotangents[name].sum(axis=(0, 1)) for name in names])]
        else:
            if gram_over != TRUNK:
                part, rest = freezing.split(trained["trunk"], over["trunk"])

                def encode_part(part: Any, block: Batch, key: jax.Array) -> jax.Array:
                    return encode_block(freezing.merge(part, rest), block, key)

                _, pull_blocks = gradients.encode_blocks(encode_part, part, blocks, keys_N)
            rounds = gradients.task_gradients(pull_blocks, cotangents, layout.rounds, dtype)
        gram_KxK = gradients.gram_matrix(rounds, names)
        weights, rule_state = rule.update(state.rule_state, Signals(losses, gram_KxK, state.step, rule_key))

        if gram_over == TRUNK:
            trunk_gradient = gradients.combine(rounds, weights, names)
        else:
            weighted_NxRxSxH = jnp.zeros_like(pooled_NxRxSxH)
            for task, block in block_of.items():
                weighted_NxRxSxH = weighted_NxRxSxH.at[block].add(weights[task] * cotangents[task])
            (trunk_gradient,) = pull_all(weighted_NxRxSxH)
        if weigh_heads:
            head_gradients = {
                name: jax.tree.map(lambda leaf, w=weights[name]: w * leaf, gradient)
                for name, gradient in head_gradients.items()
            }
        gradient = {"trunk": trunk_gradient, "heads": head_gradients}
        return Measured(gradient, losses, counts, weights, gram_KxK, rule_state)

    return measure
