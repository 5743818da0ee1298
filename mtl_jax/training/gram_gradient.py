"""The backward pass of rules that compare task gradients: losses, Gram matrix, and the gradient as a function of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtl_jax.core import trees
from mtl_jax.core.errors import NOT_A_PATTERN, UserError
from mtl_jax.core.files import shown
from mtl_jax.data.batches import Batch
from mtl_jax.models.trunk_output import Encoded, token_table, with_token_table
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training import task_gradients, token_gradients
from mtl_jax.training.batch_parts import in_parts, part_key, sum_and_keep, sum_over_parts
from mtl_jax.training.forward import NO_SAVINGS, Encode, HeadInput, Savings, label_counts, outputs_and_losses
from mtl_jax.training.gradient import Backward, BackwardFn, Weights, own_not_uphill
from mtl_jax.training.task_gradients import NO_ADAPTERS
from mtl_jax.training.train_state import StepInputs
from mtl_jax.transfer.adapters.stacks import OwnParts
from mtl_jax.weighting import Rule

TRUNK, REPRESENTATION = "trunk", "representation"


def check(params: Any, mask: Any, gram_over: str, own: OwnParts = NO_ADAPTERS) -> Any:
    """The tree of bools that says which parameters the Gram matrix is taken over.

    Args:
        params: The parameters.
        mask: Which of them train.
        gram_over: "trunk", "representation", or a regular expression of parameter paths.
        own: Which parameters of the trunk belong to single tasks.

    Raises:
        UserError: The expression is not valid, or matches no trunk parameter that trains and that tasks share.
    """
    try:
        pattern = re.compile("trunk/.*" if gram_over in (TRUNK, REPRESENTATION) else gram_over)
    except NOT_A_PATTERN as error:
        raise UserError(f"gram_over {shown(gram_over)!r} is not a regular expression ({error})") from error

    def chosen(path: Any, train: bool) -> bool:
        name = trees.path_name(path)
        return train and name.startswith("trunk/") and bool(pattern.fullmatch(name))

    tree = jax.tree_util.tree_map_with_path(chosen, mask)
    if not any(over and not all(own.of(path)) for path, over in trees.leaves_of(tree["trunk"]).items()):
        raise UserError(f"gram_over {gram_over!r} matches no trunk parameter that trains and that tasks share")
    return tree


def make_backward(
    encode: Encode,
    tasks: tuple[Task, ...],
    rule: Rule,
    layout: task_gradients.Layout,
    over: Any,
    *,
    gram_over: str = TRUNK,
    dtype: Any = jnp.float32,
    weigh_heads: bool = True,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    only_looks_up: bool = False,
    savings: Savings = NO_SAVINGS,
    own: OwnParts = NO_ADAPTERS,
) -> BackwardFn:
    """A pass that compares the task gradients, for rules that read their Gram matrix or change them.

    Over the whole trunk, the task gradients that make the Gram matrix also make the combined gradient, and nothing is
    computed twice. Over a part of it, or over the representation, the weights come first, and one ordinary backward pass
    follows; a part costs a second forward pass. The representation's gradient is that by a vector added to every token's
    vector (and so to every example's mean), f32[H].

    Args:
        encode: encode_tokens(trunk).
        tasks: The tasks, label sets filled in.
        rule: A rule with needs_gram, needs_cross or a transform. With needs_cross the batch goes through as two halves, every
            other row of a source in each, and their task gradients are kept apart until they are compared.
        layout: task_gradients.layout(...).
        over: check(...), for the trainable part of this phase.
        gram_over: "trunk", "representation", or the expression that `over` was made from; "trunk" for a transform.
        dtype: The dtype in which task gradients are stored and summed: bfloat16 halves their memory, K times the trainable
            trunk. Sums over parts and changed gradients are float32 in any case.
        weigh_heads: As in gradient.make_backward().
        accumulate: As there; the task gradients are added up before they are compared. Where gram_over is not the whole
            trunk, the weighted gradient costs a second pass over the parts.
        mesh: The devices, if there are several: each gets the same number of rows of every block, and a share of every task
            gradient.
        only_looks_up: Whether the trunk uses its tokens only to look up their vectors in its token table. Then no task gets a
            gradient of the whole table, see token_gradients.py.
        savings: How the layers save memory.
        own: Which parameters of the trunk belong to single tasks. The Gram matrix is not over them, and no transform changes
            their gradients.
    """
    block_of = {task: block for entries in layout.rounds for task, block in entries}
    names = layout.tasks
    pieces = accumulate * (2 if rule.needs_cross else 1)

    def backward(trained: Any, frozen: Any, inputs: StepInputs, keys: tuple[jax.Array, jax.Array]) -> Backward:
        trunk_key, head_key = keys
        counts = label_counts(tasks, inputs.batch)
        blocks = task_gradients.cut(inputs.batch, layout, tasks, pieces * (1 if mesh is None else meshes.shards(mesh)))
        if mesh is not None:  # without it, XLA gives every device all gathered rows
            blocks = jax.lax.with_sharding_constraint(blocks, meshes.by_rows(mesh, axis=1))

        differentiated, others = trees.split(trained["trunk"], over["trunk"])
        compact = only_looks_up and gram_over != REPRESENTATION and (rule.transform is None or rule.transform.by_number)
        table_VxE = token_table(differentiated) if compact else None  # None: it is frozen, or the Gram matrix is not over it

        def encode_block(trunk: Any, block: Batch, key: jax.Array) -> Encoded:
            return encode(trees.merge(trunk, frozen["trunk"]), block, key, inputs.features)

        def encode_looked_up(parameters: Any, vectors: Any, block: Batch, key: jax.Array) -> Encoded:
            trunk = trees.merge(parameters, others)
            return encode_block(trunk if vectors is None else with_token_table(trunk, vectors), block, key)

        def pull_by_block(blocks: Batch, keys_N: jax.Array) -> tuple[Encoded, Callable[[Any, np.ndarray], Any]]:
            """The blocks' encodings, and the way back from them to the parameters that the Gram matrix is taken over."""
            if table_VxE is None:
                return task_gradients.encode_blocks(encode_looked_up, differentiated, None, blocks, keys_N)
            rest, vectors_NxRxTxE = with_token_table(differentiated, None), savings.gathered(table_VxE)[blocks.tokens]
            return task_gradients.encode_blocks(encode_looked_up, rest, vectors_NxRxTxE, blocks, keys_N)

        def compare(blocks: Batch, number: Any) -> tuple[Any, Any, Any]:
            """What is summed over the parts of a batch, what is kept of each, and the trunk's gradient by the weights.

            Summed are losses, gradients of the heads, and task gradients by round; kept those of the tokens' vectors.
            """
            keys_N = jax.random.split(part_key(trunk_key, number, pieces), len(layout.rows))
            part_head_key = part_key(head_key, number, pieces)

            def block(tree: Any, task: str) -> Any:
                return jax.tree.map(lambda leaf: leaf[block_of[task]], tree)

            def encode_all(trunk: Any) -> Encoded:
                return jax.vmap(encode_block, in_axes=(None, 0, 0))(trunk, blocks, keys_N)

            def head_losses(heads: Any, encoded: dict[str, Encoded]) -> tuple[jax.Array, Any]:
                params = trees.merge(heads, frozen["heads"])
                given = {}
                for n, task in enumerate(tasks):
                    name, rows = task.name, block(blocks._replace(labels={}), task.name)
                    labels, key = block(blocks.labels[name], name), jax.random.fold_in(part_head_key, n)
                    given[name] = HeadInput(params[name], encoded[name].read_by(name), rows, labels, counts[name], key)
                _, losses = outputs_and_losses(tasks, given, savings)
                return jax.tree.reduce(jnp.add, losses), losses

            if gram_over == TRUNK:
                encoded, pull_blocks = pull_by_block(blocks, keys_N)
            else:
                encoded, pull_all = jax.vjp(encode_all, trained["trunk"])
            by_task = {task: block(encoded, task) for task in block_of}
            (head_gradients, cotangents), losses = jax.grad(head_losses, argnums=(0, 1), has_aux=True)(
                trained["heads"], by_task
            )

            def weighted(weights: Weights) -> Any:
                total = jax.tree.map(jnp.zeros_like, encoded)
                for task, n in block_of.items():
                    part = jax.tree.map(lambda leaf, w=weights[task]: w.astype(leaf.dtype) * leaf, cotangents[task])
                    total = jax.tree.map(lambda whole, leaf, n=n: whole.at[n].add(leaf), total, part)
                return pull_all(total)[0]

            if gram_over == REPRESENTATION:
                rounds: list[Any] = [jnp.stack([_of_vectors(cotangents[name]) for name in names])]
                return (losses, head_gradients, rounds), [], weighted
            if gram_over != TRUNK:
                _, pull_blocks = pull_by_block(blocks, keys_N)
            by_round = task_gradients.task_gradients(pull_blocks, cotangents, layout.rounds)
            stored_dtype = dtype if pieces == 1 else jnp.float32
            rounds = [jax.tree.map(lambda leaf: leaf.astype(stored_dtype), gradients) for gradients, _ in by_round]
            if mesh is not None:  # so that no device gets the sums of all of them
                rounds = savings.by_task(rounds, mesh)
            return (losses, head_gradients, rounds), [vectors for _, vectors in by_round], weighted

        def summed(part: Batch, number: Any) -> tuple[Any, Any]:
            return compare(part, number)[:2]

        if pieces == 1:
            (losses, head_gradients, rounds), kept, weighted = compare(blocks, 0)
            halves, tokens = [rounds], blocks.tokens
        else:
            parts = in_parts(blocks, pieces, axis=1)
            tokens = parts.tokens
            if rule.needs_cross:
                by_half, kept = half_by_half(summed, parts)
                tokens = jnp.stack([tokens[0::2], tokens[1::2]])
                losses, head_gradients, rounds = jax.tree.map(lambda leaf: leaf.sum(axis=0), by_half)
                halves = [jax.tree.map(lambda leaf, half=half: leaf[half], by_half[2]) for half in (0, 1)]
            else:
                (losses, head_gradients, rounds), kept = sum_and_keep(summed, parts)
                halves = [rounds]

            def weighted(weights: Weights) -> Any:
                return sum_over_parts(lambda part, number: compare(part, number)[2](weights), parts)

        of_table = None
        if table_VxE is not None:
            of_table = token_gradients.of_rounds(kept, tokens, layout, len(halves), len(table_VxE), mesh)

        def pull(weights: Weights, rows: Any, of_heads: Weights | None) -> tuple[Any, dict[str, jax.Array]]:
            if rows is not None:
                trunk = task_gradients.combine([rows], weights, sorted(names))
                if table_VxE is not None:
                    of_read_UxE = token_table(trunk)
                    trunk = with_token_table(trunk, jnp.zeros_like(table_VxE).at[ids_U].set(of_read_UxE, mode="drop"))
                alone = [task_gradients.of_single_tasks(entries, own) for entries in rounds]
                trunk = task_gradients.together(trunk, task_gradients.combine(alone, weights, names, own), own)
            elif gram_over != TRUNK:
                trunk = own_not_uphill(weighted(weights), weights, own)
            else:
                trunk = task_gradients.combine(rounds, weights, names, own)
                if of_table is not None and table_VxE is not None:
                    weights_K = jnp.stack([weights[name] for name in sorted(names)] * len(halves))
                    trunk = with_token_table(trunk, token_gradients.combine(of_table, weights_K, len(table_VxE), mesh))
                if mesh is not None:
                    trunk = savings.combined(trunk, mesh)
            heads = head_gradients
            if weigh_heads or of_heads is not None:
                chosen = weights if of_heads is None else of_heads
                heads = head_gradients | {
                    name: jax.tree.map(lambda leaf, w=chosen[name]: jnp.maximum(w, 0.0) * leaf, head_gradients[name])
                    for name in names
                }
            return {"trunk": trunk, "heads": heads}, losses

        rows, ids_U = None, None
        if rule.transform is not None:
            rows = task_gradients.in_order([task_gradients.shared_only(entries, own) for entries in rounds], names)
            if of_table is not None and table_VxE is not None:
                of_read_KxUxE, ids_U = token_gradients.rows_read(of_table, len(names), len(table_VxE))
                rows = with_token_table(rows, of_read_KxUxE)
        apart = [task_gradients.shared_only(entries, own) for by_round in halves for entries in by_round]
        gram = task_gradients.gram_matrix(apart, [f"{half}{name}" for half in range(len(halves)) for name in names])
        if of_table is not None:
            gram += token_gradients.gram_matrix(of_table, len(names) * len(halves))
        cross = None
        if rule.needs_cross:
            gram, cross = task_gradients.of_halves(gram, half_counts(tasks, parts))
        return Backward(losses, counts, pull, gram, rows, cross)

    return backward


def half_by_half(function: Callable[[Any, Any], tuple[Any, Any]], parts: Any) -> tuple[Any, Any]:
    """As batch_parts.sum_and_keep, over the parts with even and with odd numbers: leaves [2, ...].

    Args:
        function: As there.
        parts: Leaves [P, ...] with an even P.
    """
    by_half = jax.tree.map(lambda leaf: jnp.stack([leaf[0::2], leaf[1::2]]), parts)

    def of_half(half_and_place: tuple[Any, jax.Array]) -> Any:
        half, place = half_and_place
        return sum_and_keep(lambda part, number: function(part, 2 * number + place), half)

    return jax.lax.map(of_half, (by_half, jnp.arange(2)))


def half_counts(tasks: tuple[Task, ...], parts: Batch) -> dict[str, jax.Array]:
    """{task: f32[2]}, labelled examples or tokens in the parts with even and with odd numbers; leaves are [P, N, R, ...]."""

    def of_half(first: int) -> dict[str, jax.Array]:
        half = jax.tree.map(lambda leaf: leaf[first::2].reshape(-1, *leaf.shape[3:]), parts)
        return label_counts(tasks, half)

    return jax.tree.map(lambda *counts: jnp.stack(counts), of_half(0), of_half(1))


def _of_vectors(cotangent: Encoded) -> jax.Array:
    """f32[H], the gradient by a vector that is added to every token's."""
    parts = [part for part in (cotangent.tokens, cotangent.pooled, cotangent.first) if part is not None]
    sums = [part.astype(jnp.float32).sum(axis=tuple(range(part.ndim - 1))) for part in parts]
    return sum(sums[1:], sums[0])


def init_rule(rule: Rule, names: Sequence[str], trunk: Any, own: OwnParts = NO_ADAPTERS) -> Any:
    """The initial state of a rule, and of its transform where it has one.

    Args:
        rule: The rule.
        names: Task names, in order.
        trunk: The trunk's trainable leaves.
        own: Which of them belong to single tasks; a transform does not see these.
    """
    if rule.transform is None:
        return rule.init(names)
    gradients = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(names), *leaf.shape), jnp.float32), trunk)
    shared = task_gradients.shared_only(gradients, own)
    return {"rule": rule.init(names), "transform": rule.transform.init(shared)}
