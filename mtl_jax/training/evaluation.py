"""Running a model over every example of a split, and what comes of it: features, outputs, metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtl_jax.core.errors import unknown
from mtl_jax.data.batches import Batch, Batching, eval_batches
from mtl_jax.data.examples import Examples
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import Encode, apply_heads

# (params, batch, feature table or None) -> what the device makes of a batch
Apply = Callable[[Any, Batch, jax.Array | None], Any]


class Outputs(NamedTuple):
    """What the heads make of a batch.

    Attributes:
        outputs: {task: f32[R, S, O], f32[R, T, O] or f32[R, U, O], by level}.
        sums: {task: (sum of losses, number of labels)} where the batch has labels, else {}.
    """

    outputs: dict[str, jax.Array]
    sums: dict[str, tuple[jax.Array, jax.Array]]


class Found(NamedTuple):
    """What the heads make of the examples of several sources.

    Attributes:
        outputs: {task: for the N examples of its source f32[N, O], or a list of f32[len, O]}.
        losses: {task: mean loss}; empty where the examples have no labels.
    """

    outputs: dict[str, Any]
    losses: dict[str, float]


def make_outputs(encode: Encode, tasks: tuple[Task, ...], mesh: Mesh, over: Any = None) -> Apply:
    """Jitted: Outputs of a batch, on every host whole.

    Args:
        encode: What the heads see of a batch.
        tasks: The tasks.
        mesh: The devices.
        over: For several runs at once: the axes over runs of parameters, batch and table, as jax.vmap takes them.
    """

    def outputs(params: Any, batch: Batch, table: jax.Array | None) -> Outputs:
        found = apply_heads(tasks, params["heads"], encode(params["trunk"], batch, None, table), batch, None)
        known = [task for task in tasks if task.name in batch.labels]
        sums = {task.name: task.loss(found[task.name], batch.labels[task.name], batch) for task in known}
        return Outputs(found, sums)

    return jax.jit(outputs if over is None else jax.vmap(outputs, in_axes=over), out_shardings=meshes.replicated(mesh))


def make_features(encode: Encode, mesh: Mesh) -> Apply:
    """Jitted: the trunk's pooled vectors f32[R, S, H] of a batch, on every host whole."""

    def features(params: Any, batch: Batch, table: jax.Array | None) -> jax.Array:
        pooled = encode(params["trunk"], batch, None, table).pooled
        assert pooled is not None
        return pooled

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
        on_batch: Called with each host batch as it is sent off, for progress.
    """
    ids_N = np.concatenate([part.first_id + np.arange(len(part.tokens)) for part in examples])
    table_NxH = np.zeros((0, 0), np.float32)
    for batch, pooled in _each(apply, params, None, eval_batches(examples, batching), mesh, on_batch):
        if not len(table_NxH):
            table_NxH = np.zeros((len(ids_N), pooled.shape[-1]), np.float32)
        taken = batch.index >= 0
        table_NxH[np.searchsorted(ids_N, batch.index[taken])] = np.asarray(pooled)[taken]
    return table_NxH


def run(
    apply: Apply,
    params: Any,
    tasks: Sequence[Task],
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    *,
    table: jax.Array | None = None,
) -> Found:
    """Every task's outputs on every example of its source.

    Args:
        apply: make_outputs(...).
        params: The model's parameters.
        tasks: The tasks that make_outputs was given.
        examples: The examples, of any number of sources; with labels of all of these tasks, or of none.
        batching: Shape of the batches.
        mesh: The devices.
        table: Feature table for a look-up encode.
    """
    return _found(apply, params, tasks, examples, batching, mesh, table, 1, lambda host: [host])[0]


def run_each(
    apply: Apply,
    params: Any,
    tasks: Sequence[Task],
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    count: int,
    *,
    table: jax.Array | None = None,
) -> list[Found]:
    """The same of several runs at once.

    Args:
        apply: make_outputs(...) under vmap: whatever it returns has an axis over runs in front.
        params: Parameters of all of them.
        tasks: As for run; so are examples, batching, mesh and table.
        count: How many runs.
    """

    def apart(host: Outputs) -> list[Outputs]:
        return [jax.tree.map(lambda leaf, n=n: leaf[n], host) for n in range(count)]

    return _found(apply, params, tasks, examples, batching, mesh, table, count, apart)


def _found(
    apply: Apply,
    params: Any,
    tasks: Sequence[Task],
    examples: Sequence[Examples],
    batching: Batching,
    mesh: Mesh,
    table: jax.Array | None,
    count: int,
    apart: Callable[[Outputs], list[Outputs]],
) -> list[Found]:
    """Found of each of `count` runs; `apart` divides what the devices made of a batch among them."""
    own = {part.source: [task for task in tasks if task.source == part.source] for part in examples}
    first_ids = np.array([part.first_id for part in examples])
    runs = [_blank(examples, own) for _ in range(count)]
    sums = [{task.name: np.zeros(2) for task in tasks} for _ in runs]
    has_labels = all(task.name in part.labels for part in examples for task in own[part.source])
    batches = eval_batches(examples, batching, tasks if has_labels else ())
    for batch, output in _each(apply, params, table, batches, mesh):
        hosts = apart(jax.device_get(output))
        for host, own_sums in zip(hosts, sums, strict=True):
            for name, sum_and_count in host.sums.items():
                own_sums[name] += sum_and_count
        rows, slots = np.nonzero(batch.index >= 0)
        ids = batch.index[rows, slots]
        order = np.argsort(ids)
        edges = np.searchsorted(ids[order], [*first_ids, np.iinfo(np.int32).max])
        for number, part in enumerate(examples):
            chosen = order[edges[number] : edges[number + 1]]
            for task in own[part.source] if len(chosen) else ():
                if task.level == "example":
                    for host, found in zip(hosts, runs, strict=True):
                        outputs = host.outputs[task.name]
                        found.outputs[task.name][ids[chosen] - part.first_id] = outputs[rows[chosen], slots[chosen]]
                    continue
                segments = batch.segments if task.level == "token" else batch.labels[task.name][..., 1]
                for n in chosen:
                    mine = segments[rows[n]] == slots[n] + 1
                    for host, found in zip(hosts, runs, strict=True):
                        outputs = host.outputs[task.name]
                        found.outputs[task.name][ids[n] - part.first_id] = np.asarray(outputs[rows[n]][mine], np.float32)
    for found, own_sums in zip(runs, sums, strict=True) if has_labels else ():
        found.losses.update({name: float(total / max(count, 1.0)) for name, (total, count) in own_sums.items()})
    return runs


def _blank(examples: Sequence[Examples], own: Mapping[str, Sequence[Task]]) -> Found:
    found: dict[str, Any] = {}
    for part in examples:
        for task in own[part.source]:
            count = len(part.tokens)
            found[task.name] = np.zeros((count, task.outputs), np.float32) if task.level == "example" else [None] * count
    return Found(found, {})


def _each(
    apply: Apply,
    params: Any,
    table: jax.Array | None,
    batches: Iterable[Batch],
    mesh: Mesh,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Iterator[tuple[Batch, Any]]:
    """Host batches and what the device makes of them, each given out after the next was sent off: the host packs the next
    batch while the device works on the last."""
    waiting: list[tuple[Batch, Any]] = []
    for batch in batches:
        on_batch(batch)
        output = apply(params, meshes.place(batch, meshes.by_rows(mesh)), table)
        yield from waiting
        waiting = [(batch, output)]
    yield from waiting


def score(
    tasks: Sequence[Task],
    split: dict[str, Examples],
    found: Found,
    texts: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    """{task: {"loss": ..., metric: ...}} over the labelled examples of a split: exact, not a mean of batch means.

    Args:
        tasks: The tasks.
        split: {source: Examples}.
        found: run(...) of these.
        texts: {task: {metric: value}} of generated texts, for the tasks that decode.
    """
    return {
        task.name: {
            "loss": found.losses[task.name],
            **task.metrics(found.outputs[task.name], split[task.source]),
            **texts.get(task.name, {}),
        }
        for task in tasks
    }


def score_fixed(task: Task, outputs_NxO: np.ndarray, examples: Examples) -> dict[str, float]:
    """The same of one task for outputs that no network gave."""
    scores = task.metrics(outputs_NxO, examples)
    if task.level == "example":
        total, count = task.loss(jnp.asarray(outputs_NxO)[None], jnp.asarray(examples.labels[task.name])[None], NO_BATCH)
        scores = {"loss": float(total) / max(float(count), 1.0), **scores}
    return scores


# For losses of examples, which look at outputs and labels only.
NO_BATCH = Batch(None, None, None, None, None, {})


def criterion(name: str, tasks: Sequence[Task], scores: dict[str, dict[str, float]]) -> float:
    """The one number by which checkpoints are compared; higher is better. NaN: such a checkpoint is never the best.

    A metric that is not defined, as the correlation of constant predictions, counts as 0; undefined() names its task. Where the
    loss is not finite either, the criterion is NaN.

    Args:
        name: "mean": mean over tasks of each task's own metric. "TASK": that task's metric. "TASK/METRIC": as it says.
        tasks: The tasks.
        scores: What score() returned.
    """
    metrics = {task.name: task.metric for task in tasks}

    def value(task: str, metric: str) -> float:
        sound = math.isfinite(scores[task].get("loss", 0.0))
        return 0.0 if sound and math.isnan(scores[task][metric]) else scores[task][metric]

    if name == "mean":
        return float(np.mean([value(task, metric) for task, metric in metrics.items()]))
    task, _, metric = name.partition("/")
    return value(task, metric or metrics[task])


def undefined(tasks: Sequence[Task], scores: Mapping[str, Mapping[str, float]], split: str) -> dict[str, str]:
    """{task: a line that says so} of the tasks whose own metric is NaN."""
    why = "is not defined (its predictions or labels are constant, or not finite)"
    found = [task for task in tasks if math.isnan(scores[task.name][task.metric])]
    return {task.name: f"{split} {task.metric} of task {task.name!r} {why}" for task in found}


def for_json(tree: Any) -> Any:
    """Dicts of numbers with None, JSON's null, in place of those that JSON does not have: NaN and the infinities."""
    if isinstance(tree, Mapping):
        return {key: for_json(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def check_criterion(name: str, tasks: Sequence[Task]) -> None:
    """Raises UserError where a criterion names no task of the run, or a metric that its task does not have."""
    choices = ["mean", *(task.name for task in tasks)]
    choices += [f"{task.name}/{metric}" for task in tasks for metric in task.metric_names]
    if name not in choices:
        raise unknown("evaluation.criterion", name, choices)
