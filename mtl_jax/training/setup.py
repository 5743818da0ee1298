"""From an experiment to everything a run needs, with every check of the input on the way. Writes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mtl_jax import trunks
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count
from mtl_jax.data import corpus as corpora
from mtl_jax.data import coverage, stream
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.mixture import ScheduleSequence
from mtl_jax.data.stream import MixturePhase
from mtl_jax.experiment import Experiment, check, select
from mtl_jax.tasks import Task
from mtl_jax.training import gram_gradient, phase_plan, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.evaluation import check_criterion
from mtl_jax.training.phase_plan import PhasePlan as PhasePlan
from mtl_jax.training.phase_plan import per_task as per_task
from mtl_jax.training.regularisation import prepare as regularised
from mtl_jax.training.regularisation.teachers import Teacher
from mtl_jax.training.restore import Run
from mtl_jax.training.train_state import TrainState, create, init_params
from mtl_jax.transfer import adapters, averaging, optax_rules
from mtl_jax.trunks import Trunk

SOME_LABELS = 10  # of a task, that are shown before training
SOME_TEXTS = 50  # on which a teacher's tokenizer is compared with the run's


class Prepared(NamedTuple):
    """A run before its first step.

    Attributes:
        experiment: The experiment, tasks selected.
        corpus: Its data; corpus.tasks are filled with what was found in it.
        schedule: Which sources the rows of its batches belong to.
        trunk: The loaded trunk.
        params: Initial parameters on the host, or f32 arrays on the default device.
        plans: The phases.
        mesh: The devices.
        notes: Lines to show before training.
        teachers: {regulariser: the model that it imitates}.
        learned: {regulariser: the run whose tasks are not to be forgotten}.
        watched: {regulariser: the tasks whose outputs it looks at}, as far as that is said or follows from its teacher.
    """

    experiment: Experiment
    corpus: Corpus
    schedule: ScheduleSequence
    trunk: Trunk
    params: Any
    plans: list[PhasePlan]
    mesh: Mesh
    notes: list[str]
    teachers: dict[str, Teacher]
    learned: dict[str, Run]
    watched: dict[str, list[str]]


def prepare(experiment: Experiment) -> Prepared:
    """Reads the data, loads the trunk, initialises the heads, works out the phases.

    Raises:
        UserError: Anything in the experiment, its files or its data is wrong.
    """
    experiment = select(experiment)
    check(experiment)
    check_criterion(experiment.evaluation.criterion, experiment.tasks)
    mesh = meshes.make(experiment.batch.rows, experiment.devices)
    data = corpora.read_sources(experiment.sources, experiment.tasks)
    texts = corpora.texts(experiment.sources, experiment.tasks, data, "train")
    decodes = any(task.decodes for task in experiment.tasks)
    trunk = trunks.build(experiment.trunk, texts, meshes.compute_dtype(experiment.dtype), decodes=decodes)
    if experiment.batch.row_length > trunk.max_length:
        raise UserError(f"batch.row_length is {experiment.batch.row_length}; the trunk takes {trunk.max_length} at most")
    facts = trunks.facts(trunk)
    tasks = tuple(task.on(facts) for task in experiment.tasks)
    trunk = trunks.adapt(trunk, experiment.adapters, len(data))
    corpus = corpora.make_corpus(experiment.sources, tasks, data, trunk.tokenizer, experiment.batch.row_length)
    _check_tokens(experiment, corpus, trunks.tables(trunk), trunk.tokenizer)
    text_evaluation.check(corpus.tasks, trunk)
    schedule = stream.schedule(corpus, experiment.batch, stretches(experiment))
    params = init_params(trunk, corpus.tasks, experiment.seed)
    held = regularised.prepare(experiment, trunk, corpus, texts[:SOME_TEXTS])
    for name, teacher in held.teachers.items():
        sizes = (teacher.module.trunk if teacher.tagger else teacher.module).config
        for split in corpus.splits.values():
            coverage.check(split.values(), (), trunk.tokenizer, trunks.tables_of(sizes, f"the teacher of {name}"))
    params["heads"] |= regularised.projections(experiment, held.teachers, trunks.width(trunk, params["trunk"]))
    plans = phase_plan.plan(experiment, corpus.tasks, params, held.watched)
    trains_trunk = any(trains for plan in plans for trains in jax.tree.leaves(plan.mask["trunk"]))
    regularised.check(experiment, {task.name: task for task in corpus.tasks}, trunk, params, held.learned, trains_trunk)
    notes = _notes(experiment, corpus, trunk, params, plans)
    return Prepared(experiment, corpus, schedule, trunk, params, plans, mesh, notes, held.teachers, held.learned, held.watched)


def _check_tokens(experiment: Experiment, corpus: Corpus, tables: coverage.Tables, tokenizer: Any) -> None:
    """Refuses a text with a token that the model has no row for; notes how much the vocabulary does not know.

    Raises:
        UserError: There is one; names its file and line.
    """
    for split in corpus.splits.values():
        coverage.check(split.values(), corpus.tasks, tokenizer, tables)
    for source in experiment.sources:
        parts = [split[source.name] for split in corpus.splits.values() if source.name in split]
        if parts:
            tasks = [task for task in corpus.tasks if task.source == source.name]
            columns = [name for name in (source.text, source.pair) if name]
            corpus.notes.extend(coverage.remarks(f"source {source.name}", parts, tasks, tokenizer, columns))
            corpus.notes.extend(coverage.language_remarks(f"source {source.name}", parts, tasks, tokenizer))


def stretches(experiment: Experiment) -> tuple[MixturePhase, ...]:
    """The mixtures of a run: those that phases name, and that of the batches over phases in a row that name none."""
    batch, found = experiment.batch, []
    own: list[bool] = []
    for phase in experiment.phases:
        if phase.mixture:
            found.append(MixturePhase(phase.steps, phase.mixture, "", phase.shares))
        elif own and not own[-1]:
            found[-1] = found[-1]._replace(steps=found[-1].steps + phase.steps)
        else:
            found.append(MixturePhase(phase.steps, batch.mixture, batch.mixture_end, batch.shares))
        own.append(bool(phase.mixture))
    return tuple(found)


def reseeded(prepared: Prepared, seed: int) -> Prepared:
    """The same run with the initial parameters, before init_from, of another seed."""
    params = init_params(prepared.trunk, prepared.corpus.tasks, seed)
    experiment = dataclasses.replace(prepared.experiment, seed=seed)
    width = trunks.width(prepared.trunk, params["trunk"])
    params["heads"] |= regularised.projections(experiment, prepared.teachers, width)
    return prepared._replace(experiment=experiment, params=params)


def initial_state(prepared: Prepared) -> TrainState:
    """The state before the first step, whole on every device."""
    plan = prepared.plans[0]
    names = [task.name for task in prepared.corpus.tasks]
    trained, _ = trees.split(prepared.params, plan.mask)
    rule_state = gram_gradient.init_rule(plan.rule, names, trained["trunk"])
    average = averaging.make(prepared.experiment.averaging).init(trained)
    state = create(prepared.params, plan.optimizer.init(trained), rule_state, prepared.experiment.seed, average)
    return _place(state, prepared)


def enter(plan: PhasePlan, state: TrainState, prepared: Prepared) -> TrainState:
    """The state at the start of a phase: the optimizer and a new average over what now trains, the rule's state if it is new.

    Moments of what trained in the phase before are kept.
    """
    trained, _ = trees.split(state.params, plan.mask)
    average = averaging.make(prepared.experiment.averaging).init(trained)
    moments = optax_rules.carry(state.opt_state, plan.optimizer.init(trained))
    changed: dict[str, Any] = {"opt_state": moments, "average": average}
    if plan.fresh_rule:
        names = [task.name for task in prepared.corpus.tasks]
        changed["rule_state"] = gram_gradient.init_rule(plan.rule, names, trained["trunk"])
    return state._replace(**_place(changed, prepared))


def template(prepared: Prepared, number: int, step: int) -> TrainState:
    """Shapes and shardings of the state after `step` steps, within phase `number`, for restoring a checkpoint.

    Raises:
        UserError: The phases are not those that the checkpoint was made with.
    """
    if number >= len(prepared.plans) or not prepared.plans[number].start <= step <= prepared.plans[number].end:
        spans = ", ".join(f"{plan.phase.name} {plan.start + 1}..{plan.end}" for plan in prepared.plans)
        raise UserError(
            f"the checkpoint of step {step} was made in phase {number}, which does not fit the phases {spans}; "
            "choose another --workdir"
        )
    plan = prepared.plans[number]
    state = jax.eval_shape(lambda: _abstract(prepared, plan))
    sharding = meshes.replicated(prepared.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def _place(tree: Any, prepared: Prepared) -> Any:
    """On every device whole. Copied first: the step donates its state, and a buffer can be donated only once."""
    return meshes.place(jax.tree.map(np.array, tree), meshes.replicated(prepared.mesh))


def _abstract(prepared: Prepared, plan: PhasePlan) -> TrainState:
    """A state with the structure of a phase; its numbers mean nothing."""
    trained, _ = trees.split(prepared.params, plan.mask)
    names = [task.name for task in prepared.corpus.tasks]
    rule_state = gram_gradient.init_rule(plan.rule, names, trained["trunk"])
    average = averaging.make(prepared.experiment.averaging).init(trained)
    return create(prepared.params, plan.optimizer.init(trained), rule_state, 0, average)


def _notes(experiment: Experiment, corpus: Corpus, trunk: Trunk, params: Any, plans: Sequence[PhasePlan]) -> list[str]:
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    added = adapters.notes(trunk.module, params["trunk"]) if isinstance(trunk.module, adapters.Adapted) else []
    said = [
        f"phase {plan.phase.name}: {', '.join(plan.weightless)} "
        f"{'weighs 0 throughout and is' if len(plan.weightless) == 1 else 'weigh 0 throughout and are'} not computed"
        for plan in plans
        if plan.weightless
    ]
    said = [
        *added,
        *said,
        f"{count(len(corpus.tasks), 'task')}, {count(size, 'parameter')}",
        phase_plan.table(experiment, params),
    ]
    averaged = f"dev and test are measured on averaged parameters ({experiment.averaging}), and predictions are made with them"
    named = [f"task {task.name}: {_labels(task)}, measured by {task.metric}" for task in corpus.tasks if task.labels]
    return [*corpus.notes, *named, *said, *([] if experiment.averaging == "none" else [averaged])]


def _labels(task: Task) -> str:
    """How many labels, and the first of them: a stray one is seen before hours are spent on it."""
    more = ", ..." if len(task.labels) > SOME_LABELS else ""
    return f"{count(len(task.labels), 'label')} ({', '.join(task.labels[:SOME_LABELS])}{more})"
