"""The tasks of an experiment as arrays: features of its trunk before training, labels, texts and tokens of some rows.

Rows are texts, or words if a task labels words. Texts are packed into batches as in training.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.data.examples import Examples
from mtl_jax.experiment import Experiment
from mtl_jax.models import traced
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training import init_from
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import Encode, encode_tokens
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.setup import prepare
from mtl_jax.transfer.adapters import ADAPTERS, Adapted, PromptTuning
from mtl_jax.transfer.adapters.base import RUN, Adapter

log = logging.getLogger(__name__)

FIELDS = ("pooled", "tokens", "first")  # of Encoded
ROWS = 512
LEVELS = (("example", "example"), ("token", "word"))  # of outputs and labels: texts, words
CLASSES, NUMBERS = "classes", "numbers"
_LAYER = re.compile(r"layer_(\d+)")


class TaskFeatures(NamedTuple):
    """Some training rows of a task, in arrays.

    Attributes:
        features: f32[N, H], a vector for each labelled row: the mean over a text's tokens, or the vector of a word's first
            token; of all texts if the labels are neither classes nor numbers.
        labels: i64[N] classes or f64[N] numbers; None if they are neither.
        text_of_row: i64[N], ascending: the text that each row belongs to, an index of texts.
        texts: f32[T, H], each text's mean over its tokens.
        tokens: T arrays i32[length], token ids.
    """

    features: np.ndarray
    labels: np.ndarray | None
    text_of_row: np.ndarray
    texts: np.ndarray
    tokens: list[np.ndarray]


class TrunkFunction(NamedTuple):
    """A trunk with parameters, as a function of batches.

    Attributes:
        module: The linen module, or one with adapters.
        params: Its parameters.
        encode: Jitted: (params, Batch) -> Encoded with these fields.
    """

    module: Any
    params: Any
    encode: Any


def features(
    experiment: Experiment | Prepared, tasks: Sequence[str] = (), *, layer: int = 0, rows: int = ROWS, seed: int = 0
) -> dict[str, TaskFeatures]:
    """Features of an experiment's trunk before training, with the labels of its tasks' training rows.

    Args:
        experiment: The experiment, or the result of training.setup.prepare. Its init_from is loaded first, with its adapters.
        tasks: The tasks; empty: all.
        layer: The layer whose output is read, from 1; 0: the trunk's output.
        rows: The most texts of a task, chosen at random, and the most words if a task labels words.
        seed: Seed of this choice.

    Returns:
        {task: TaskFeatures}.

    Raises:
        UserError: The experiment is refused, a task is unknown, the trunk has no such layer, or rows is below 1.

    Examples:
        >>> rows = mtl_jax.affinity.features(EXPERIMENT, ["coarse"], rows=32)["coarse"]
        >>> rows.features.shape[0] == len(rows.labels)
        True
    """
    prepared = experiment if isinstance(experiment, Prepared) else prepare(experiment)
    trunk = before_training(prepared, layer)
    chosen = tasks or [task.name for task in prepared.corpus.tasks]
    result = {}
    for task in (task_of(prepared, name) for name in chosen):
        examples = sample(task, prepared.corpus.splits["train"][task.source], rows, seed)
        batches = labelled_batches(task, examples, prepared.experiment.batch)
        result[task.name] = read(task, examples, batches, encoded(trunk, batches), rows, seed)
    return result


def task_of(prepared: Prepared, name: str) -> Task:
    """The task of a name; raises UserError if there is none."""
    tasks: dict[str, Task] = {task.name: task for task in prepared.corpus.tasks}
    if name not in tasks:
        raise unknown("task", name, tasks)
    return tasks[name]


def before_training(prepared: Prepared, layer: int = 0) -> TrunkFunction:
    """The trunk of an experiment before training.

    It has the adapters that init_from loads and that all rows share. Others are left out: new ones change nothing before they
    train, except for the prompts of PromptTuning, and those of sources or tasks are not the same for all rows.

    Raises:
        UserError: init_from cannot be loaded, or the trunk has no such layer.
    """
    loaded: set[str] = set()
    if prepared.experiment.init_from.path:
        prepared, record, _ = init_from.load_parameters(prepared)
        loaded = {path.split("/")[2] for path in record["loaded"] if path.startswith(f"trunk/{ADAPTERS}/")}
    module, params = prepared.trunk.module, prepared.params["trunk"]
    if isinstance(module, Adapted):
        kept = tuple(part for part in module.adapters if part.name in loaded and isinstance(part, Adapter) and part.per == RUN)
        names = [part.name for part in kept]
        if left_out := sorted(loaded.difference(names)):
            log.info(
                "features are those of the trunk without %s of %s, which are of single sources or tasks",
                listed(left_out),
                prepared.experiment.init_from.path,
            )
        if any(isinstance(part, PromptTuning) and part.name not in names for part in module.adapters):
            log.info("features are those of the trunk without its new prompt, which changes the output before it trains")
        added = {name: params[ADAPTERS][name] for name in names}
        params = {name: tree for name, tree in params.items() if name != ADAPTERS} | ({ADAPTERS: added} if kept else {})
        module = dataclasses.replace(module, adapters=kept, routes=None, owners=()) if kept else module.base
    return make_trunk(module, params, layer)


def make_trunk(module: Any, params: Any, layer: int = 0) -> TrunkFunction:
    """A module and its parameters as a TrunkFunction.

    Raises:
        UserError: It has no such layer.
    """
    names = layers(module)
    if not 0 <= layer <= len(names):
        there_are = f"the trunk has the layers 1 to {len(names)}" if names else "the trunk names no layers layer_0, layer_1 ..."
        raise UserError(f"layer is {layer}; {there_are}, and 0 is its output")
    encode = encode_tokens(module, FIELDS)
    if layer:
        encode = _at_layer(encode, names[layer - 1])
    return TrunkFunction(
        module, jax.device_put(params, jax.devices()[0]), jax.jit(lambda params, batch: encode(params, batch, None, None))
    )


def layers(module: Any) -> list[str]:
    """The names of a trunk's layers in order, which are layer_0, layer_1 ..."""
    base = module.base if isinstance(module, Adapted) else module
    names = {call.path[0] for call in traced.calls(base) if len(call.path) == 1 and _LAYER.fullmatch(call.path[0])}
    return sorted(names, key=lambda name: int(name.removeprefix("layer_")))


def _at_layer(encode: Encode, name: str) -> Encode:
    """An Encode that reads the output of a layer in place of the trunk's; the layers above it are not computed."""

    def encode_layer(params: Any, batch: Batch, key: jax.Array | None, table: jax.Array | None) -> Encoded:
        outputs: list[jax.Array] = []

        def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            output = call(*args, **kwargs)
            if context.method_name == "__call__" and context.module.path == (name,):
                outputs.append(output[0] if isinstance(output, tuple) else output)
            if context.method_name == "__call__" and not context.module.path:
                return output._replace(hidden=outputs[-1][:, -output.hidden.shape[1] :])  # without the places of prompts
            return output

        with nn.intercept_methods(record):
            return encode(params, batch, key, table)

    return encode_layer


def kind_of_labels(task: Task) -> str:
    """ "classes", "numbers", or "" for labels that are neither, or not of one text: a set, a span, a text, a choice."""
    if task.several_texts or task.label_shape or (task.level, task.label_level) not in LEVELS or task.corrupts:
        return ""
    return CLASSES if np.issubdtype(task.dtype, np.integer) else NUMBERS


def sample(task: Task, examples: Examples, rows: int, seed: int) -> Examples:
    """At most `rows` examples of a source, chosen at random among those with a label of the task; ids from 0.

    Raises:
        UserError: rows is below 1.
    """
    if rows < 1:
        raise UserError(f"rows is {rows}; it must be at least 1")
    labels = examples.labels[task.name]
    known = np.arange(len(examples.tokens))
    if kind_of_labels(task) and task.label_level == "example":
        known = np.flatnonzero(is_known(task, np.asarray(labels)))
    elif kind_of_labels(task):
        known = np.array([i for i in known if is_known(task, np.asarray(labels[i])).any()], np.int64)
    random = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    chosen = np.sort(random.permutation(known)[:rows])

    def pick(arrays: Any) -> Any:
        return arrays[chosen] if isinstance(arrays, np.ndarray) else None if arrays is None else [arrays[i] for i in chosen]

    return examples._replace(
        first_id=0,
        tokens=pick(examples.tokens),
        labels={task.name: pick(labels)},
        types=pick(examples.types),
        words=pick(examples.words),
        offsets=pick(examples.offsets),
        rows=examples.row_of[chosen],
    )


def is_known(task: Task, labels: np.ndarray) -> np.ndarray:
    """bool, in the shape of the labels: whether each label exists."""
    return labels != task.missing if np.issubdtype(task.dtype, np.integer) else ~np.isnan(labels)


def labelled_batches(task: Task, examples: Examples, batching: Batching) -> list[Batch]:
    """The batches of a task's examples, packed as in evaluation, with labels unless the task changes the tokens."""
    return list(eval_batches([examples], batching, () if task.corrupts else (task,)))


def encoded(trunk: TrunkFunction, batches: Iterable[Batch]) -> list[Encoded]:
    """The trunk's output for each batch, on the first device."""
    place = meshes.replicated(meshes.make(1, 1))
    return [trunk.encode(trunk.params, meshes.place(batch._replace(labels={}), place)) for batch in batches]


def read(
    task: Task, examples: Examples, batches: Sequence[Batch], outputs: Sequence[Encoded], rows: int, seed: int
) -> TaskFeatures:
    """The arrays of a task's examples.

    Args:
        task: The task.
        examples: The result of sample().
        batches: The result of labelled_batches() of these.
        outputs: The result of encoded() of these.
        rows: The most rows; more words are left out at random.
        seed: Seed of this choice.
    """
    texts = by_text(batches, [output.pooled for output in outputs])
    tokens = [np.asarray(ids) for ids in examples.tokens]
    if not kind_of_labels(task):
        return TaskFeatures(texts, None, np.arange(len(texts)), texts, tokens)
    if task.label_level == "example":
        labels_N = np.asarray(examples.labels[task.name])
        return TaskFeatures(texts, _wide(labels_N), np.arange(len(texts)), texts, tokens)
    words = by_word(task, batches, [output.tokens for output in outputs])
    kept = _some(len(words.texts), rows, seed)
    return TaskFeatures(words.values[kept], _wide(words.labels[kept]), words.texts[kept], texts, tokens)


def rows_of_outputs(task: Task, batches: Sequence[Batch], outputs: Sequence[Any], rows: int, seed: int) -> np.ndarray:
    """Outputs of a head, f[R, S, O] or f[R, T, O] for each batch, at the rows that read() returns: f[N, O]."""
    if task.label_level == "example":
        return by_text(batches, outputs)
    values = by_word(task, batches, outputs).values
    return values[_some(len(values), rows, seed)]


def _some(count: int, rows: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng([seed, 1]).permutation(count)[:rows])


def _wide(labels_N: np.ndarray) -> np.ndarray:
    return labels_N.astype(np.int64 if np.issubdtype(labels_N.dtype, np.integer) else np.float64)


def by_text(batches: Sequence[Batch], values: Sequence[Any]) -> np.ndarray:
    """f[T, ...]: the vector of each text, in order of ids, from the vectors f[R, S, ...] of each batch."""
    ids, vectors = [], []
    for batch, value in zip(batches, values, strict=True):
        rows, slots = np.nonzero(batch.index >= 0)
        ids.append(batch.index[rows, slots])
        vectors.append(np.asarray(value, np.float32)[rows, slots])
    return np.concatenate(vectors)[np.argsort(np.concatenate(ids), kind="stable")]


class Words(NamedTuple):
    """The labelled words of texts, in order.

    Attributes:
        values: f[N, ...], their vectors.
        labels: [N].
        texts: i64[N], the id of each word's text.
    """

    values: np.ndarray
    labels: np.ndarray
    texts: np.ndarray


def by_word(task: Task, batches: Sequence[Batch], values: Sequence[Any]) -> Words:
    """The labelled words, with their vectors from the vectors f[R, T, ...] of each batch."""
    parts = []
    for batch, value in zip(batches, values, strict=True):
        labels_RxT = batch.labels[task.name]
        rows, places = np.nonzero(is_known(task, labels_RxT) & (batch.segments > 0))
        texts = batch.index[rows, batch.segments[rows, places] - 1]
        parts.append(Words(np.asarray(value, np.float32)[rows, places], labels_RxT[rows, places], texts.astype(np.int64)))
    whole = Words(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = np.argsort(whole.texts, kind="stable")
    return Words(*(array[order] for array in whole))
