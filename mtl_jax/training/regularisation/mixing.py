"""The losses of Mix and NeighbourSmoothing in a step, and the pass of Mix within the trunk.

Random numbers come by the step's references: a transform puts the key of the step there.

Shapes in names: R rows, T tokens a row, S examples a row, H trunk width, N = R * S.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.augment.mixes import Mix, NeighbourSmoothing, has_label, mixed, mixed_tokens, nearest, partners, soft_loss
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count
from mtl_jax.data.batches import Batch
from mtl_jax.models import traced
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.batch_parts import in_parts, part_key, sum_over_parts
from mtl_jax.training.forward import Encode
from mtl_jax.training.gradient import Backward, BackwardFn, GradientFn, StepGradients, Weights
from mtl_jax.training.regularisation.output_losses import LossContext, OutputLoss
from mtl_jax.training.train_state import StepInputs, TrainState
from mtl_jax.transfer.regularisers import FIELD, Regulariser
from mtl_jax.trunks import Trunk

KEY = "mix-key"  # among the references of a step: key data u32[2]


def with_key(gradient_fn: GradientFn) -> GradientFn:
    """The step with a PRNG key of its own for mixing, among the references."""

    def keyed(trained: Any, frozen: Any, inputs: StepInputs, state: TrainState) -> StepGradients:
        key = jax.random.fold_in(state.step_key(), zlib.crc32(b"mix"))  # not a small number: split() uses these
        references = {**(inputs.references or {}), KEY: jax.random.key_data(key)}
        return gradient_fn(trained, frozen, inputs._replace(references=references), state)

    return keyed


def tasks_of(regulariser: Regulariser, tasks: Sequence[Task]) -> list[Task]:
    """The tasks of a Mix or NeighbourSmoothing: those that it names, or all with a label for each text alone.

    These are the kinds whose outputs for a text can be compared (Task.compared_as): a label of a group of texts, such as the
    choice of one, is not that of a text.

    Raises:
        UserError: One that it names has other labels, or there is none.
    """
    assert isinstance(regulariser, Mix | NeighbourSmoothing)
    fitting = [task for task in tasks if task.level == "example" and task.compared_as]
    for task in tasks:
        if task.name in regulariser.tasks and task not in fitting:
            raise UserError(
                f"{FIELD}: {regulariser.name} mixes labels of texts, and task {task.name!r}, a {type(task).__name__}, has none"
            )
    chosen = [task for task in fitting if task.name in regulariser.tasks or not regulariser.tasks]
    if not chosen:
        raise UserError(
            f"{FIELD}: {regulariser.name}: no task has a label for each text, as classification and regression have"
        )
    return chosen


def check_layer(regulariser: Mix, trunk: Trunk) -> None:
    """Raises UserError where a trunk has no layer whose input a Mix could change."""
    if not regulariser.own_pass:
        return
    module: Any = getattr(trunk.module, "base", trunk.module)
    layers = sum(bool(call.path) and _is_layer(call.path[-1]) for call in traced.calls(module))
    if regulariser.layer >= layers:
        raise UserError(
            f"{FIELD}: {regulariser.name} mixes in front of layer {regulariser.layer + 1}, but the trunk has "
            f"{count(layers, 'layer')}; {'choose a smaller layer' if layers else 'choose at pooled'}"
        )


def groups(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """i32[N], a number for each source, and another for empty places; and bool[N], which are examples."""
    present_RxS = batch.index >= 0
    group_RxS = jnp.where(present_RxS, batch.source[:, None] + 1, 0)
    return group_RxS.reshape(-1), present_RxS.reshape(-1)


def _labels(task: Task, batch: Batch) -> jax.Array:
    labels: jax.Array = batch.labels[task.name]
    return labels.reshape(-1, *labels.shape[2:])


def _counts(tasks: Sequence[Task], batch: Batch) -> dict[str, jax.Array]:
    return {task.name: jnp.maximum(has_label(task, _labels(task, batch)).sum(), 1) for task in tasks}


def _draw(regulariser: Mix, key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The partner of each example i32[N], and the weight of the example itself f32[]."""
    mix_key = jax.random.fold_in(key, zlib.crc32(regulariser.name.encode()))
    partner_key, weight_key = jax.random.split(mix_key)
    return partners(partner_key, groups(batch)[0]), jax.random.beta(weight_key, regulariser.alpha, regulariser.alpha)


def pooled_loss(regulariser: Mix, tasks: Sequence[Task], context: LossContext) -> OutputLoss:
    """The loss of a Mix of the vectors of texts, of the same forward pass."""
    tasks = tasks_of(regulariser, tasks)

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        partner_N, weight = _draw(regulariser, jax.random.wrap_key_data(references[KEY]), batch)

        def mix(vectors: jax.Array) -> jax.Array:
            vectors_NxH = vectors.reshape(-1, vectors.shape[-1])
            return mixed(vectors_NxH, partner_N, weight).reshape(vectors.shape)

        def between(task: str) -> Encoded:
            read = encoded.read_by(task)
            fields: dict[str, Any] = {field: mix(vectors) for field, vectors in read.of_texts.items()}
            return read._replace(**fields)

        return _of_heads(tasks, heads, between, batch, counts, partner_N, weight, None)

    return OutputLoss(lambda batch: _counts(tasks, batch), loss)


def _of_heads(
    tasks: Sequence[Task],
    heads: Any,
    read_by: Callable[[str], Encoded],
    batch: Batch,
    counts: Any,
    partner_N: jax.Array,
    weight: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    """The sum over tasks of the mean losses of the mixed vectors that their heads read."""
    total = jnp.zeros(())
    for number, task in enumerate(tasks):
        task_key = None if key is None else jax.random.fold_in(key, number)
        outputs = task.apply(heads[task.name], read_by(task.name), batch, task_key)
        total += soft_loss(task, outputs, _labels(task, batch), partner_N, weight, batch) / counts[task.name]
    return total


def neighbour_loss(regulariser: NeighbourSmoothing, tasks: Sequence[Task], context: LossContext) -> OutputLoss:
    """The loss of a NeighbourSmoothing."""
    tasks = tasks_of(regulariser, tasks)

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        total = jnp.zeros(())
        for task in tasks:
            vectors = jax.lax.stop_gradient(encoded.read_by(task.name).of_texts[task.text_vector])
            vectors_NxH = vectors.reshape(-1, vectors.shape[-1])
            labels_Nx = _labels(task, batch)
            group_N, present_N = groups(batch)
            has_N = has_label(task, labels_Nx) & present_N
            k = min(regulariser.neighbours, len(group_N) - 1)
            index_Nxk, exists_Nxk = nearest(vectors_NxH, group_N, has_N, k)
            for n in range(k):
                # An example without this neighbour keeps its own label: then the two lists of labels are the same there.
                partner_N = jnp.where(exists_Nxk[:, n], index_Nxk[:, n], jnp.arange(len(group_N)))
                total += soft_loss(task, outputs[task.name], labels_Nx, partner_N, jnp.zeros(()), batch) / (
                    k * counts[task.name]
                )
        return total

    return OutputLoss(lambda batch: _counts(tasks, batch), loss)


def within_trunk(regulariser: Mix, tasks: Sequence[Task], encode: Encode, *, trains_trunk: bool, accumulate: int) -> BackwardFn:
    """A second pass through the trunk in which token vectors are mixed, for gradient.beside().

    Args:
        regulariser: A Mix of embeddings or hidden vectors.
        tasks: Its tasks.
        encode: encode_tokens(trunk, needs).
        trains_trunk: As in gradient.make_backward(); so is accumulate.
        accumulate: The number of parts of a batch.
    """

    def backward(trained: Any, frozen: Any, inputs: StepInputs, keys: tuple[jax.Array, jax.Array]) -> Backward:
        step_key = jax.random.wrap_key_data(inputs.references[KEY])
        counts = _counts(tasks, inputs.batch)

        def loss(trained: Any, part: Batch, number: Any) -> jax.Array:
            params = trees.merge(trained, frozen)
            key = part_key(step_key, number, accumulate)
            partner_N, weight = _draw(regulariser, key, part)
            dropout, head_key = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"dropout")))
            with nn.intercept_methods(_mixing(regulariser.layer, part, partner_N, weight)):
                encoded = encode(params["trunk"], part, dropout if trains_trunk else None, None)
            return _of_heads(tasks, params["heads"], encoded.read_by, part, counts, partner_N, weight, head_key)

        def pull(weights: Weights, rows: Any, of_heads: Weights | None) -> tuple[Any, dict[str, jax.Array]]:
            def part_gradient(part: Batch, number: Any) -> tuple[Any, dict[str, jax.Array]]:
                value, gradient = jax.value_and_grad(loss)(trained, part, number)
                scaled = jax.tree.map(lambda leaf: weights[regulariser.name] * leaf, gradient)
                return scaled, {regulariser.name: value}

            if accumulate == 1:
                return part_gradient(inputs.batch, 0)
            summed: tuple[Any, dict[str, jax.Array]] = sum_over_parts(part_gradient, in_parts(inputs.batch, accumulate))
            return summed

        return Backward({}, {}, pull)

    return backward


def _mixing(depth: int, batch: Batch, partner_N: jax.Array, weight: jax.Array) -> Callable[..., Any]:
    """An interceptor of linen calls that mixes the token vectors in front of a layer, from 0.

    Layers are counted by their calls: one that is called at several depths counts at each, one inside of a layer does not.
    """
    depths, inside = itertools.count(), list[str]()

    def mix(hidden: jax.Array) -> jax.Array:
        """A sharing may have made copies of the rows, one after another, and an adapter put a prompt in front of them."""
        R, T = batch.segments.shape

        def of_copy(hidden_RxPxH: jax.Array) -> jax.Array:
            prompt, hidden_RxTxH = jnp.split(hidden_RxPxH, [hidden_RxPxH.shape[1] - T], axis=1)
            between_RxTxH = mixed_tokens(hidden_RxTxH, batch.segments, batch.positions, partner_N, weight)
            return jnp.concatenate([prompt, between_RxTxH], axis=1)

        return jax.vmap(of_copy, in_axes=1, out_axes=1)(hidden.reshape(R, -1, *hidden.shape[1:])).reshape(hidden.shape)

    def intercept(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if inside or context.method_name != "__call__" or not _is_layer(context.module.name):
            return next_call(*args, **kwargs)
        if next(depths) == depth:
            args = (mix(args[0]), *args[1:])
        inside.append(context.module.name)
        try:
            return next_call(*args, **kwargs)
        finally:
            inside.pop()

    return intercept


def _is_layer(name: str | None) -> bool:
    return re.fullmatch(r"layer_\d+", name or "") is not None
