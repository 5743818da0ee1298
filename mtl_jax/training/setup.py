"""From an experiment to a run before its first step, with every check of its input; and its states. Writes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mtl_jax import trunks
from mtl_jax.audit import at_start, earlier_runs
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.row_texts import hiding_if
from mtl_jax.data import corpus as corpora
from mtl_jax.data import coverage, made_rows, stream
from mtl_jax.data.batches import Batch
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.examples import Examples
from mtl_jax.data.mixture_schedule import ScheduleSequence
from mtl_jax.data.poisson import PoissonSchedule
from mtl_jax.data.stream import MixturePhase
from mtl_jax.experiment import Experiment, check, data_seed_of, select
from mtl_jax.tasks import Task, label_names
from mtl_jax.training import gram_gradient, held_out, phase_plan, privacy, private_gradient, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.evaluation import check_criterion
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.regularisation import prepare as regularisation
from mtl_jax.training.regularisation.teachers import Teacher
from mtl_jax.training.restore import TrainedRun
from mtl_jax.training.train_state import TrainState, create, init_params
from mtl_jax.transfer import adapters, averaging, optax_rules
from mtl_jax.transfer.loading import FIELD
from mtl_jax.transfer.regularisers import Distillation
from mtl_jax.trunks import Pretrained, Trunk

SOME_LABELS = 10  # labels of a task in the log before training
SOME_TEXTS = 50  # texts on which a teacher's tokenizer is compared with the run's


class Prepared(NamedTuple):
    """A run before its first step.

    Attributes:
        experiment: The experiment, tasks selected.
        corpus: Its data; corpus.tasks have the label sets found in it.
        schedule: The sources of the rows of each batch.
        trunk: The loaded trunk.
        params: The initial parameters, on the host or on the default device, float32.
        plans: The phases.
        mesh: The devices.
        notes: Lines for the log before training.
        teachers: {distillation: the model that it imitates}.
        anchor_runs: {EWC: the run whose parameters it stays near}; only those that name another run.
        compared_tasks: {regulariser: the tasks whose outputs it compares}; only those that name tasks or imitate logits.
        copies: The numbers of training rows that are copies of held-out rows, for data.json; {} where there are none.
        test_copies: {source: {place of a test row: kind of its closest copy in train}}.
        held_out: The training rows that a weighting rule measures weights on and that are not trained on; () if none does.
        facts: What the run knows of itself at a step, beside its metrics, such as the epsilon that it has spent.
    """

    experiment: Experiment
    corpus: Corpus
    schedule: ScheduleSequence | PoissonSchedule
    trunk: Trunk
    params: Any
    plans: list[PhasePlan]
    mesh: Mesh
    notes: list[str]
    teachers: dict[str, Teacher]
    anchor_runs: dict[str, TrainedRun]
    compared_tasks: dict[str, list[str]]
    copies: dict[str, Any]
    test_copies: Mapping[str, Mapping[str, str]]
    held_out: tuple[Examples, ...] = ()
    facts: privacy.Facts = privacy.Facts()


@hiding_if(lambda experiment: experiment.private)
def prepare(experiment: Experiment) -> Prepared:
    """Reads the data, loads the trunk, initialises the heads, plans the phases.

    Raises:
        UserError: Anything in the experiment, its files or its data is wrong.
    """
    experiment = select(experiment)
    check(experiment)
    privacy.check(experiment)
    check_criterion(experiment.evaluation.criterion, experiment.tasks)
    mesh = meshes.make(experiment.batch.rows, experiment.devices)
    stream.check_hosts(experiment.batch, jax.process_count())
    private_gradient.check(experiment.optimizer.private, experiment.batch.rows, meshes.shards(mesh))
    copies = at_start.examine(experiment.sources, corpora.read_sources(experiment.sources, experiment.tasks))
    data, rows = held_out.take(experiment, copies.data)
    compared = earlier_runs.compare(experiment.sources, data, earlier_workdirs(experiment))
    added = made_rows.add(experiment.sources, experiment.tasks, data, experiment.augment)
    data = added.data
    texts = corpora.texts(experiment.sources, experiment.tasks, data, "train")
    decodes = any(task.decodes for task in experiment.tasks)
    trunk = trunks.build(experiment.trunk, texts, meshes.compute_dtype(experiment.dtype), decodes=decodes)
    if experiment.batch.row_length > trunk.max_length:
        raise UserError(f"batch.row_length is {experiment.batch.row_length}; the trunk takes {trunk.max_length} at most")
    if experiment.batch.packed:
        trunks.check_packed(trunk, experiment.batch.row_length)
    facts = trunks.facts(trunk)
    tasks = tuple(task.on(facts) for task in experiment.tasks)
    trunk = trunks.adapt(trunk, experiment.adapters, len(data))
    corpus = corpora.make_corpus(experiment.sources, tasks, data, trunk.tokenizer, experiment.batch.row_length)
    corpus = corpora.with_augmentations(
        corpus,
        experiment.sources,
        experiment.augment,
        added,
        tokenizer=trunk.tokenizer,
        token_rows=trunks.tables(trunk).tokens,
        max_length=experiment.batch.row_length,
        seed=data_seed_of(experiment),
    )
    corpus.notes.extend([*copies.notes, *compared.notes])
    if experiment.private and not isinstance(experiment.trunk, Pretrained):
        corpus.notes.append(
            "private: the vocabulary in trunk/ is made of words of the texts; a pretrained trunk brings its own"
        )
    measured = held_out.examples_of(rows, experiment.sources, corpus, trunk.tokenizer, experiment.batch.row_length)
    _check_tokens(experiment, corpus, trunks.tables(trunk), trunk.tokenizer)
    text_evaluation.check(corpus.tasks, trunk)
    schedule = stream.schedule(corpus, experiment.batch, mixture_phases(experiment))
    experiment, run_facts, budget_notes = privacy.within_budget(experiment, corpus, schedule)
    corpus.notes.extend(budget_notes)
    params = init_params(trunk, corpus.tasks, experiment.seed)
    opened = regularisation.open_regularisers(experiment, trunk, corpus, texts[:SOME_TEXTS])
    for teacher in opened.teachers.values():
        for split in corpus.splits.values():
            coverage.check(split.values(), (), trunk.tokenizer, teacher.tables)
    params["heads"] |= regularisation.projections(experiment, opened.teachers, trunks.width(trunk, params["trunk"]))
    plans = phase_plan.plan(experiment, corpus.tasks, params, opened.compared_tasks)
    for plan in plans:
        phase_plan.check_halves(plan, schedule)
    trains_trunk = any(trains for plan in plans for trains in jax.tree.leaves(plan.mask["trunk"]))
    tasks_by_name = {task.name: task for task in corpus.tasks}
    regularisation.check(experiment, tasks_by_name, trunk, params, opened.anchor_runs, trains_trunk)
    notes = _notes(experiment, corpus, trunk, params, plans)
    record = {**copies.record, **({"earlier_runs": compared.record} if compared.record else {})}
    checked = Prepared(experiment, corpus, schedule, trunk, params, plans, mesh, notes, *opened, record, copies.test_copies)
    return checked._replace(held_out=measured, facts=run_facts)


def earlier_workdirs(experiment: Experiment) -> list[tuple[str, str]]:
    """(field, path) of the runs that an experiment begins from or imitates; a path may also be that of a checkpoint."""
    teachers = [part for part in experiment.regularisers if isinstance(part, Distillation)]
    paths = [(FIELD, experiment.init_from.path), *((f"{part.name}.teacher", part.teacher) for part in teachers)]
    return [(field, path) for field, path in paths if path]


def _check_tokens(experiment: Experiment, corpus: Corpus, tables: coverage.Tables, tokenizer: Any) -> None:
    """Checks that the token table has a row for every token; notes how many words the vocabulary lacks.

    Raises:
        UserError: A token has no row; names its file and line.
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


def mixture_phases(experiment: Experiment) -> tuple[MixturePhase, ...]:
    """The mixtures of a run, in order: that of each phase with its own; consecutive other phases share that of the batches."""
    batch, mixtures = experiment.batch, []
    named: list[bool] = []
    for phase in experiment.phases:
        if phase.mixture:
            mixtures.append(MixturePhase(phase.steps, phase.mixture, "", phase.shares))
        elif named and not named[-1]:
            mixtures[-1] = mixtures[-1]._replace(steps=mixtures[-1].steps + phase.steps)
        else:
            mixtures.append(MixturePhase(phase.steps, batch.mixture, batch.mixture_end, batch.shares))
        named.append(bool(phase.mixture))
    return tuple(mixtures)


def with_seed(prepared: Prepared, seed: int) -> Prepared:
    """The run with the initial parameters of another seed, before init_from loads any."""
    params = init_params(prepared.trunk, prepared.corpus.tasks, seed)
    experiment = dataclasses.replace(prepared.experiment, seed=seed)
    width = trunks.width(prepared.trunk, params["trunk"])
    params["heads"] |= regularisation.projections(experiment, prepared.teachers, width)
    return prepared._replace(experiment=experiment, params=params)


def held_out_batches(prepared: Prepared) -> Batch | None:
    """StepInputs.held_out of a run, on its devices."""
    corpus, batching = prepared.corpus, prepared.experiment.batch
    return held_out.batches(prepared.held_out, corpus.tasks, batching, corpus.has_types, prepared.mesh)


def features_shape(prepared: Prepared, plan: PhasePlan) -> jax.ShapeDtypeStruct | None:
    """The table of pooled vectors of a phase whose trunk is frozen; None: the phase has none."""
    if not plan.cached_features:
        return None
    texts = sum(len(part.tokens) for split in prepared.corpus.splits.values() for part in split.values())
    return jax.ShapeDtypeStruct((texts, trunks.width(prepared.trunk, prepared.params["trunk"])), np.float32)


def initial_state(prepared: Prepared) -> TrainState:
    """The state before the first step, replicated on every device."""
    plan = prepared.plans[0]
    names = [task.name for task in prepared.corpus.tasks]
    trained, _ = trees.split(prepared.params, plan.mask)
    rule_state = gram_gradient.init_rule(plan.rule, names, trained["trunk"])
    average = averaging.make(prepared.experiment.averaging).init(trained)
    state = create(prepared.params, plan.optimizer.init(trained), rule_state, prepared.experiment.seed, average)
    if prepared.experiment.optimizer.private.secret:
        state = state._replace(key=privacy.noise_key(prepared.experiment))
    return _place(state, prepared)


def start_phase(plan: PhasePlan, state: TrainState, prepared: Prepared) -> TrainState:
    """The state at the start of a phase: new optimizer state and average, and rule state where the rule changes.

    The optimizer's moments of leaves that trained in the phase before are kept.
    """
    trained, _ = trees.split(state.params, plan.mask)
    average = averaging.make(prepared.experiment.averaging).init(trained)
    moments = optax_rules.carry(state.opt_state, plan.optimizer.init(trained))
    changed: dict[str, Any] = {"opt_state": moments, "average": average}
    if plan.resets_rule:
        names = [task.name for task in prepared.corpus.tasks]
        changed["rule_state"] = gram_gradient.init_rule(plan.rule, names, trained["trunk"])
    return state._replace(**_place(changed, prepared))


def template(prepared: Prepared, number: int, step: int) -> TrainState:
    """Shapes and shardings of the state after `step` steps, in phase `number`, to restore a checkpoint.

    Raises:
        UserError: The checkpoint was made with other phases.
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
    """A copy, replicated on every device: the step donates its state, and a buffer can be donated only once."""
    return meshes.place(jax.tree.map(np.array, tree), meshes.replicated(prepared.mesh))


def _abstract(prepared: Prepared, plan: PhasePlan) -> TrainState:
    """A state with the structure of a phase; its numbers have no meaning."""
    trained, _ = trees.split(prepared.params, plan.mask)
    names = [task.name for task in prepared.corpus.tasks]
    rule_state = gram_gradient.init_rule(plan.rule, names, trained["trunk"])
    average = averaging.make(prepared.experiment.averaging).init(trained)
    return create(prepared.params, plan.optimizer.init(trained), rule_state, 0, average)


def _notes(experiment: Experiment, corpus: Corpus, trunk: Trunk, params: Any, plans: Sequence[PhasePlan]) -> list[str]:
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    added = adapters.notes(trunk.module, params["trunk"]) if isinstance(trunk.module, adapters.Adapted) else []
    lines = [
        f"phase {plan.phase.name}: {', '.join(plan.zero_weight_tasks)} "
        f"{'weighs 0 throughout and is' if len(plan.zero_weight_tasks) == 1 else 'weigh 0 throughout and are'} not computed"
        for plan in plans
        if plan.zero_weight_tasks
    ]
    lines = [
        *added,
        *lines,
        f"{count(len(corpus.tasks), 'task')}, {count(size, 'parameter')}",
        phase_plan.table(experiment, params),
    ]
    averaged = f"dev and test are measured on averaged parameters ({experiment.averaging}), and predictions are made with them"
    labels = [f"task {task.name}: {_labels(task)}, measured by {task.metric}" for task in corpus.tasks if task.labels]
    return [*corpus.notes, *labels, *lines, *([] if experiment.averaging == "none" else [averaged])]


def _labels(task: Task) -> str:
    """The number of labels and the first of them, so that a wrong label is seen before hours of training."""
    more = ", ..." if len(task.labels) > SOME_LABELS else ""
    labels = label_names.in_line(task.labels, task.shown_labels)[:SOME_LABELS]
    return f"{count(len(task.labels), 'label')} ({', '.join(labels)}{more})"
