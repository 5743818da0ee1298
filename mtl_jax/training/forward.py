"""The forward pass: trunk, heads, and the mean losses of the tasks.

Shapes in names: R rows, T tokens a row, U target tokens a row, S examples a row, H trunk width, O outputs of a task.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtl_jax.data.batches import Batch
from mtl_jax.models.remat import rematerialised
from mtl_jax.models.trunk_output import (
    POOLINGS,
    TEXT_VECTORS,
    Copies,
    Encoded,
    looked_up,
    pooling_of,
    segment_first,
    token_table,
    with_token_table,
)
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.each_task import each_task
from mtl_jax.training.sharding import Placement
from mtl_jax.transfer.adapters import ADAPTERS, Adapted

# (trunk params, batch, dropout key or None for none, feature table or None) -> Encoded
Encode = Callable[[Any, Batch, jax.Array | None, jax.Array | None], Encoded]


class Savings(NamedTuple):
    """How a pass over the layers saves memory; it changes no number beyond rounding.

    Attributes:
        placement: How parameters lie; None: every device has all of them.
        remat: As Experiment.remat.
    """

    placement: Placement | None = None
    remat: str = "none"

    def gathered(self, params: Any) -> Any:
        """Parameters that any code can read, on every device."""
        return params if self.placement is None else self.placement.gathered(params)

    def boxed(self, params: Any) -> Any:
        """Parameters for a linen module, gathered layer by layer."""
        return params if self.placement is None else self.placement.boxed(params)

    def trunk(self, params: Any) -> Any:
        """Parameters of a trunk; its adapters are small, and their code is no layer's."""
        if self.placement is None or not self.placement.cut:
            return params
        vectors = looked_up(params)
        if vectors is not None:  # they lie by rows
            return with_token_table(self.trunk(with_token_table(params, None)), vectors)
        return {name: self.gathered(tree) if name == ADAPTERS else self.boxed(tree) for name, tree in params.items()}

    def head(self, task: Task, params: Any) -> Any:
        """Parameters of a head."""
        return self.boxed(params) if task.is_linen else self.gathered(params)

    def by_task(self, gradients: Any, mesh: Mesh) -> Any:
        """Task gradients, leaves [K, ...]: each device has a share of them, where parameters are cut the same as of those."""
        if self.placement is not None and self.placement.cut:
            return self.placement.constrained(gradients, leading=1)
        return jax.tree.map(lambda leaf: meshes.in_shares(mesh, leaf, range(1, leaf.ndim)), gradients)

    def combined(self, gradient: Any, mesh: Mesh) -> Any:
        """A gradient that is made from them, laid out as its parameters."""
        if self.placement is not None and self.placement.cut:
            return self.placement.constrained(gradient)
        return jax.lax.with_sharding_constraint(gradient, meshes.replicated(mesh))


NO_SAVINGS = Savings()


def encode_tokens(
    trunk: Any, needs: Collection[str] = ("pooled",), savings: Savings = NO_SAVINGS, one_source: bool = False
) -> Encode:
    """Runs the trunk over the tokens, and gives the heads the fields that they read.

    Args:
        trunk: A linen module with the call signature of models.encoder.Encoder, or one with adapters.
        needs: Fields of Encoded; the others are None.
        savings: How it saves memory.
        one_source: Whether all rows of a batch are of one source.
    """

    module = trunk.base if isinstance(trunk, Adapted) else trunk
    reads_types, pool = _reads_types(module), POOLINGS[pooling_of(module)]
    copies = Copies(trunk.copy_of if isinstance(trunk, Adapted) else ())

    def encode(params: Any, batch: Batch, key: jax.Array | None, features: jax.Array | None, **more: Any) -> Encoded:
        own_adapters = {"source": batch.source, "one_source": one_source} if isinstance(trunk, Adapted) else {}
        types = {"token_type_ids": batch.types} if reads_types else {}
        with rematerialised(savings.remat):
            output = trunk.apply(
                {"params": savings.trunk(params)},
                batch.tokens,
                (batch.segments > 0).astype(jnp.int32),
                position_ids=batch.positions,
                segment_ids=batch.segments,
                deterministic=key is None,
                rngs=None if key is None else {"dropout": key},
                **types,
                **own_adapters,
                **more,
            )
        hidden = output.hidden
        if copies.of:
            hidden = hidden.reshape(batch.tokens.shape[0], -1, *hidden.shape[1:])

        def of_texts(field: str, pool: Any) -> jax.Array | None:
            if field not in needs:
                return None
            vectors = functools.partial(pool, num_segments=batch.index.shape[-1])
            vectors = jax.vmap(vectors, in_axes=(1, None), out_axes=1) if copies.of else vectors
            return vectors(hidden, batch.segments)

        return Encoded(
            tokens=hidden if "tokens" in needs else None,
            pooled=of_texts("pooled", pool),
            table=savings.gathered(token_table(params)) if "table" in needs else None,
            copies=copies,
            first=of_texts("first", segment_first),
        )

    return encode


def _reads_types(module: Any) -> bool:
    """Whether the call of a trunk has an argument for types of tokens; a user's may have none."""
    arguments = inspect.signature(type(module).__call__).parameters.values()
    return any(argument.name == "token_type_ids" or argument.kind == inspect.Parameter.VAR_KEYWORD for argument in arguments)


def cached_features(
    params: Any, batch: Batch, key: jax.Array | None, features_NxH: jax.Array | None, field: str = TEXT_VECTORS[0]
) -> Encoded:
    """The Encode of a frozen trunk whose features are known: row i of them belongs to the example with id i.

    `field` is the one that the features are: one of TEXT_VECTORS.
    """
    assert features_NxH is not None
    vectors = features_NxH[jnp.maximum(batch.index, 0)]  # an empty slot, -1, reads some row; it has no label
    fields: dict[str, Any] = {field: vectors}
    return Encoded(**fields)


def cached_for(tasks: tuple[Task, ...]) -> Encode:
    """cached_features() for the heads of tasks, all of which read the same vector of a text."""
    return functools.partial(cached_features, field=text_vector(tasks) or TEXT_VECTORS[0])


def needed_fields(tasks: tuple[Task, ...]) -> tuple[str, ...]:
    """The fields of Encoded that the tasks' heads read."""
    return tuple(field for field in ("tokens", "pooled", "table", "first") if any(field in task.needs for task in tasks))


def text_vector(tasks: tuple[Task, ...]) -> str:
    """The field of Encoded that all heads read and nothing else, if it has one vector for each text; else ""."""
    fields = needed_fields(tasks)
    return fields[0] if len(fields) == 1 and fields[0] in TEXT_VECTORS else ""


def apply_heads(
    tasks: tuple[Task, ...],
    params: dict[str, Any],
    encoded: Encoded,
    batch: Batch,
    key: jax.Array | None,
    savings: Savings = NO_SAVINGS,
) -> dict[str, jax.Array]:
    """{task: outputs f32[R, S, O], f32[R, T, O] or f32[R, U, O], by level} of every head; a key means dropout."""
    keys = [None if key is None else jax.random.fold_in(key, number) for number in range(len(tasks))]
    given = {task.name: (params[task.name], encoded.read_by(task.name), of) for task, of in zip(tasks, keys, strict=True)}

    def outputs(task: Task, given: tuple[Any, Encoded, jax.Array | None]) -> jax.Array:
        head, read, key = given
        return _apply_head(task, head, read, batch, key, savings)

    return each_task(outputs, tasks, given)


class HeadInput(NamedTuple):
    """What the head and the loss of a task read.

    Attributes:
        params: The head's parameters.
        encoded: The vectors that this head reads.
        rows: Their rows, without labels.
        labels: The task's labels of these rows, as in Batch.labels.
        labelled: f32[], examples or tokens of the whole batch that have a label.
        key: For dropout.
    """

    params: Any
    encoded: Encoded
    rows: Batch
    labels: jax.Array
    labelled: jax.Array
    key: jax.Array


def outputs_and_losses(
    tasks: tuple[Task, ...], given: dict[str, HeadInput], savings: Savings = NO_SAVINGS
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """{task: its outputs}, as of apply_heads(), and {task: f32[]}, its mean loss, of heads that train."""

    def both(task: Task, given: HeadInput) -> tuple[jax.Array, jax.Array]:
        rows = given.rows._replace(labels={task.name: given.labels})
        outputs = _apply_head(task, given.params, given.encoded, rows, given.key, savings)
        return outputs, _mean_loss(task, outputs, given.labels, rows, given.labelled)

    of_tasks = each_task(both, tasks, given)
    return {name: outputs for name, (outputs, _) in of_tasks.items()}, {name: loss for name, (_, loss) in of_tasks.items()}


def _apply_head(task: Task, params: Any, encoded: Encoded, batch: Batch, key: jax.Array | None, savings: Savings) -> jax.Array:
    """The outputs of one head; a key means dropout."""
    with rematerialised(savings.remat):
        return task.apply(savings.head(task, params), encoded, batch, key)


def label_counts(tasks: tuple[Task, ...], batch: Batch) -> dict[str, jax.Array]:
    """{task: f32[]}: how many examples, or tokens, have a label."""

    def count(task: Task, labels: jax.Array) -> jax.Array:
        places = {"example": batch.index, "token": batch.tokens, "target": labels}[task.level].shape[:2]
        return task.loss(jnp.zeros((*places, task.outputs)), labels, batch)[1]

    return each_task(count, tasks, batch.labels)


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
    given = {task.name: (outputs[task.name], batch.labels[task.name], counts[task.name]) for task in tasks}
    return each_task(lambda task, given: _mean_loss(task, given[0], given[1], batch, given[2]), tasks, given)


@jax.named_scope("losses")
def _mean_loss(task: Task, outputs: jax.Array, labels: jax.Array, batch: Batch, count: jax.Array) -> jax.Array:
    return task.loss(outputs, labels, batch)[0] / jnp.maximum(count, 1.0)


# (task, Encoded, rows) -> the Encoded and rows that its head reads: with all labels of the task.
HeadInputs = Callable[[Task, Encoded, Batch], tuple[Encoded, Batch]]


def every_row(task: Task, encoded: Encoded, batch: Batch) -> tuple[Encoded, Batch]:
    """The head reads the whole batch."""
    return encoded, batch


@jax.named_scope("counts")
def count_rows(batch: Batch, sources: int) -> jax.Array:
    """i32[N, 3]: of each source its rows in a batch, their examples, their tokens."""
    of_source_RxN = batch.source[:, None] == jnp.arange(sources)
    examples_R, tokens_R = (batch.index >= 0).sum(axis=1), (batch.segments > 0).sum(axis=1)
    per_row_Rx3 = jnp.stack([jnp.ones_like(examples_R), examples_R, tokens_R], axis=1)
    return jnp.einsum("rn,rk->nk", of_source_RxN.astype(per_row_Rx3.dtype), per_row_Rx3)


def count_made(batch: Batch, sources: int) -> jax.Array | None:
    """i32[N, A + 1]: Batch.made, summed over the rows of each source; None where no source has augmentations."""
    if batch.made is None:
        return None
    of_source_RxN = batch.source[:, None] == jnp.arange(sources)
    return jnp.einsum("rn,ra->na", of_source_RxN.astype(batch.made.dtype), batch.made)
