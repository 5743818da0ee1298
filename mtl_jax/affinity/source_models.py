"""Models of sources: a finished run, or before training a head on the frozen trunk; and task embeddings.

A head is fitted to the sampled rows with the trunk's parameters fixed. This takes seconds, because the trunk runs once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.affinity.similarity import task_embedding
from mtl_jax.affinity.task_features import CLASSES, FIELDS, TrunkFunction, kind_of_labels, make_trunk
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.trees import leaves_of, put
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.data.examples import Examples
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.restore import open_finished
from mtl_jax.transfer.divergences import SOFTMAX
from mtl_jax.transfer.penalties import squared_gradients

HEAD_STEPS = 200
HEAD_RATE = 1e-2
FISHER_ROWS = 128  # examples of a task embedding
FISHER_BATCH = 16
RUNS = "--runs"


class SourceModel(NamedTuple):
    """A model of a source.

    Attributes:
        task: The source's task, with the label set of this model.
        trunk: The trunk up to its output.
        head: The parameters of the task's head.
        layer: The trunk up to the layer whose features are read.
    """

    task: Task
    trunk: TrunkFunction
    head: Any
    layer: TrunkFunction


def can_fit(task: Task) -> bool:
    """Whether a head of the task can be fitted to features of single texts.

    It reads nothing else, its labels are known in advance, and its loss does not compare texts with each other.
    """
    in_advance = not task.corrupts and task.label_level != "target"
    return set(task.needs) <= set(FIELDS) and in_advance and not task.compares_examples


def fit_head(task: Task, head: Any, batches: Sequence[Batch], outputs: Sequence[Encoded]) -> Any:
    """The parameters of a head after 200 steps of Adam on all rows at once, without dropout.

    Args:
        task: The task.
        head: Its initial parameters.
        batches: The rows, with labels.
        outputs: The trunk's output for each batch.
    """
    needed = [Encoded(**{field: getattr(output, field) for field in task.needs}) for output in outputs]
    stacked_batches, stacked_outputs = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (batches, needed))
    optimizer = optax.adam(HEAD_RATE)

    def mean_loss(head: Any, batches: Batch, outputs: Encoded) -> jax.Array:
        def of_batch(batch: Batch, output: Encoded) -> tuple[jax.Array, jax.Array]:
            return task.loss(task.apply(head, output, batch, None), batch.labels[task.name], batch)

        sums, counts = jax.lax.map(lambda pair: of_batch(*pair), (batches, outputs))
        return sums.sum() / jnp.maximum(counts.sum(), 1.0)

    @jax.jit
    def fit(head: Any, batches: Batch, outputs: Encoded) -> Any:
        def step(state: Any, _: None) -> tuple[Any, None]:
            head, moments = state
            updates, moments = optimizer.update(jax.grad(mean_loss)(head, batches, outputs), moments, head)
            return (optax.apply_updates(head, updates), moments), None

        return jax.lax.scan(step, (head, optimizer.init(head)), None, length=HEAD_STEPS)[0][0]

    return fit(jax.tree.map(jnp.asarray, head), stacked_batches, stacked_outputs)


def open_runs(workdirs: Sequence[str | Path], prepared: Prepared, layer: int) -> dict[str, SourceModel]:
    """{task: the model of a finished run}, for the tasks of the experiment that the runs have.

    Args:
        workdirs: Workdirs of finished runs.
        prepared: The experiment.
        layer: The layer whose features are read; 0: the trunk's output.

    Raises:
        UserError: A workdir is not that of a finished run, has none of the experiment's tasks, a task of an earlier workdir, or
            another tokenizer than the experiment's trunk.
    """
    names = [task.name for task in prepared.corpus.tasks]
    vocabulary = prepared.trunk.tokenizer.get_vocab()
    models: dict[str, SourceModel] = {}
    folders: dict[str, Path] = {}
    for folder in map(Path, workdirs):
        run = open_finished(folder, RUNS)
        common = [task for task in run.tasks if task.name in names]
        if not common:
            tasks = listed(task.name for task in run.tasks)
            raise UserError(f"{RUNS}: the run in {folder} has the tasks {tasks}; none of them is one of {listed(names)}")
        if run.trunk.tokenizer.get_vocab() != vocabulary:
            raise UserError(f"{RUNS}: the run in {folder} has another vocabulary than the trunk of the experiment")
        length = prepared.experiment.batch.row_length
        if length > run.trunk.max_length:
            raise UserError(
                f"{RUNS}: batch.row_length is {length}; the trunk of the run in {folder} takes {run.trunk.max_length} at most"
            )
        trunk = make_trunk(run.trunk.module, run.params["trunk"])
        at_layer = make_trunk(run.trunk.module, run.params["trunk"], layer) if layer else trunk
        for task in common:
            if task.name in folders:
                both = f"{folders[task.name]} and {folder}"
                raise UserError(f"{RUNS}: the runs in {both} both have the task {task.name!r}; name one of them")
            folders[task.name] = folder
            models[task.name] = SourceModel(task, trunk, run.params["heads"][task.name], at_layer)
    return models


def probabilities(model: SourceModel, batches: Sequence[Batch], outputs: Sequence[Encoded]) -> list[jax.Array]:
    """For each batch the model's probabilities of its classes, f32[R, S, O] or f32[R, T, O].

    Args:
        model: A model of a task with a softmax over classes.
        batches: Rows of any task.
        outputs: The output of the model's trunk for each batch.
    """
    return [
        jax.nn.softmax(model.task.apply(model.head, output, batch._replace(labels={}), None).astype(jnp.float32))
        for batch, output in zip(batches, outputs, strict=True)
    ]


def has_classes(task: Task) -> bool:
    """Whether a model of the task has probabilities of classes."""
    return task.compared_as == SOFTMAX and kind_of_labels(task) == CLASSES


def make_embed(trunk: TrunkFunction) -> Callable[[Task, Any, Examples, Batching], np.ndarray]:
    """A function from a task, its head's parameters, examples and the shape of batches to the task embedding f64[D].

    It is the diagonal of the Fisher information of the trunk's parameters, without its tables of embeddings: their information
    is in the words that occur, which vocabulary_overlap compares. Labels are those of the data, as in Vu et al., 2020,
    https://arxiv.org/abs/2005.00770. The gradient passes through the head first and then through the trunk, whose program is
    the same for all tasks.

    Args:
        trunk: The trunk up to its output.
    """
    leaves = leaves_of(trunk.params)
    paths = [path for path in leaves if not path.endswith("embedding")] or list(leaves)

    @jax.jit
    def squares(params: Any, batch: Batch, slopes: Encoded) -> Any:
        def log_likelihood(chosen: Any, row_and_slope: tuple[Batch, Encoded]) -> jax.Array:
            row, slope = jax.tree.map(lambda leaf: leaf[None], row_and_slope)
            output = trunk.encode(put(params, chosen), row)
            return sum((jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (output, slope)), strict=True)), jnp.zeros(()))

        return squared_gradients(log_likelihood, {path: leaves_of(params)[path] for path in paths}, (batch, slopes))

    def embed(task: Task, head: Any, examples: Examples, batching: Batching) -> np.ndarray:
        @jax.jit
        def slopes_of(output: Encoded, batch: Batch) -> Encoded:
            def log_likelihood(output: Encoded) -> jax.Array:
                return -task.loss(task.apply(head, output, batch, None), batch.labels[task.name], batch)[0]

            return jax.grad(log_likelihood)(output)

        single = dataclasses.replace(batching, packed=False, buckets=(), rows=FISHER_BATCH, accumulate=1)
        total = {path: np.zeros(leaves[path].shape, np.float32) for path in paths}
        for batch in eval_batches([examples], single, (task,)):
            unlabelled = batch._replace(labels={})
            slopes = slopes_of(trunk.encode(trunk.params, unlabelled), batch)
            total = jax.tree.map(jnp.add, total, squares(trunk.params, unlabelled, slopes))
        return task_embedding({path: np.asarray(leaf) / len(examples.tokens) for path, leaf in total.items()})

    return embed
