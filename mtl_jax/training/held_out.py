"""Held-out rows of a run, and what a weighting rule measures on them: the exact derivative of their loss by the weights.

With theta the parameters and L_i the losses of a batch, a step ahead is theta' = theta - rate sum_i w_i grad L_i(theta), and
the derivative of the held-out loss L(theta') by w_i is -rate <grad L(theta'), grad L_i(theta)>. The inner products with all
task gradients are the derivatives of all losses along one direction, grad L(theta'): no task gradient is computed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count, unknown
from mtl_jax.data import held_out_rows
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.examples import Examples, read_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source
from mtl_jax.data.splits import Splits
from mtl_jax.experiment import Experiment, rule_of
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import NO_SAVINGS, Encode, Savings, apply_heads, label_counts, mean_losses
from mtl_jax.training.gradient import Backward, BackwardFn, Weights
from mtl_jax.training.train_state import StepInputs
from mtl_jax.weighting import HeldOut, stack
from mtl_jax.weighting.options import number


class HeldOutRows(NamedTuple):
    """The held-out rows of a run.

    Attributes:
        rule: The name of the rule that needs them.
        tasks: The tasks whose losses it sums.
        rows: {source: its held-out rows}.
    """

    rule: str
    tasks: tuple[str, ...]
    rows: dict[str, Sequence[Row]]


def take(experiment: Experiment, data: Mapping[str, Splits]) -> tuple[dict[str, Splits], HeldOutRows | None]:
    """The sources without the rows that a rule of the experiment needs held out, and these rows; None: no rule does.

    Raises:
        UserError: A source has too few rows, or the rule names a task that does not exist.
    """
    rules = [rule for phase in experiment.phases if (rule := rule_of(experiment, phase)).held_out is not None]
    if not rules:
        return dict(data), None
    name, needs = rules[0].name or "of a script", rules[0].held_out
    assert needs is not None
    number(f"weighting {name}: held_out.share", needs.share, above=0, below=1)
    names = [task.name for task in experiment.tasks]
    for task_name in needs.tasks:
        if task_name not in names:
            raise unknown(f"task in held_out of weighting {name}:", task_name, names)
    sources = {source.name: source for source in experiment.sources}
    left, rows = dict(data), {}
    for source in dict.fromkeys(task.source for task in experiment.tasks if task.name in needs.tasks):
        left[source], rows[source] = held_out_rows.take(sources[source], data[source], needs.share, name)
    return left, HeldOutRows(name, needs.tasks, rows)


def examples_of(
    held_out: HeldOutRows | None, sources: Sequence[Source], corpus: Corpus, tokenizer: Any, max_length: int
) -> tuple[Examples, ...]:
    """The held-out rows as examples, with the labels of the tasks whose losses count; the corpus gets a note for each source.

    Args:
        held_out: take(...).
        sources: The declared sources.
        corpus: The rest of the data, with the tasks' label sets.
        tokenizer: A transformers tokenizer.
        max_length: As for read_examples.

    Raises:
        UserError: A row cannot be read, or a task has no label on them.
    """
    if held_out is None:
        return ()
    declared = {source.name: source for source in sources}
    places = {name: place for place, name in enumerate(corpus.splits["train"])}
    examples = []
    for source, rows in held_out.rows.items():
        tasks = [task for task in corpus.tasks if task.source == source]
        labelled = [task for task in tasks if task.name in held_out.tasks]
        what = f"the rows held out for weighting {held_out.rule}"
        part, counts = read_examples(declared[source], tasks, rows, tokenizer, max_length, what, labelled=labelled)
        for task in labelled:
            if counts.blank[task.name] == len(part.data):
                raise UserError(
                    f"weighting {held_out.rule}: none of the held-out rows of source {source!r} has a label of task "
                    f"{task.name!r}; give the task more labels, or the rule a larger share"
                )
        examples.append(part._replace(place=places[source]))
        corpus.notes.append(f"source {source}: {count(len(part.data), 'training row')} held out for weighting {held_out.rule}")
    return tuple(examples)


def batches(
    examples: Sequence[Examples], tasks: Sequence[Task], batching: Batching, types: bool, mesh: jax.sharding.Mesh
) -> Batch | None:
    """The held-out rows on the devices, as StepInputs.held_out; None: there are none."""
    host = host_batches(examples, tasks, batching, types, meshes.shards(mesh))
    placed: Batch | None = None if host is None else meshes.place(host, meshes.by_rows(mesh, axis=1))
    return placed


def host_batches(
    examples: Sequence[Examples], tasks: Sequence[Task], batching: Batching, types: bool, shards: int
) -> Batch | None:
    """The same on the host, for so many devices."""
    if not examples:
        return None
    labelled = [task for task in tasks if any(task.name in part.labels for part in examples)]
    return held_out_rows.batches(examples, labelled, batching, types, shards)


def with_look_ahead(
    backward: BackwardFn,
    losses: BackwardFn,
    encode: Encode,
    tasks: Sequence[Task],
    needs: HeldOut,
    weigh_heads: bool,
    savings: Savings = NO_SAVINGS,
) -> BackwardFn:
    """A backward pass that also gives Signals.held_out.

    Args:
        backward: The pass.
        losses: gradient.make_backward(...) of all tasks, without regularisers; the same pass if it is one of these.
        encode: The trunk.
        tasks: The tasks of the run.
        needs: Rule.held_out.
        weigh_heads: As in gradient.make_backward(); if false, the heads' part of a step does not depend on the weights.
        savings: How the heads save memory.
    """
    measured = tuple(task for task in tasks if task.name in needs.tasks)

    def looking(trained: Any, frozen: Any, inputs: StepInputs, keys: tuple[jax.Array, jax.Array]) -> Backward:
        step = backward(trained, frozen, inputs, keys)
        here = step if losses is backward else losses(trained, frozen, inputs, keys)
        assert inputs.held_out is not None
        assert here.along is not None
        along = here.along
        key = jax.random.fold_in(keys[1], zlib.crc32(b"held out"))  # not a small number: the heads' keys have these
        drawn = jax.random.randint(key, (), 0, len(inputs.held_out.tokens))
        batch = jax.tree.map(lambda leaf: leaf[drawn], inputs.held_out)
        counts = label_counts(measured, batch)

        def loss(trained: Any) -> jax.Array:
            params = trees.merge(trained, frozen)
            encoded = encode(params["trunk"], batch, None, None)
            outputs = apply_heads(measured, params["heads"], encoded, batch, None, savings)
            return jax.tree.reduce(jnp.add, mean_losses(measured, outputs, batch, counts))

        def derivative(weights: Weights, rate: float) -> jax.Array:
            move, _ = here.pull(weights, None, None)
            ahead = jax.tree.map(lambda leaf, change: leaf - rate * change, trained, move)
            slope = jax.grad(loss)(ahead)
            if not weigh_heads:
                slope = slope | {"heads": jax.tree.map(jnp.zeros_like, slope["heads"])}
            return -stack(along(slope))

        return step._replace(held_out=derivative)

    return looking
