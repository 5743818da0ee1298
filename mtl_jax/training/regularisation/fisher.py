"""The Fisher information of a source's tasks, for EWC."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import trunks
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.trees import leaves_of, put
from mtl_jax.data import corpus, coverage
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch, fill
from mtl_jax.data.examples import Examples, read_examples
from mtl_jax.data.formats import script_rows
from mtl_jax.data.source_arrays import source_arrays
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.forward import apply_heads, encode_tokens, label_counts, needed_fields
from mtl_jax.training.restore import TrainedRun
from mtl_jax.transfer.divergences import SIGMOID, SOFTMAX
from mtl_jax.transfer.penalties import squared_gradients
from mtl_jax.transfer.regularisers import EWC, FIELD


def check_labels(regulariser: EWC, tasks: Sequence[Task]) -> None:
    """Raises UserError where the labels of a task cannot be drawn from the model.

    Args:
        regulariser: Says whether labels are drawn or the data's.
        tasks: The tasks of its source.
    """
    for task in tasks:
        if task.compares_examples:
            raise UserError(
                f"{FIELD}: {regulariser.name}: task {task.name!r} compares examples, and Fisher information is of single ones"
            )
        if regulariser.labels == "model" and not task.compared_as:
            raise UserError(
                f"{FIELD}: {regulariser.name}: labels of a {type(task).__name__} such as {task.name!r} cannot be drawn "
                "from the model; set labels to data"
            )


def diagonal(
    regulariser: EWC,
    module: Any,
    params: Any,
    tasks: Sequence[Task],
    examples: Examples,
    batching: Batching,
    paths: Collection[str],
    seed: int,
    place: int = 0,
) -> dict[str, np.ndarray]:
    """{path: f32}, the diagonal of the Fisher information: the mean over examples of the squared gradient.

    The gradient is that of an example's log-likelihood, minus the sum of its tasks' losses, without dropout. With the data's
    labels, the mean is over the examples that have any.

    Args:
        regulariser: Says how many examples, and whether labels are drawn or the data's.
        module: The trunk.
        params: The model.
        tasks: The tasks of the source.
        examples: Its training examples, with their labels.
        batching: Shape of the run's batches.
        paths: The parameters to differentiate by.
        seed: Decides which examples are used, and which labels are drawn.
        place: The source's place in the run's order.
    """
    tasks, encode = tuple(tasks), encode_tokens(module, needed_fields(tuple(tasks)))

    @jax.jit
    def add(total: Any, params: Any, batch: Batch, key: jax.Array) -> Any:
        leaves = leaves_of(params)

        def log_likelihood(chosen: Any, row_and_key: tuple[Batch, jax.Array]) -> jax.Array:
            row, key = jax.tree.map(lambda leaf: leaf[None], row_and_key[0]), row_and_key[1]
            model = put(params, chosen)
            encoded: Encoded = encode(model["trunk"], row, None, None)
            outputs = apply_heads(tasks, model["heads"], encoded, row, None)
            total = jnp.zeros(())
            for number, task in enumerate(tasks):
                labels = row.labels[task.name]
                if regulariser.labels == "model":
                    labels = draw(task, outputs[task.name], labels, row, jax.random.fold_in(key, number))
                total -= task.loss(outputs[task.name], labels, row)[0]
            return total

        keys = jax.random.split(key, len(batch.tokens))
        squares = squared_gradients(log_likelihood, {path: leaves[path] for path in paths}, (batch, keys))
        return jax.tree.map(jnp.add, total, squares)

    @jax.jit
    def labelled(batch: Batch) -> jax.Array:
        """i32[]: the rows that have a label of any task."""

        def count(row: Batch) -> jax.Array:
            return sum(label_counts(tasks, jax.tree.map(lambda leaf: leaf[None], row)).values(), jnp.zeros(()))

        return (jax.vmap(count)(batch) > 0).sum()

    leaves = leaves_of(params)
    total: Any = {path: jnp.zeros(leaves[path].shape, jnp.float32) for path in paths}
    count = 0
    for number, batch in enumerate(_batches(regulariser, tasks, examples, batching, seed, place)):
        total = add(total, params, batch, jax.random.fold_in(jax.random.key(seed), number))
        count += len(batch.tokens) if regulariser.labels == "model" else int(labelled(batch))
    return {path: np.asarray(leaf) / np.float32(max(count, 1)) for path, leaf in total.items()}


def draw(task: Task, outputs: jax.Array, labels: jax.Array, batch: Batch, key: jax.Array) -> jax.Array:
    """Labels drawn from the model's distribution; missing where there is no example, or no labelled word.

    A softmax and a sigmoid are distributions; a squared error is minus the log-likelihood of a normal one of variance 1/2. If
    sigmoids are the probabilities of being above each label but the last, as in Ordinal, one label is drawn of them all.

    Args:
        task: The task.
        outputs: Its outputs.
        labels: The data's labels, of the shape and dtype of the drawn ones.
        batch: The rows.
        key: A PRNG key.

    Raises:
        UserError: The drawn labels are of another shape than the data's.
    """
    outputs = jax.lax.stop_gradient(outputs.astype(jnp.float32))
    if task.compared_as == SOFTMAX:
        drawn = jax.random.categorical(key, outputs)
    elif task.compared_as == SIGMOID and labels.ndim == outputs.ndim:
        drawn = jax.random.bernoulli(key, jax.nn.sigmoid(outputs))
    elif task.compared_as == SIGMOID:
        above = jax.lax.cummin(jax.nn.sigmoid(outputs), axis=outputs.ndim - 1)
        drawn = (jax.random.uniform(key, (*outputs.shape[:-1], 1)) < above).sum(axis=-1)
    else:
        drawn = (outputs + jnp.sqrt(0.5) * jax.random.normal(key, outputs.shape))[..., 0] * task.scale  # type: ignore[attr-defined]
    if drawn.shape != labels.shape:
        raise UserError(
            f"{FIELD}: labels of a {type(task).__name__} such as {task.name!r} are of shape {labels.shape}, and those drawn "
            f"from the model of shape {drawn.shape}; set labels to data"
        )
    present = batch.index >= 0 if task.level == "example" else labels != task.missing
    return jnp.where(present.reshape(present.shape + (1,) * (labels.ndim - present.ndim)), drawn, task.missing).astype(
        labels.dtype
    )


def tasks_and_examples(run: TrainedRun, regulariser: EWC) -> tuple[list[Task], Examples]:
    """The tasks and training examples of a source of another run.

    Args:
        run: The run.
        regulariser: Names the source.

    Raises:
        UserError: Its rows cannot be read any more, or have a token that its trunk lacks.
    """
    tasks = [task for task in run.tasks if task.source == regulariser.source]
    declared = run.experiment.sources
    rows = corpus.read_sources(declared, tasks)[regulariser.source].rows["train"]
    source = next(source for source in declared if source.name == regulariser.source)
    length = run.experiment.batch.row_length
    examples = read_examples(source, tasks, rows, run.trunk.tokenizer, length, f"the run in {regulariser.run}").examples
    coverage.check([examples], tasks, run.trunk.tokenizer, trunks.tables(run.trunk))
    return tasks, examples


def check_source(run: TrainedRun, regulariser: EWC) -> None:
    """Raises UserError where a run has no task on the source, or its workdir does not say where the rows are."""
    sources = sorted({task.source for task in run.tasks})
    if regulariser.source not in sources:
        raise UserError(
            f"{FIELD}: source of {regulariser.name}: the run in {Path(regulariser.run)} has the sources {listed(sources)}, "
            f"not {regulariser.source!r}"
        )
    for source in run.experiment.sources:
        if source.name == regulariser.source:
            script_rows.check_present(source)


def _batches(
    regulariser: EWC, tasks: Sequence[Task], examples: Examples, batching: Batching, seed: int, place: int
) -> Iterator[Batch]:
    """Batches of randomly chosen examples, one in each row."""
    part = source_arrays(examples, tasks)
    single = dataclasses.replace(batching, packed=False, buckets=())
    rows = min(batching.rows, len(part))
    chosen = np.random.default_rng([seed, 7]).permutation(len(part))

    def generator_of(part: Any, ticket: int) -> np.random.Generator:
        return np.random.default_rng([seed, ticket])

    for number in range(min(regulariser.batches, len(part) // rows)):
        tickets = [(0, chosen[n : n + 1]) for n in range(number * rows, (number + 1) * rows)]
        batch = fill([part], tickets, tasks, single, rows, part.types is not None, generator_of)
        yield batch._replace(source=np.full_like(batch.source, place))
