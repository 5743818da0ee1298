"""Running a model over every example of a split, and what comes of it: features, outputs, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtl_jax.data.batches import Batch, Batching, eval_batches
from mtl_jax.data.examples import Examples
from mtl_jax.errors import unknown
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.step import Encode, apply_heads

# (params, batch, feature table or None) -> a tree of f32[R, S, ...]
Apply = Callable[[Any, Batch, jax.Array | None], Any]


def make_outputs(encode: Encode, tasks: tuple[Task, ...], mesh: Mesh) -> Apply:
    """Jitted: {task: outputs f32[R, S, O]} of a batch, on every host whole."""

    def outputs(params: Any, batch: Batch, table: jax.Array | None) -> dict[str, jax.Array]:
        return apply_heads(tasks, params["heads"], encode(params["trunk"], batch, None, table), None)

    return jax.jit(outputs, out_shardings=meshes.replicated(mesh))


def make_features(encode: Encode, mesh: Mesh) -> Apply:
    """Jitted: the trunk's pooled vectors f32[R, S, H] of a batch, on every host whole."""

    def features(params: Any, batch: Batch, table: jax.Array | None) -> jax.Array:
        return encode(params["trunk"], batch, None, table)

    return jax.jit(features, out_shardings=meshes.replicated(mesh))


def run(
    apply: Apply,
    params: Any,
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    *,
    table: jax.Array | None = None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Any:
    """Applies a function to every example once.

    The host packs the next batch while the device works on the last: results are read one batch late.

    Args:
        apply: make_outputs(...) or make_features(...).
        params: The model's parameters.
        examples: The examples, of any number of sources, in the order of their ids.
        batching: Shape of the batches.
        mesh: The devices.
        table: Feature table for a look-up encode.
        on_batch: Called with each host batch as it is sent off, for progress.

    Returns:
        The tree that `apply` returns, each leaf [N, ...] in the examples' order, N the number of examples.
    """
    ids_N = np.concatenate([part.first_id + np.arange(len(part.tokens)) for part in examples])
    results: list[np.ndarray] = []
    treedef = None
    for host_batch, output in _one_late(_dispatch(apply, params, table, examples, batching, mesh, on_batch)):
        leaves, treedef = jax.tree.flatten(output)
        if not results:
            results = [np.zeros((len(ids_N), *leaf.shape[2:]), np.float32) for leaf in leaves]
        taken = host_batch.index >= 0
        places = np.searchsorted(ids_N, host_batch.index[taken])
        for result, leaf in zip(results, leaves, strict=True):
            result[places] = np.asarray(leaf)[taken]
    assert treedef is not None, "no examples"
    return jax.tree.unflatten(treedef, results)


def _dispatch(
    apply: Apply,
    params: Any,
    table: jax.Array | None,
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    on_batch: Callable[[Batch], None],
) -> Iterable[tuple[Batch, Any]]:
    for batch in eval_batches(examples, batching):
        on_batch(batch)
        yield batch, apply(params, meshes.place(batch, meshes.by_rows(mesh)), table)


def _one_late(items: Iterable[Any]) -> Iterable[Any]:
    """The same items, each given out after the next has been made."""
    waiting: list[Any] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def score(tasks: Sequence[Task], split: dict[str, Examples], outputs: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """{task: {"loss": ..., metric: ...}} over the labelled examples of a split: exact, not a mean of batch means.

    Args:
        tasks: The tasks.
        split: {source: Examples}.
        outputs: {task: f32[N, O]} over all sources' examples in order, as run() returns it.
    """
    scores = {}
    at = 0
    for source, examples in split.items():
        for task in (task for task in tasks if task.source == source):
            labels_N = examples.labels[task.name]
            outputs_NxO = outputs[task.name][at : at + len(labels_N)]
            scores[task.name] = score_one(task, outputs_NxO, labels_N)
        at += len(examples.tokens)
    return {task.name: scores[task.name] for task in tasks}


def score_one(task: Task, outputs_NxO: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """Loss and metrics of one task; examples without a label are left out."""
    known_N = ~np.isnan(labels_N) if np.isnan(task.missing) else labels_N != task.missing
    outputs_NxO, labels_N = outputs_NxO[known_N], labels_N[known_N]
    total, count = task.loss(jnp.asarray(outputs_NxO)[None], jnp.asarray(labels_N)[None])
    return {"loss": float(total) / max(float(count), 1.0), **task.metrics(outputs_NxO, labels_N)}


def criterion(name: str, tasks: Sequence[Task], scores: dict[str, dict[str, float]]) -> float:
    """The one number by which checkpoints are compared; higher is better.

    Args:
        name: "mean": mean over tasks of each task's own metric. "TASK": that task's metric. "TASK/METRIC": as it says.
        tasks: The tasks.
        scores: What score() returned.
    """
    metrics = {task.name: task.metric for task in tasks}
    if name == "mean":
        return float(np.mean([scores[task][metric] for task, metric in metrics.items()]))
    task, _, metric = name.partition("/")
    return scores[task][metric or metrics[task]]


def check_criterion(name: str, tasks: Sequence[Task]) -> None:
    """Raises UserError where a criterion names no task of the run, or a metric that its task does not have."""
    choices = ["mean", *(task.name for task in tasks)]
    choices += [f"{task.name}/{metric}" for task in tasks for metric in task.metric_names]
    if name not in choices:
        raise unknown("evaluation.criterion", name, choices)
