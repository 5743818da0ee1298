"""The trainings of affinity_matrix.py: the frozen layers of an encoder run once over all rows, the layers above them train.

A training is one call of a compiled function with all its batches: the same program for every source of a target.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import Experiment, Source, audit
from mtl_jax.affinity import source_models, task_features
from mtl_jax.affinity.similarity import task_embedding
from mtl_jax.core.errors import UserError
from mtl_jax.data import row_keys
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.models.encoder import Block, Encoder
from mtl_jax.models.layers import attention_mask_BxTxT
from mtl_jax.models.trunk_output import Encoded, segment_mean
from mtl_jax.tasks import Task
from mtl_jax.training.setup import prepare
from mtl_jax.transfer.penalties import squared_gradients

FISHER_ROWS = 64  # texts of a task embedding
WARMUP = 0.1  # the share of the steps in which the rates rise; then they fall linearly to 0


class Rows(NamedTuple):
    """Some rows of a task, packed, and the frozen layers' output for them.

    Attributes:
        task: The task.
        examples: The rows.
        batches: The same, packed.
        hidden: For each batch f32[R, T, H].
    """

    task: Task
    examples: Examples
    batches: list[Batch]
    hidden: list[np.ndarray]


class Model(NamedTuple):
    """The parameters that train: {layer: its parameters}, and those of a head."""

    top: Any
    head: Any


class Trainer(NamedTuple):
    """The trunk in two parts, and what is done on it.

    Attributes:
        tasks: {task: the task}.
        top: The parameters of the layers that train, before training.
        copies: {source: {target: the source's rows that were left out as copies of the target's training rows}}.
        head: (task, seed) to the parameters of a new head.
        rows: (task, split, the most rows, seed) to Rows.
        encode: (top, hidden, batch) to Encoded.
        fit: (task, model, rows, steps, seed) to the trained model.
        score: (task, model, rows) to the task's metric.
        embedding: (task, seed) to the task embedding f64[D] of the layers that train, from FISHER_ROWS training rows.
    """

    tasks: dict[str, Task]
    top: Any
    copies: dict[str, dict[str, int]]
    head: Callable[[str, int], Any]
    rows: Callable[[str, str, int, int], Rows]
    encode: Callable[[Any, Any, Batch], Encoded]
    fit: Callable[[str, Model, Rows, int, int], Model]
    score: Callable[[str, Model, Rows], float]
    embedding: Callable[[str, int], np.ndarray]


def trainer(
    experiment: Experiment,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    trained: int,
    rate: float,
    head_rate: float,
) -> Trainer:
    """The trainings of an experiment's tasks, from its trunk.

    Args:
        experiment: The experiment; its trunk is an encoder.
        sources: Tasks whose training rows must not be copies of those of targets.
        targets: These targets.
        trained: Layers that train, from the top.
        rate: The highest learning rate of these layers.
        head_rate: That of heads.

    Raises:
        UserError: The experiment is refused, or the trunk is not an encoder with more layers.
    """
    prepared = prepare(experiment)
    module, params = prepared.trunk.module, prepared.params["trunk"]
    if not isinstance(module, Encoder) or not 0 < trained < module.config.num_layers:
        raise UserError(f"trained is {trained}; the trunk must be an encoder with more layers")
    layers = module.config.num_layers
    names = [f"layer_{number}" for number in range(layers - trained, layers)]
    top = {name: params[name] for name in names}
    frozen = Encoder(dataclasses.replace(module.config, num_layers=layers - trained))
    block = Block(module.config, jnp.float32)
    tasks: dict[str, Task] = {task.name: task for task in prepared.corpus.tasks}
    train, copies = _without_copies(prepared.corpus.splits["train"], experiment.sources, tasks, sources, targets)

    @jax.jit
    def below(params: Any, batch: Batch) -> jax.Array:
        types = {} if batch.types is None else {"token_type_ids": batch.types}
        places = {"position_ids": batch.positions, "segment_ids": batch.segments}
        output: Any = frozen.apply({"params": params}, batch.tokens, batch.segments > 0, **places, **types)
        return output.hidden

    def encode(top: Any, hidden: Any, batch: Batch) -> Encoded:
        mask = attention_mask_BxTxT(batch.segments > 0, batch.segments)
        for name in names:
            hidden = block.apply({"params": top[name]}, hidden, mask, True)
        return Encoded(tokens=hidden, pooled=segment_mean(hidden, batch.segments, batch.index.shape[-1]))

    @functools.cache
    def rows(name: str, split: str, most: int, seed: int) -> Rows:
        task = tasks[name]
        whole = train[name] if split == "train" else prepared.corpus.splits[split][task.source]
        examples = task_features.sample(task, whole, most, seed)
        batches = task_features.labelled_batches(task, examples, experiment.batch)
        return Rows(task, examples, batches, [np.asarray(below(params, batch._replace(labels={}))) for batch in batches])

    encode_jitted = jax.jit(encode)
    programs = {name: _programs(task, encode, rate, head_rate) for name, task in tasks.items()}

    def fit(name: str, model: Model, data: Rows, steps: int, seed: int) -> Model:
        return programs[name].fit(model, *_in_order(data, experiment.batch.rows, steps, seed))

    def score(name: str, model: Model, data: Rows) -> float:
        pairs = zip(data.hidden, data.batches, strict=True)
        values = [np.asarray(programs[name].outputs(model, hidden, batch)) for hidden, batch in pairs]
        return float(tasks[name].metrics(_by_example(data, values), data.examples)[tasks[name].metric])

    @functools.cache
    def embedding(name: str, seed: int) -> np.ndarray:
        hidden, whole, places = _whole(rows(name, "train", FISHER_ROWS, seed))
        fitted = programs[name].fit_head(head(name, seed), encode_jitted(top, hidden, whole._replace(labels={})), whole)
        return task_embedding(programs[name].squares(Model(top, fitted), hidden, whole, places))

    def head(name: str, seed: int) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return tasks[name].init(key, module.config.hidden_size)

    return Trainer(tasks, top, copies, head, rows, encode_jitted, fit, score, embedding)


class _Programs(NamedTuple):
    """The compiled functions of a task: its training, its outputs, a head on the trunk before training, squared gradients."""

    fit: Any
    outputs: Any
    fit_head: Any
    squares: Any


def _programs(task: Task, encode: Callable[..., Encoded], rate: float, head_rate: float) -> _Programs:
    def outputs(model: Model, hidden: Any, batch: Batch) -> jax.Array:
        return task.apply(model.head, encode(model.top, hidden, batch), batch, None)

    def sums(model: Model, hidden: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return task.loss(outputs(model, hidden, batch), batch.labels[task.name], batch)

    def mean_loss(model: Model, hidden: Any, batch: Batch) -> jax.Array:
        total, count = sums(model, hidden, batch)
        return total / jnp.maximum(count, 1.0)

    @jax.jit
    def fit(model: Model, hidden: Any, batches: Batch) -> Model:
        steps = len(hidden)

        def adam(rate: float) -> optax.GradientTransformation:
            return optax.adam(_rise_and_fall(rate, steps))

        optimizer = optax.partition({"top": adam(rate), "head": adam(head_rate)}, Model("top", "head"))

        def step(state: Any, batch: Any) -> tuple[Any, None]:
            model, moments = state
            updates, moments = optimizer.update(jax.grad(mean_loss)(model, *batch), moments, model)
            return (optax.apply_updates(model, updates), moments), None

        return jax.lax.scan(step, (model, optimizer.init(model)), (hidden, batches))[0][0]

    @jax.jit
    def fit_head(head: Any, encoded: Encoded, batch: Batch) -> Any:
        optimizer = optax.adam(source_models.HEAD_RATE)

        def loss(head: Any) -> jax.Array:
            total, count = task.loss(task.apply(head, encoded, batch, None), batch.labels[task.name], batch)
            return total / jnp.maximum(count, 1.0)

        def step(state: Any, _: None) -> tuple[Any, None]:
            updates, moments = optimizer.update(jax.grad(loss)(state[0]), state[1])
            return (optax.apply_updates(state[0], updates), moments), None

        return jax.lax.scan(step, (head, optimizer.init(head)), None, length=source_models.HEAD_STEPS)[0][0]

    @jax.jit
    def squares(model: Model, hidden: Any, batch: Batch, places: tuple[Any, Any]) -> Any:
        """The squared gradients of the log likelihood of each example's labels, summed over the examples at some places."""
        slots = jnp.arange(batch.index.shape[-1])

        def log_likelihood(top: Any, place: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, slot = place
            single = jax.tree.map(lambda leaf: leaf[row][None], batch)
            chosen = slots[None] == slot if task.label_level == "example" else single.segments == slot + 1
            labels = jnp.where(chosen, single.labels[task.name], task.missing)
            return -sums(Model(top, model.head), hidden[row][None], single._replace(labels={task.name: labels}))[0]

        return squared_gradients(log_likelihood, model.top, places)

    return _Programs(fit, jax.jit(outputs), fit_head, squares)


def _rise_and_fall(rate: float, steps: int) -> optax.Schedule:
    rise = max(1, round(WARMUP * steps))
    parts = [optax.linear_schedule(rate / rise, rate, rise), optax.linear_schedule(rate, 0.0, max(1, steps - rise))]
    return optax.join_schedules(parts, [rise])


def _whole(data: Rows) -> tuple[np.ndarray, Batch, tuple[np.ndarray, np.ndarray]]:
    """All batches as one, and the row and slot of each example."""
    whole: Batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *data.batches)
    rows, slots = np.nonzero(whole.index >= 0)
    return np.concatenate(data.hidden), whole, (rows, slots)


def _in_order(data: Rows, size: int, steps: int, seed: int) -> tuple[np.ndarray, Batch]:
    """Packed rows for all steps, [steps, R, ...], in a new random order in every pass."""
    hidden, whole, (rows, _) = _whole(data)
    used = np.unique(rows)
    random = np.random.default_rng([seed, zlib.crc32(data.task.name.encode())])
    passes = -(-steps * size // len(used))
    order = np.concatenate([random.permutation(used) for _ in range(passes)])[: steps * size].reshape(steps, size)
    return hidden[order], jax.tree.map(lambda leaf: leaf[order], whole)


def _by_example(data: Rows, values: Sequence[np.ndarray]) -> Any:
    """Outputs [R, S, O] or [R, T, O] for each batch as those of each example, in order of ids."""
    if data.task.level == "example":
        return task_features.by_text(data.batches, values)
    outputs: dict[int, np.ndarray] = {}
    for batch, value in zip(data.batches, values, strict=True):
        for row, slot in zip(*np.nonzero(batch.index >= 0), strict=True):
            outputs[int(batch.index[row, slot])] = value[row][batch.segments[row] == slot + 1]
    return [outputs[number] for number in range(len(outputs))]


def _without_copies(
    train: dict[str, Examples],
    declared: Sequence[Source],
    tasks: dict[str, Task],
    sources: Sequence[str],
    targets: Sequence[str],
) -> tuple[dict[str, Examples], dict[str, dict[str, int]]]:
    """{task: its training rows}, those of sources without copies of a target's; and how many were left out."""
    source_of = {source.name: source for source in declared}

    def sides(name: str) -> tuple[list[str], np.ndarray]:
        """All texts of a task's rows, and the row of each."""
        source, rows = source_of[tasks[name].source], train[tasks[name].source].data
        kinds = ("text", "pair") if source.pair else ("text",)
        texts = [row_keys.text_of(source, row, kind) for row in rows for kind in kinds]
        return texts, np.arange(len(rows)).repeat(len(kinds))

    result = {name: train[task.source] for name, task in tasks.items()}
    copies: dict[str, dict[str, int]] = {}
    for source in sources:
        texts, row_of = sides(source)
        gone: set[int] = set()
        for target in targets:
            if target != source:
                pairs = audit.near_copies(texts, sides(target)[0])
                rows = {int(row_of[first]) for first, _, _ in pairs}
                copies.setdefault(source, {}).update({target: len(rows)} if rows else {})
                gone |= rows
        if len(gone) == len(train[tasks[source].source].data):
            raise UserError(f"every training row of source {source!r} is a copy of a target's; leave out one of the tasks")
        if gone:
            result[source] = _without(result[source], gone)
    return result, copies


def _without(examples: Examples, rows: Collection[int]) -> Examples:
    kept = np.flatnonzero(~np.isin(examples.row_of, list(rows)))

    def pick(arrays: Any) -> Any:
        return arrays[kept] if isinstance(arrays, np.ndarray) else None if arrays is None else [arrays[i] for i in kept]

    labels = {name: pick(values) for name, values in examples.labels.items()}
    parts = {field: pick(getattr(examples, field)) for field in ("tokens", "types", "words", "offsets")}
    return examples._replace(labels=labels, rows=examples.row_of[kept], **parts)
