"""From an experiment to a run before its first step, with every check of its input. Writes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from mtl_jax import trunks
from mtl_jax.audit import at_start, earlier_runs
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.row_texts import hiding_if
from mtl_jax.data import corpus as corpora
from mtl_jax.data import coverage, made_rows, stream
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.stream import MixturePhase
from mtl_jax.experiment import Experiment, data_seed_of, select, unlabelled_sources
from mtl_jax.experiment_checks import check
from mtl_jax.models import kernels
from mtl_jax.tasks import Task, label_names
from mtl_jax.tasks.text_head import TextTask
from mtl_jax.training import held_out, phase_plan, privacy, private_gradient, sharding, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.evaluation import check_criterion
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.phase_state import bytes_if_replicated
from mtl_jax.training.prepared import Prepared, on_mesh
from mtl_jax.training.regularisation import prepare as regularisation
from mtl_jax.training.share_trunk import share_trunk
from mtl_jax.training.train_state import init_params, made_by_cpu, on_host
from mtl_jax.transfer import adapters
from mtl_jax.transfer.loading import FIELD
from mtl_jax.trunks import Pretrained, Trunk

SOME_LABELS = 10  # labels of a task in the log before training
SOME_TEXTS = 50  # texts on which a teacher's tokenizer is compared with the run's


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
    # Parameters that may be more than a device can hold are made on the host.
    making = contextlib.nullcontext if experiment.sharding == "replicated" else made_by_cpu
    with making():
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
    arrays = {name: on_host(getattr(trunk, name)) for name in ("params", "beside", "head", "classifier")}
    trunk = trunk._replace(**arrays)  # the devices are for the state
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
    if abstract:
        params = jax.eval_shape(init)
    else:
        with making():
            params = on_host(init())
    opened = regularisation.open_regularisers(experiment, trunk, corpus, texts[:SOME_TEXTS])
    for teacher in opened.teachers.values():
        for split in corpus.splits.values():
            coverage.check(split.values(), (), trunk.tokenizer, teacher.tables)
    projections = regularisation.projections(experiment, opened.teachers, trunks.width(trunk))
    params["heads"] |= jax.eval_shape(lambda: projections) if abstract else projections
    of_sources = [[task.name for task in corpus.tasks if task.source == source] for source in data]
    own = adapters.own_parts(trunk.module, of_sources)
    plans = phase_plan.plan(experiment, corpus.tasks, params, opened.compared_tasks, trunks.copies(trunk), own)
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


def earlier_workdirs(experiment: Experiment) -> list[tuple[str, str]]:
    """(field, path) of the runs, or checkpoints, that an experiment begins from, fuses, imitates or stays near."""
    paths = [(FIELD, experiment.init_from.path)]
    for regulariser in experiment.regularisers:
        paths += [(f"{regulariser.name}.{field}", path) for field, path in regulariser.earlier_runs().items()]
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


def _notes(experiment: Experiment, corpus: Corpus, trunk: Trunk, params: Any, plans: Sequence[PhasePlan]) -> list[str]:
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    added = adapters.notes(trunk.module, params["trunk"]) if isinstance(trunk.module, adapters.Adapted) else []
    lines = [
        f"phase {plan.phase.name}: {', '.join(plan.zero_weight_tasks)} "
        f"{'weighs 0 throughout and is' if len(plan.zero_weight_tasks) == 1 else 'weigh 0 throughout and are'} not computed"
        for plan in plans
        if plan.zero_weight_tasks
    ]
    head_notes = [
        task.beginning(trunk.classifier or {}, params["heads"][task.name])
        for task in corpus.tasks
        if isinstance(task, TextTask) and task.classifier is not None
    ]
    lines = [
        *added,
        *head_notes,
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
