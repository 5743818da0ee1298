"""Evaluation: a model applied to every example of a split, its features or outputs, their metrics, and the criterion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mtl_jax.core.errors import unknown
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.data.examples import Examples
from mtl_jax.models.traced import remembered
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import NO_SAVINGS, Encode, Savings, apply_heads

# (params, batch, feature table or None) -> the model's output for the batch
Apply = Callable[[Any, Batch, jax.Array | None], Any]

NO_BATCH = Batch(None, None, None, None, None, {})  # for losses of examples, which read outputs and labels only


class Outputs(NamedTuple):
    """Outputs and losses of the heads on a batch.

    Attributes:
        outputs: {task: f32[R, S, O], f32[R, T, O] or f32[R, U, O], by level}.
        sums: {task: (sum of losses, number of labels)} where the batch has labels, else {}.
    """

    outputs: dict[str, jax.Array]
    sums: dict[str, tuple[jax.Array, jax.Array]]


class Predictions(NamedTuple):
    """Outputs and losses of the heads on the examples of several sources.

    Attributes:
        outputs: {task: for the N examples of its source f32[N, O], or a list of f32[len, O]}.
        losses: {task: mean loss}; empty where the examples have no labels.
    """

    outputs: dict[str, Any]
    losses: dict[str, float]


def make_outputs(encode: Encode, tasks: tuple[Task, ...], mesh: Mesh, over: Any = None, savings: Savings = NO_SAVINGS) -> Apply:
    """A jitted function to the Outputs of a batch, replicated on every device.

    Args:
        encode: From a batch to the inputs of the heads.
        tasks: The tasks.
        mesh: The devices.
        over: For several runs at once: the axes over runs of parameters, batch and table, as jax.vmap's in_axes.
        savings: How the heads save memory.
    """

    def outputs(params: Any, batch: Batch, table: jax.Array | None) -> Outputs:
        encoded = encode(params["trunk"], batch, None, table)
        of_heads = apply_heads(tasks, params["heads"], encoded, batch, None, savings)
        labelled = [task for task in tasks if task.name in batch.labels]
        sums = {task.name: task.loss(of_heads[task.name], batch.labels[task.name], batch) for task in labelled}
        return Outputs(of_heads, sums)

    return jax.jit(outputs if over is None else jax.vmap(outputs, in_axes=over), out_shardings=meshes.replicated(mesh))


def make_features(encode: Encode, mesh: Mesh) -> Apply:
    """A jitted function to the vectors f32[R, S, H] of a batch's texts, replicated on every device.

    Args:
        encode: Gives one vector for each text.
        mesh: The devices.
    """

    def features(params: Any, batch: Batch, table: jax.Array | None) -> jax.Array:
        encoded = encode(params["trunk"], batch, None, table)
        (vectors,) = encoded.of_texts.values()
        return vectors[:, 0] if encoded.copies.of else vectors  # before training all copies are the same

    return jax.jit(features, out_shardings=meshes.replicated(mesh))


def features(
    apply: Apply,
    params: Any,
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> np.ndarray:
    """f32[N, H], the trunk's vector of every example, in the examples' order.

    Args:
        apply: make_features(...).
        params: The model's parameters.
        examples: The examples, of any number of sources, in the order of their ids.
        batching: Shape of the batches.
        mesh: The devices.
        on_batch: Called with each host batch before it is sent to the devices, for progress.
    """
    ids_N = np.concatenate([part.first_id + np.arange(len(part.tokens)) for part in examples])
    table_NxH = np.zeros((0, 0), np.float32)
    for batch, pooled in outputs_of_batches(apply, params, None, eval_batches(examples, batching), mesh, on_batch):
        if not len(table_NxH):
            table_NxH = np.zeros((len(ids_N), pooled.shape[-1]), np.float32)
        is_example = batch.index >= 0
        table_NxH[np.searchsorted(ids_N, batch.index[is_example])] = np.asarray(pooled)[is_example]
    return table_NxH


def predict(
    apply: Apply,
    params: Any,
    tasks: Sequence[Task],
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    *,
    table: jax.Array | None = None,
) -> Predictions:
    """Every task's outputs on every example of its source.

    Args:
        apply: make_outputs(...).
        params: The model's parameters.
        tasks: The tasks that make_outputs was given.
        examples: The examples, of any number of sources; with labels of all of these tasks, or of none.
        batching: Shape of the batches.
        mesh: The devices.
        table: The features, where the encode of make_outputs is cached_features.
    """
    return _predict(apply, params, tasks, examples, batching, mesh, table, 1, lambda host: [host])[0]


def predict_runs(
    apply: Apply,
    params: Any,
    tasks: Sequence[Task],
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    count: int,
    *,
    table: jax.Array | None = None,
) -> list[Predictions]:
    """As predict(), of several runs at once.

    Args:
        apply: make_outputs(...) with `over`: its outputs have a leading axis over runs.
        params: Parameters of all runs.
        tasks: As for predict; so are examples, batching, mesh and table.
        count: The number of runs.
    """

    def split_runs(outputs: Outputs) -> list[Outputs]:
        return [jax.tree.map(lambda leaf, n=n: leaf[n], outputs) for n in range(count)]

    return _predict(apply, params, tasks, examples, batching, mesh, table, count, split_runs)


def _predict(
    apply: Apply,
    params: Any,
    tasks: Sequence[Task],
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    table: jax.Array | None,
    count: int,
    split_runs: Callable[[Outputs], list[Outputs]],
) -> list[Predictions]:
    """The Predictions of each of `count` runs; `split_runs` gives the Outputs of each run."""
    tasks_of = {part.source: [task for task in tasks if task.source == part.source] for part in examples}
    first_ids = np.array([part.first_id for part in examples])
    predictions = [_blank(examples, tasks_of) for _ in range(count)]
    sums = [{task.name: np.zeros(2) for task in tasks} for _ in predictions]
    has_labels = all(task.name in part.labels for part in examples for task in tasks_of[part.source])
    batches = eval_batches(examples, batching, tasks if has_labels else ())
    for batch, output in outputs_of_batches(apply, params, table, batches, mesh):
        by_run = split_runs(jax.device_get(output))
        for run, run_sums in zip(by_run, sums, strict=True):
            for name, sum_and_count in run.sums.items():
                run_sums[name] += sum_and_count
        rows, slots = np.nonzero(batch.index >= 0)
        ids = batch.index[rows, slots]
        order = np.argsort(ids)
        edges = np.searchsorted(ids[order], [*first_ids, np.iinfo(np.int32).max])
        for number, part in enumerate(examples):
            chosen = order[edges[number] : edges[number + 1]]
            for task in tasks_of[part.source] if len(chosen) else ():
                if task.level == "example":
                    for run, predicted in zip(by_run, predictions, strict=True):
                        outputs = run.outputs[task.name]
                        predicted.outputs[task.name][ids[chosen] - part.first_id] = outputs[rows[chosen], slots[chosen]]
                    continue
                segments = batch.segments if task.level == "token" else batch.labels[task.name][..., 1]
                for n in chosen:
                    in_example = segments[rows[n]] == slots[n] + 1
                    for run, predicted in zip(by_run, predictions, strict=True):
                        outputs = run.outputs[task.name][rows[n]][in_example]
                        predicted.outputs[task.name][ids[n] - part.first_id] = np.asarray(outputs, np.float32)
    for predicted, run_sums in zip(predictions, sums, strict=True) if has_labels else ():
        predicted.losses.update({name: float(total / max(count, 1.0)) for name, (total, count) in run_sums.items()})
    return predictions


def _blank(examples: Sequence[Examples], tasks_of: Mapping[str, Sequence[Task]]) -> Predictions:
    outputs: dict[str, Any] = {}
    for part in examples:
        for task in tasks_of[part.source]:
            count = len(part.tokens)
            outputs[task.name] = np.zeros((count, task.outputs), np.float32) if task.level == "example" else [None] * count
    return Predictions(outputs, {})


def outputs_of_batches(
    apply: Apply,
    params: Any,
    table: jax.Array | None,
    batches: Iterable[Batch],
    mesh: Mesh,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Iterator[tuple[Batch, Any]]:
    """(host batch, its output on the devices), yielded one batch late: the host packs a batch while the devices compute.

    Args:
        apply: The function.
        params: The model's parameters.
        table: The features, where it reads them.
        batches: Host batches.
        mesh: The devices.
        on_batch: Called with each host batch before it is sent to the devices.
    """
    sent: list[tuple[Batch, Any]] = []
    for batch in batches:
        on_batch(batch)
        output = apply(params, meshes.place(batch, meshes.by_rows(mesh)), table)
        yield from sent
        sent = [(batch, output)]
    yield from sent


def score(
    tasks: Sequence[Task],
    split: dict[str, Examples],
    predictions: Predictions,
    texts: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    """{task: {"loss": ..., metric: ...}} over the labelled examples of a split: exact, not a mean of batch means.

    Args:
        tasks: The tasks.
        split: {source: Examples}.
        predictions: predict(...) of these.
        texts: {task: {metric: value}} of generated texts, for the tasks that decode.
    """
    return {
        task.name: {
            "loss": predictions.losses[task.name],
            **task.all_metrics(predictions.outputs[task.name], split[task.source]),
            **texts.get(task.name, {}),
        }
        for task in tasks
    }


def score_outputs(task: Task, outputs_NxO: np.ndarray, examples: Examples) -> dict[str, float]:
    """As score(), of one task, for outputs f32[N, O] that are not a network's, such as a baseline's."""
    scores = task.all_metrics(outputs_NxO, examples)
    if task.level == "example":
        total, count = _loss(task)(outputs_NxO[None], examples.labels[task.name][None])
        scores = {"loss": float(total) / max(float(count), 1.0), **scores}
    return scores


@remembered
def _loss(task: Task) -> Callable[[np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]:
    """The task's loss as one program: compiling each of its operations takes seconds at the start of a run of many tasks."""
    return jax.jit(lambda outputs_1xNxO, labels_1xN: task.loss(outputs_1xNxO, labels_1xN, NO_BATCH))


def criterion(name: str, tasks: Sequence[Task], scores: dict[str, dict[str, float]]) -> float:
    """The number by which checkpoints are compared; higher is better. A checkpoint with NaN is never the best.

    A metric that is not defined, as the correlation of constant predictions, counts as 0; undefined() names its task. Where the
    task's loss is not finite either, the criterion is NaN.

    Args:
        name: "mean": the mean over tasks of each task's metric. "TASK": that task's metric. "TASK/METRIC": that metric.
        tasks: The tasks.
        scores: What score() returned.
    """
    metrics = {task.name: task.metric for task in tasks}

    def value(task: str, metric: str) -> float:
        finite_loss = math.isfinite(scores[task].get("loss", 0.0))
        return 0.0 if finite_loss and math.isnan(scores[task][metric]) else scores[task][metric]

    if name == "mean":
        return float(np.mean([value(task, metric) for task, metric in metrics.items()]))
    task, _, metric = name.partition("/")
    return value(task, metric or metrics[task])


def undefined(tasks: Sequence[Task], scores: Mapping[str, Mapping[str, float]], split: str) -> dict[str, str]:
    """{task: a line about it} for the tasks whose metric is NaN."""
    problem = "is not defined (its predictions or labels are constant, or not finite)"
    tasks = [task for task in tasks if math.isnan(scores[task.name][task.metric])]
    return {task.name: f"{split} {task.metric} of task {task.name!r} {problem}" for task in tasks}


def for_json(tree: Any) -> Any:
    """Nested dicts of numbers with None, JSON's null, in place of NaN and the infinities, which JSON lacks."""
    if isinstance(tree, Mapping):
        return {key: for_json(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def check_criterion(name: str, tasks: Sequence[Task]) -> None:
    """Raises UserError where a criterion names a task that the run lacks, or a metric that the task lacks."""
    choices = ["mean", *(task.name for task in tasks)]
    choices += [f"{task.name}/{metric}" for task in tasks for metric in (*task.metric_names, *task.registered_metrics)]
    if name not in choices:
        raise unknown("evaluation.criterion", name, choices)
