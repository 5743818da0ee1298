"""Everything that estimators read about sources and targets, computed once for all of them.

The trunk before training runs once over each task's rows, and each finished run's trunk once over each task's rows.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.affinity import source_models, task_features
from mtl_jax.affinity.from_gradients import step_signals
from mtl_jax.affinity.linear_rows import can_be_linear, make_linear_rows
from mtl_jax.affinity.source_models import SourceModel
from mtl_jax.affinity.task_features import TaskFeatures
from mtl_jax.core.errors import count
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.prepared import Prepared

log = logging.getLogger(__name__)

WITH_HEADS = ("probabilities", "source_labels", "embedding", "source_embedding")
WITH_PROBABILITIES = ("probabilities", "source_labels")
WITH_EMBEDDINGS = ("embedding", "source_embedding")
WITH_GRADIENTS = ("gradients", "source_gradients")
WITH_RUNS = ("features", "source_features")  # before training they are the same for every source


class NotApplicable(Exception):
    """Raised if a pair of tasks has no such input.

    Attributes:
        tasks: The task or tasks that lack it.
        reason: Why, and what to do.
    """

    def __init__(self, tasks: str, reason: str):
        super().__init__(f"{tasks}: {reason}")
        self.tasks, self.reason = tasks, reason


class Tables(NamedTuple):
    """The arrays of all tasks and pairs.

    Attributes:
        tasks: {task: the task}.
        arrays: {task: its rows in the trunk before training}.
        embeddings: {task: f64[D]}, for tasks that can be fitted, if embeddings are asked for.
        own: {source: f32[M, H]}, the source's rows in its run's trunk.
        features: {(source, target): f32[N, H]}, the target's rows in the trunk of the source's run.
        probabilities: {(source, target): f32[N, Z]}, probabilities of the source's classes on the target's rows.
        seconds: {"features", "heads", "embeddings", "runs", "gradients": seconds}, for the inputs that were computed.
        gradients: {(source, target): the linear rows of both in one run of both, f32[M, 2 + D] and f32[N, 2 + D]}.
        signals: {(source, target): step_signals of a run of both, f64[N, 4]}.
    """

    tasks: dict[str, Task]
    arrays: dict[str, TaskFeatures]
    embeddings: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    features: dict[tuple[str, str], np.ndarray]
    probabilities: dict[tuple[str, str], np.ndarray]
    seconds: dict[str, float]
    gradients: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]] = MappingProxyType({})
    signals: Mapping[tuple[str, str], np.ndarray] = MappingProxyType({})


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds within this context to an entry."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


class Sampled(NamedTuple):
    """The rows of all tasks.

    Attributes:
        tasks: {task: the task}.
        examples: {task: its examples}.
        batches: {task: these examples as batches}.
        rows: The most rows of a task.
        seed: Seed of the choice of rows.
    """

    tasks: dict[str, Task]
    examples: dict[str, Examples]
    batches: dict[str, list[Batch]]
    rows: int
    seed: int

    def arrays(self, name: str, outputs: Sequence[Encoded]) -> TaskFeatures:
        """The arrays of a task, from a trunk's output for each of its batches."""
        parts = self.tasks[name], self.examples[name], self.batches[name]
        return task_features.read(*parts, outputs, self.rows, self.seed)

    def probabilities(self, model: SourceModel, target: str, outputs: Sequence[Encoded]) -> np.ndarray | None:
        """f32[N, Z], a source's probabilities on a target's rows; None if there are none."""
        task, batches = self.tasks[target], self.batches[target]
        if why_no_probabilities(model.task, task):
            return None
        of_batches = source_models.probabilities(model, batches, outputs)
        return task_features.rows_of_outputs(task, batches, of_batches, self.rows, self.seed)


def tables(
    prepared: Prepared,
    inputs: Collection[str],
    targets: Sequence[str],
    *,
    rows: int,
    layer: int,
    runs: Sequence[str | Path],
    seed: int,
) -> Tables:
    """The tables of an experiment.

    Args:
        prepared: The experiment.
        inputs: The names in READS that the estimators read; other inputs are not computed.
        targets: The tasks that are targets; every task is a source.
        rows: The most rows of a task.
        layer: The layer whose features are read; 0: the trunk's output.
        runs: Workdirs of finished runs.
        seed: Seed of rows and heads, and of the rows and the projection of gradients.

    Raises:
        UserError: A run, the layer or a number is refused.
    """
    seconds: dict[str, float] = {}
    models = source_models.open_runs(runs, prepared, layer)
    trunk = task_features.before_training(prepared)
    at_layer = task_features.make_trunk(trunk.module, trunk.params, layer) if layer else trunk
    sampled = _sampled(prepared, rows, seed)
    names = list(sampled.tasks)
    with timed(seconds, "features"):
        outputs = {name: task_features.encoded(trunk, sampled.batches[name]) for name in names}
        at = {name: task_features.encoded(at_layer, sampled.batches[name]) for name in names} if layer else outputs
        arrays = {name: sampled.arrays(name, at[name]) for name in names}
    log.info("features of %s in %.0f s", count(len(names), "task"), seconds["features"])
    heads: dict[str, Any] = {}
    probabilities: dict[tuple[str, str], np.ndarray] = {}
    if set(inputs) & set(WITH_HEADS):
        with timed(seconds, "heads"):
            for name, task in sampled.tasks.items():
                if source_models.can_fit(task):
                    fresh = prepared.params["heads"][name]
                    heads[name] = source_models.fit_head(task, fresh, sampled.batches[name], outputs[name])
            for source, target in itertools.product([name for name in heads if name not in models], targets):
                model = SourceModel(sampled.tasks[source], trunk, heads[source], at_layer)
                if source != target and (pair := sampled.probabilities(model, target, outputs[target])) is not None:
                    probabilities[source, target] = pair
    embeddings: dict[str, np.ndarray] = {}
    if set(inputs) & set(WITH_EMBEDDINGS):
        with timed(seconds, "embeddings"):
            embed = source_models.make_embed(trunk)
            for name, head in heads.items():
                log.info("embedding of task %s", name)
                task = sampled.tasks[name]
                some = task_features.sample(task, sampled.examples[name], source_models.FISHER_ROWS, seed)
                embeddings[name] = embed(task, head, some, prepared.experiment.batch)
    own: dict[str, np.ndarray] = {}
    features: dict[tuple[str, str], np.ndarray] = {}
    for source, model in models.items() if set(inputs) & {*WITH_RUNS, *WITH_PROBABILITIES} else ():
        with timed(seconds, "runs"):
            for target in dict.fromkeys([source, *targets]):
                log.info("task %s in the run of %s", target, source)
                batches = sampled.batches[target]
                of_run = task_features.encoded(model.trunk, batches)
                vectors = sampled.arrays(target, task_features.encoded(model.layer, batches) if layer else of_run).features
                if source == target:
                    own[source] = vectors
                    continue
                features[source, target] = vectors
                if (pair := sampled.probabilities(model, target, of_run)) is not None:
                    probabilities[source, target] = pair
    gradients: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    if set(inputs) & set(WITH_GRADIENTS):
        with timed(seconds, "gradients"):
            gradients = _gradients(sampled, models, targets)
    signals: dict[tuple[str, str], np.ndarray] = {}
    for folder in runs if "signals" in inputs else ():
        signals |= step_signals(read_metrics(Path(folder)))
    return Tables(sampled.tasks, arrays, embeddings, own, features, probabilities, seconds, gradients, signals)


def _gradients(
    sampled: Sampled, models: Mapping[str, SourceModel], targets: Sequence[str]
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """The linear rows of pairs of tasks that are in one run."""
    rows: dict[str, np.ndarray] = {}
    by_run: dict[int, list[str]] = {}
    for name, model in models.items():
        by_run.setdefault(id(model.trunk), []).append(name)
    pairs = [
        pair
        for names in by_run.values()
        for pair in itertools.product([name for name in names if can_be_linear(models[name].task)], repeat=2)
        if pair[0] != pair[1] and pair[1] in targets
    ]
    linear_rows: dict[int, Any] = {}  # by trunk, whose backward pass is compiled once for all of its tasks
    for name in dict.fromkeys(itertools.chain.from_iterable(pairs)):
        model = models[name]
        if id(model.trunk) not in linear_rows:
            linear_rows[id(model.trunk)] = make_linear_rows(model.trunk, seed=sampled.seed)
        log.info("gradients of task %s", name)
        rows[name] = linear_rows[id(model.trunk)](model.task, model.head, sampled.batches[name])
    return {(source, target): (rows[source], rows[target]) for source, target in pairs}


def _sampled(prepared: Prepared, rows: int, seed: int) -> Sampled:
    tasks = {task.name: task for task in prepared.corpus.tasks}
    train = prepared.corpus.splits["train"]
    examples = {name: task_features.sample(task, train[task.source], rows, seed) for name, task in tasks.items()}
    batching = prepared.experiment.batch
    batches = {name: task_features.labelled_batches(task, examples[name], batching) for name, task in tasks.items()}
    return Sampled(tasks, examples, batches, rows, seed)


def why_no_probabilities(source: Task, target: Task) -> str:
    """The reason why a source has no probabilities on a target's rows; "" if it has some."""
    if not source_models.has_classes(source):
        return f"{type(source).__name__} has no probabilities of classes"
    if not task_features.kind_of_labels(target):
        return f"the labels of {type(target).__name__} are neither classes nor numbers"
    if source.label_level != target.label_level:
        return "one labels texts, the other words"
    return ""


def input_of(name: str, source: str, target: str, tables: Tables) -> Any:
    """An input of an estimator for a pair of tasks; READS explains it.

    Raises:
        NotApplicable: The pair has no such input.
    """
    of_target, of_source = tables.arrays[target], tables.arrays[source]
    if name == "labels":
        if of_target.labels is None:
            kind = type(tables.tasks[target]).__name__
            raise NotApplicable(target, f"the labels of {kind} are neither classes nor numbers")
        return of_target.labels
    if name in WITH_RUNS:
        table: Mapping[Any, np.ndarray] = tables.features if name == "features" else tables.own
        key = (source, target) if name == "features" else source
        if key not in table:
            raise NotApplicable(
                source, "no finished run by --runs, and before training the features are the same for every source"
            )
        return table[key]
    if name in WITH_PROBABILITIES:
        if (source, target) not in tables.probabilities:
            tasks = tables.tasks[source], tables.tasks[target]
            pair = not source_models.has_classes(tasks[0])
            raise NotApplicable(source if pair else f"{source} for {target}", why_no_probabilities(*tasks))
        probabilities = tables.probabilities[source, target]
        return probabilities.argmax(axis=1) if name == "source_labels" else probabilities
    if name == "signals":
        if (source, target) not in tables.signals:
            why = "no run by --runs has both tasks under a rule that compares gradients, such as pcgrad"
            raise NotApplicable(f"{source} for {target}", why)
        return tables.signals[source, target]
    if name in WITH_GRADIENTS:
        if (source, target) not in tables.gradients:
            for task in (source, target):
                if not can_be_linear(tables.tasks[task]):
                    kind = type(tables.tasks[task]).__name__
                    raise NotApplicable(task, f"an example of a {kind} has no cross-entropy or squared error of its own")
            raise NotApplicable(f"{source} for {target}", "no finished run by --runs has both tasks")
        return tables.gradients[source, target][name == "gradients"]
    if name in WITH_EMBEDDINGS:
        task = target if name == "embedding" else source
        if task not in tables.embeddings:
            kind = type(tables.tasks[task]).__name__
            raise NotApplicable(task, f"no head of a {kind} can be fitted to features alone")
        return tables.embeddings[task]
    simple = {
        "base_features": of_target.features,
        "source_base_features": of_source.features,
        "texts": of_target.texts,
        "source_texts": of_source.texts,
        "tokens": of_target.tokens,
        "source_tokens": of_source.tokens,
    }
    return simple[name]
