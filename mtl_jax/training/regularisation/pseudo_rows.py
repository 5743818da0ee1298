"""Pseudo-labels of a round of self-training: a model labels the unlabelled rows of a run.

The labels are a reference of the run, like the Fisher information of EWC: made once, at the start of a phase, written to the
workdir, and read from there by whoever resumes.

Shapes in names: P passes with dropout, N rows, O outputs, R rows of a batch, S examples a row.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import trunks
from mtl_jax.core.errors import UserError, count
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.tasks import Task
from mtl_jax.training import evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import apply_heads, encode_tokens, needed_fields
from mtl_jax.transfer.pseudo_labels import PseudoLabels, choose
from mtl_jax.transfer.unlabelled import KINDS, SelfTraining
from mtl_jax.trunks import Trunk

log = logging.getLogger(__name__)

TARGETS, WEIGHTS = "targets", "weights"
UNCERTAINTY = "uncertainty"  # the choice that needs passes with dropout


def reference_of(regulariser: SelfTraining, phase: str) -> str:
    """The reference's name: the pseudo-labels of the round that begins with a phase."""
    return f"{regulariser.name}-{phase}"


def leaf(task: str, what: str) -> str:
    """The name of an array of a reference: TARGETS f32[N, O] or WEIGHTS f32[N] of a task."""
    return f"{task}/{what}"


def check(regulariser: SelfTraining, tasks: Sequence[Task], of_source: Sequence[Task]) -> None:
    """Checks that tasks can label rows.

    Args:
        regulariser: Names them.
        tasks: The tasks that label.
        of_source: The tasks of the unlabelled source, which it may have beside.

    Raises:
        UserError: Some cannot, or none is left.
    """
    if not tasks:
        raise UserError(f"{regulariser.name}: no task of this run gives probabilities of a text's labels")
    for task in tasks:
        if task.level != "example" or task.compared_as not in KINDS or task.unit_size > 1:
            raise UserError(
                f"{regulariser.name}: task {task.name!r}, a {type(task).__name__}, gives no probability of a text's label; "
                "name others in tasks"
            )
        if task in of_source:
            raise UserError(
                f"{regulariser.name}: source {regulariser.source!r} has labels of task {task.name!r}; declare the rows without "
                "labels as a source of their own"
            )
    if changed := [task.name for task in of_source if task.corrupts or task.unit_size > 1 or task.words]:
        raise UserError(
            f"{regulariser.name}: task {changed[0]!r} changes how source {regulariser.source!r} is read; declare the same "
            "file as a second source"
        )


def check_dropout(choice: str, trunk: Trunk, tasks: Sequence[Task], where: str) -> None:
    """Raises UserError where passes with dropout are asked for, and there is no dropout.

    Args:
        choice: As SelfTraining.choose.
        trunk: The trunk.
        tasks: The tasks that label.
        where: What the line begins with.
    """
    if choice == UNCERTAINTY and not trunks.draws_dropout(trunk) and not all(task.dropout for task in tasks):
        raise UserError(
            f"{where}: uncertainty compares passes that differ by dropout, but there is none: set trunk.dropout or a task's"
        )


def probabilities(
    module: Any,
    params: Any,
    task: Task,
    examples: Examples,
    batching: Batching,
    key: jax.Array,
    passes: int = 1,
) -> np.ndarray:
    """f32[P, N, O]: a task's probabilities on examples of any source.

    Args:
        module: The trunk.
        params: {"trunk": ..., "heads": ...}.
        task: A task whose outputs are logits of probabilities.
        examples: The examples.
        batching: Shape of the batches.
        key: Of the dropout.
        passes: P; 1: one pass without dropout.
    """
    encode, mesh = encode_tokens(module, needed_fields((task,))), meshes.make(batching.rows, 1)
    activate = jax.nn.softmax if task.compared_as == "softmax" else jax.nn.sigmoid

    @jax.jit
    def outputs(params: Any, batch: Batch, key: jax.Array | None) -> evaluation.Outputs:
        trunk_key, head_key = (None, None) if key is None else jax.random.split(key)
        encoded = encode(params["trunk"], batch, trunk_key, None)
        of_heads = apply_heads((task,), params["heads"], encoded, batch, head_key)
        return evaluation.Outputs({task.name: activate(of_heads[task.name].astype(jnp.float32))}, {})

    def one_pass(number: int) -> np.ndarray:
        batches = itertools.count()

        def apply(params: Any, batch: Batch, table: Any) -> evaluation.Outputs:
            place = jax.random.fold_in(jax.random.fold_in(key, number), next(batches))
            return outputs(params, batch, place if passes > 1 else None)

        # As rows of the task's own source, which its head would have labelled.
        part = examples._replace(source=task.source, labels={})
        return np.asarray(evaluation.predict(apply, params, (task,), [part], batching, mesh).outputs[task.name])

    return np.stack([one_pass(number) for number in range(passes)])


def make(
    regulariser: SelfTraining,
    module: Any,
    params: Any,
    tasks: Sequence[Task],
    examples: Examples,
    batching: Batching,
    seed: int,
    phase: str,
) -> dict[str, np.ndarray]:
    """The pseudo-labels of a round, {leaf(task, what): array}.

    Args:
        regulariser: Says how they are chosen.
        module: The trunk.
        params: The model that labels.
        tasks: The tasks that label.
        examples: The unlabelled rows.
        batching: Shape of the batches.
        seed: The run's; with the phase's name it decides the dropout.
        phase: The phase that begins.

    Raises:
        UserError: No row has a label that is good enough.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(phase.encode()))
    result: dict[str, np.ndarray] = {}
    for task in tasks:
        passes = regulariser.passes if regulariser.choose == UNCERTAINTY else 1
        shares_PxNxO = probabilities(module, params, task, examples, batching, key, passes)
        labels = choose(
            shares_PxNxO,
            task.compared_as,
            regulariser.choose,
            threshold=regulariser.threshold,
            per_class=regulariser.per_class,
            soft=regulariser.soft,
        )
        if not labels.weights.any():
            raise UserError(
                f"{regulariser.name}: phase {phase!r}: no row of {regulariser.source!r} has a label of task {task.name!r} with "
                f"a probability of {regulariser.threshold:g}; the highest is {labels.predicted.confidence.max(initial=0):.3f}: "
                "lower the threshold, or train longer before it"
            )
        log.info("%s: phase %s: %s", regulariser.name, phase, summary(task, labels))
        result |= {leaf(task.name, TARGETS): labels.targets, leaf(task.name, WEIGHTS): labels.weights}
    return result


def summary(task: Task, labels: PseudoLabels) -> str:
    """How many rows got a label of a task, and how many of each label."""
    chosen = labels.weights > 0
    line = f"{task.name} labels {chosen.sum():,} of {count(len(chosen), 'row')}"
    if task.compared_as == "softmax":
        numbers = np.bincount(labels.predicted.classes[chosen], minlength=task.outputs).tolist()
        line += f" ({', '.join(f'{name} {number}' for name, number in zip(task.shown_labels, numbers, strict=True))})"
    return f"{line}, with a mean probability of {labels.predicted.confidence[chosen].mean():.3f}"


def chosen_rows(reference: Mapping[str, Any]) -> np.ndarray:
    """i64: the examples of the source with a label of any task, in order."""
    weights = [np.asarray(array) for name, array in reference.items() if name.endswith(f"/{WEIGHTS}")]
    return np.flatnonzero(np.any(np.stack(weights) > 0, axis=0))
