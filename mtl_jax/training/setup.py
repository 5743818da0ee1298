"""From an experiment to a run before its first step, with every check of its input; and its states. Writes nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
from mtl_jax.experiment import Experiment, check, data_seed_of, select, unlabelled_sources
from mtl_jax.models import kernels
from mtl_jax.tasks import Task, label_names
from mtl_jax.tasks.text_head import TextTask
from mtl_jax.training import gram_gradient, held_out, phase_plan, privacy, private_gradient, sharding, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.evaluation import check_criterion
from mtl_jax.training.forward import Savings
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.regularisation import prepare as regularisation
from mtl_jax.training.regularisation.teachers import Teacher
from mtl_jax.training.restore import TrainedRun
from mtl_jax.training.sharding import Placement
from mtl_jax.training.share_trunk import share_trunk
from mtl_jax.training.train_state import TrainState, create, init_on_host, init_params
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
        cut: Whether its state is cut over the devices; else each has all of it.
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
    cut: bool = False

    @property
    def placement(self) -> Placement:
        """How its state lies on the devices."""
        return Placement(self.mesh, self.cut)

    @property
    def savings(self) -> Savings:
        """How its passes save memory."""
        return Savings(self.placement if self.cut else None, self.experiment.remat)


@hiding_if(lambda experiment, **options: experiment.private)
def prepare(experiment: Experiment, *, abstract: bool = False) -> Prepared:
    """Reads the data, loads the trunk, initialises the heads, plans the phases.

    Args:
        experiment: The experiment.
        abstract: Whether Prepared.params are shapes alone, for a run that is planned and not trained.

    Raises:
        UserError: Anything in the experiment, its files or its data is wrong.
    """
    experiment = select(experiment)
    check(experiment)
    privacy.check(experiment)
    check_criterion(experiment.evaluation.criterion, experiment.tasks)
    mesh = meshes.make(experiment.batch.rows, experiment.devices)
    kernels.chosen(experiment.kernels, mesh)  # fails before anything is read
    stream.check_hosts(experiment.batch, jax.process_count())
    private_gradient.check(experiment.optimizer.private, experiment.batch.rows, meshes.shards(mesh))
    unlabelled = unlabelled_sources(experiment)
    sources = [
        dataclasses.replace(source, copies="drop") if source.name in unlabelled and source.copies == "report" else source
        for source in experiment.sources
    ]
    copies = at_start.examine(sources, corpora.read_sources(sources, experiment.tasks, unlabelled))
    data, rows = held_out.take(experiment, copies.data)
    compared = earlier_runs.compare(experiment.sources, data, earlier_workdirs(experiment))
    added = made_rows.add(experiment.sources, experiment.tasks, data, experiment.augment)
    data = added.data
    texts = corpora.texts(experiment.sources, experiment.tasks, data, "train")
    decodes = any(task.decodes for task in experiment.tasks)
    trunk = trunks.build(experiment.trunk, texts, meshes.compute_dtype(experiment.dtype), decodes=decodes)
    trunks.check_remat(trunk, experiment.remat)
    if experiment.batch.row_length > trunk.max_length:
        raise UserError(f"batch.row_length is {experiment.batch.row_length}; the trunk takes {trunk.max_length} at most")
    if experiment.batch.packed:
        trunks.check_packed(trunk, experiment.batch.row_length)
    facts = trunks.facts(trunk)
    tasks = tuple(task.on(facts) for task in experiment.tasks)
    if any(task.begins_as_classifier for task in tasks):
        trunk = trunks.with_classifier(trunk)
    trunk = share_trunk(trunk, experiment, tasks, list(data))
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
    init = functools.partial(init_params, trunk, corpus.tasks, experiment.seed)
    # Parameters that may be more than a device can hold are made on the host.
    on_host = experiment.sharding != "replicated"
    params = jax.eval_shape(init) if abstract else init_on_host(init) if on_host else init()
    opened = regularisation.open_regularisers(experiment, trunk, corpus, texts[:SOME_TEXTS])
    for teacher in opened.teachers.values():
        for split in corpus.splits.values():
            coverage.check(split.values(), (), trunk.tokenizer, teacher.tables)
    projections = regularisation.projections(experiment, opened.teachers, trunks.width(trunk))
    params["heads"] |= jax.eval_shape(lambda: projections) if abstract else projections
    plans = phase_plan.plan(experiment, corpus.tasks, params, opened.compared_tasks, trunks.copies(trunk))
    for plan in plans:
        phase_plan.check_halves(plan, schedule)
    trains_trunk = any(trains for plan in plans for trains in jax.tree.leaves(plan.mask["trunk"]))
    tasks_by_name = {task.name: task for task in corpus.tasks}
    regularisation.check(experiment, tasks_by_name, trunk, params, opened.anchor_runs, trains_trunk)
    notes = _notes(experiment, corpus, trunk, params, plans)
    record = {**copies.record, **({"earlier_runs": compared.record} if compared.record else {})}
    checked = Prepared(experiment, corpus, schedule, trunk, params, plans, mesh, notes, *opened, record, copies.test_copies)
    checked = on_mesh(checked._replace(held_out=measured, facts=run_facts), mesh)
    if experiment.sharding == "replicated":
        return checked
    memory = sharding.memory_of(mesh.devices.flat[0])
    decision = sharding.decide(experiment.sharding, bytes_if_replicated(checked), meshes.shards(mesh), memory)
    return checked._replace(cut=decision.cut, notes=[*notes, decision.note])


def bytes_if_replicated(prepared: Prepared) -> int:
    """Bytes of state, gradients and references on a device that has all of them, in the phase that needs most."""

    def of_plan(plan: PhasePlan) -> int:
        state = _shapes(prepared, plan)
        trained, _ = trees.split(prepared.params, plan.mask)
        gradients = 1 + (len(prepared.corpus.tasks) if phase_plan.needs_task_gradients(plan.rule) else 0)
        starts = any(part.level == "parameters" and part.reads_start for part in plan.regularisers)
        copies = gradients + bool(starts or plan.mixout_paths)
        return sharding.bytes_of(state) + copies * sharding.bytes_of(trained)

    teachers = [teacher.params for teacher in prepared.teachers.values()]
    return max(map(of_plan, prepared.plans)) + sharding.bytes_of(teachers)


def on_mesh(prepared: Prepared, mesh: Mesh) -> Prepared:
    """The run on other devices, its trunk with the kernels for these.

    Raises:
        UserError: There are no such kernels for them, or a rule of the run cannot have them.
    """
    trunk, name = prepared.trunk, prepared.experiment.kernels
    if any(plan.rule.held_out is not None for plan in prepared.plans):
        if name == "fused":
            raise UserError(
                "kernels is fused, but a weighting rule that reads held-out rows needs derivatives along a direction, which "
                "fused kernels have not: set kernels to auto"
            )
        name = "plain" if name == "auto" else name
    module = kernels.with_kernels(trunk.module, name, mesh)
    return prepared._replace(mesh=mesh, trunk=trunk._replace(module=module))


def earlier_workdirs(experiment: Experiment) -> list[tuple[str, str]]:
    """(field, path) of the runs that an experiment begins from, fuses or imitates; a path may also be that of a checkpoint."""
    teachers = [part for part in experiment.regularisers if isinstance(part, Distillation)]
    paths = [(FIELD, experiment.init_from.path), *((f"{part.name}.teacher", part.teacher) for part in teachers)]
    paths += [("sharing.runs", path) for path in experiment.sharing.earlier_runs()]
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
    width = trunks.width(prepared.trunk)
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
    return jax.ShapeDtypeStruct((texts, trunks.width(prepared.trunk)), np.float32)


def initial_state(prepared: Prepared) -> TrainState:
    """The state before the first step, on the devices."""
    plan, placement = prepared.plans[0], prepared.placement
    make = functools.partial(_state, prepared, plan, prepared.experiment.seed)
    # Moments of a state that is cut are made on the devices: no device, and no host, need have all of them.
    params = placement.place(jax.tree.map(np.array, prepared.params)) if prepared.cut else prepared.params
    state = _made(make, params, placement=placement) if prepared.cut else _place(make(params), prepared)
    if prepared.experiment.optimizer.private.secret:
        state = state._replace(key=_place(privacy.noise_key(prepared.experiment), prepared))
    return state


def start_phase(plan: PhasePlan, state: TrainState, prepared: Prepared) -> TrainState:
    """The state at the start of a phase: new optimizer state and average, and rule state where the rule changes.

    The optimizer's moments of leaves that trained in the phase before are kept.
    """
    trained, _ = trees.split(state.params, plan.mask)

    def make(trained: Any) -> dict[str, Any]:
        average = averaging.make(prepared.experiment.averaging).init(trained)
        changed: dict[str, Any] = {"opt_state": plan.optimizer.init(trained), "average": average}
        if plan.resets_rule:
            names = [task.name for task in prepared.corpus.tasks]
            changed["rule_state"] = gram_gradient.init_rule(plan.rule, names, trained["trunk"])
        return changed

    fresh = _made(make, trained, placement=prepared.placement) if prepared.cut else make(trained)
    changed = fresh | {"opt_state": optax_rules.carry(state.opt_state, fresh["opt_state"])}
    return state._replace(**(prepared.placement.moved(changed) if prepared.cut else _place(changed, prepared)))


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
    state: TrainState = prepared.placement.shapes(_shapes(prepared, prepared.plans[number]))
    return state


def _place(tree: Any, prepared: Prepared) -> Any:
    """A copy on the devices: the step donates its state, and a buffer can be donated only once."""
    return prepared.placement.place(jax.tree.map(np.array, tree))


def _made(make: Callable[..., Any], *trees_on_devices: Any, placement: Placement) -> Any:
    """The result of a function of trees on the devices, laid out as they are; no buffer of theirs is in it."""

    def copied(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype, copy=True), make(*arguments))

    shardings = placement.of(jax.eval_shape(copied, *trees_on_devices))
    return jax.jit(copied, out_shardings=shardings)(*trees_on_devices)


def _shapes(prepared: Prepared, plan: PhasePlan) -> TrainState:
    """Shapes of the state of a phase."""
    state: TrainState = jax.eval_shape(functools.partial(_state, prepared, plan, 0), prepared.params)
    return state


def _state(prepared: Prepared, plan: PhasePlan, seed: int, params: Any) -> TrainState:
    """The state before the first step of a phase, if it was the first."""
    trained, _ = trees.split(params, plan.mask)
    names = [task.name for task in prepared.corpus.tasks]
    rule_state = gram_gradient.init_rule(plan.rule, names, trained["trunk"])
    average = averaging.make(prepared.experiment.averaging).init(trained)
    return create(params, plan.optimizer.init(trained), rule_state, seed, average)


def _notes(experiment: Experiment, corpus: Corpus, trunk: Trunk, params: Any, plans: Sequence[PhasePlan]) -> list[str]:
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    added = adapters.notes(trunk.module, params["trunk"]) if isinstance(trunk.module, adapters.Adapted) else []
    lines = [
        f"phase {plan.phase.name}: {', '.join(plan.zero_weight_tasks)} "
        f"{'weighs 0 throughout and is' if len(plan.zero_weight_tasks) == 1 else 'weigh 0 throughout and are'} not computed"
        for plan in plans
        if plan.zero_weight_tasks
    ]
    begun = [
        task.beginning(trunk.classifier or {}, params["heads"][task.name])
        for task in corpus.tasks
        if isinstance(task, TextTask) and task.classifier is not None
    ]
    lines = [
        *added,
        *begun,
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
