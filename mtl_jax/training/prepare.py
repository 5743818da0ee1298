"""From an experiment to everything a run needs, with every check of the input on the way. Writes nothing."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtl_jax import optimizer as optimizers
from mtl_jax import trunks
from mtl_jax.data import examples
from mtl_jax.data.batches import rows_per_source
from mtl_jax.data.examples import Corpus
from mtl_jax.errors import UserError
from mtl_jax.experiment import Experiment, Phase, check, rule_of, select
from mtl_jax.models.head import Head
from mtl_jax.tasks import Classification, Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.evaluation import check_criterion
from mtl_jax.training.state import TrainState, create
from mtl_jax.transfer import freezing
from mtl_jax.trunks import Trunk
from mtl_jax.weighting import Rule


class PhasePlan(NamedTuple):
    """A phase, worked out.

    Attributes:
        phase: Its declaration.
        number: Its place, from 0.
        start: Steps of the run before it.
        end: Steps of the run after it.
        mask: Tree of bools over the parameters: which train.
        rule: Its weighting rule.
        rate: Learning rate by step of the phase.
        optimizer: The optax transformation over the trainable leaves.
        cached: Whether the trunk is frozen whole and its features are looked up.
        fresh_rule: Whether the rule's state starts anew with this phase.
    """

    phase: Phase
    number: int
    start: int
    end: int
    mask: Any
    rule: Rule
    rate: Any
    optimizer: Any
    cached: bool
    fresh_rule: bool


class Prepared(NamedTuple):
    """A run before its first step.

    Attributes:
        experiment: The experiment, tasks selected.
        corpus: Its data; corpus.tasks have their label sets.
        trunk: The loaded trunk.
        params: Initial parameters on the host, or f32 arrays on the default device.
        plans: The phases.
        mesh: The devices.
        notes: Lines to show before training.
    """

    experiment: Experiment
    corpus: Corpus
    trunk: Trunk
    params: Any
    plans: list[PhasePlan]
    mesh: Mesh
    notes: list[str]


def prepare(experiment: Experiment) -> Prepared:
    """Reads the data, loads the trunk, initialises the heads, works out the phases.

    Raises:
        UserError: Anything in the experiment, its files or its data is wrong.
    """
    check(experiment)
    experiment = select(experiment)
    check_criterion(experiment.evaluation.criterion, experiment.tasks)
    mesh = meshes.make(experiment.batch.rows, experiment.devices)
    data = examples.read_sources(experiment.sources, experiment.tasks)
    texts = examples.texts(experiment.sources, data, "train")
    trunk = trunks.build(experiment.trunk, texts, meshes.compute_dtype(experiment.dtype))
    if experiment.batch.row_length > trunk.max_length:
        raise UserError(f"batch.row_length is {experiment.batch.row_length}; the trunk takes {trunk.max_length} at most")
    corpus = examples.make_corpus(experiment.sources, experiment.tasks, data, trunk.tokenizer, experiment.batch.row_length)
    rows_per_source(experiment.batch, corpus.splits["train"])
    params = init_params(trunk, corpus.tasks, experiment.seed)
    return Prepared(experiment, corpus, trunk, params, _plan(experiment, params), mesh, _notes(corpus, params))


def init_params(trunk: Trunk, tasks: tuple[Task, ...], seed: int) -> Any:
    """{"trunk": ..., "heads": {task: ...}}: the trunk as loaded or fresh, fresh heads.

    A head's numbers depend on the seed and the task's name alone, not on which other tasks there are.
    """
    key = jax.random.key(seed)
    params = {"trunk": trunks.init_params(trunk, key)}
    width = trunks.width(trunk, params["trunk"])
    heads = {}
    for task in tasks:
        name_key = jax.random.fold_in(key, zlib.crc32(task.name.encode()))
        head = Head(task.outputs, task.hidden)
        heads[task.name] = jax.jit(head.init)(name_key, jnp.zeros((1, 1, width)))["params"]
    return params | {"heads": heads}


def initial_state(prepared: Prepared) -> TrainState:
    """The state before the first step, whole on every device."""
    plan = prepared.plans[0]
    names = [task.name for task in prepared.corpus.tasks]
    trained, _ = freezing.split(prepared.params, plan.mask)
    state = create(prepared.params, plan.optimizer.init(trained), plan.rule.init(names), prepared.experiment.seed)
    return _place(state, prepared)


def enter(plan: PhasePlan, state: TrainState, prepared: Prepared) -> TrainState:
    """The state at the start of a phase: a new optimizer over what now trains, and the rule's state if it is new."""
    trained, _ = freezing.split(state.params, plan.mask)
    changed: dict[str, Any] = {"opt_state": plan.optimizer.init(trained)}
    if plan.fresh_rule:
        changed["rule_state"] = plan.rule.init([task.name for task in prepared.corpus.tasks])
    return state._replace(**_place(changed, prepared))


def template(prepared: Prepared, number: int) -> TrainState:
    """Shapes and shardings of the state within phase `number`, for restoring a checkpoint."""
    plan = prepared.plans[number]
    state = jax.eval_shape(lambda: _abstract(prepared, plan))
    sharding = meshes.replicated(prepared.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def _place(tree: Any, prepared: Prepared) -> Any:
    """On every device whole. Copied first: the step donates its state, and a buffer can be donated only once."""
    return meshes.place(jax.tree.map(np.array, tree), meshes.replicated(prepared.mesh))


def _abstract(prepared: Prepared, plan: PhasePlan) -> TrainState:
    """A state with the structure of a phase; its numbers mean nothing."""
    trained, _ = freezing.split(prepared.params, plan.mask)
    names = [task.name for task in prepared.corpus.tasks]
    return create(prepared.params, plan.optimizer.init(trained), plan.rule.init(names), 0)


def _plan(experiment: Experiment, params: Any) -> list[PhasePlan]:
    plans = []
    start = 0
    for number, phase in enumerate(experiment.phases):
        mask = freezing.trainable(params, phase.rules)
        if not any(jax.tree.leaves(mask)):
            raise UserError(f"phase {phase.name!r}: its rules freeze every parameter; nothing would train")
        peak = experiment.optimizer.learning_rate if phase.learning_rate is None else phase.learning_rate
        rate = optimizers.schedule(experiment.optimizer, peak, phase.steps)
        own = bool(phase.weights) or number == 0 or bool(experiment.phases[number - 1].weights)
        plans.append(
            PhasePlan(
                phase=phase,
                number=number,
                start=start,
                end=start + phase.steps,
                mask=mask,
                rule=rule_of(experiment, phase),
                rate=rate,
                optimizer=optimizers.build(experiment.optimizer, rate),
                cached=phase.cache_features and not any(jax.tree.leaves(mask["trunk"])),
                fresh_rule=own,
            )
        )
        start += phase.steps
    return plans


def _notes(corpus: Corpus, params: Any) -> list[str]:
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [*corpus.notes, f"{len(corpus.tasks)} tasks, {size:,} parameters"]


def with_labels(experiment: Experiment, labels: dict[str, list[str]]) -> tuple[Task, ...]:
    """The experiment's tasks with the label sets that a run wrote down."""
    return tuple(
        dataclasses.replace(task, labels=tuple(labels[task.name])) if isinstance(task, Classification) else task
        for task in select(experiment).tasks
    )
