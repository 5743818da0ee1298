"""The regularisers of a run before its first step: their teachers and other runs are opened, and their fields checked."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mtl_jax import trunks
from mtl_jax.augment.mixes import Mix, NeighbourSmoothing
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.trees import leaves_of, matching
from mtl_jax.data.corpus import Corpus
from mtl_jax.experiment import Experiment
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training import restore
from mtl_jax.training.regularisation import fisher, mixing, pseudo_rows
from mtl_jax.training.regularisation.teachers import Teacher, check_vocabulary, open_teacher, tasks_to_imitate
from mtl_jax.training.restore import TrainedRun
from mtl_jax.transfer.regulariser_checks import tasks_named_by
from mtl_jax.transfer.regularisers import EWC, FIELD, Distillation, RDrop, Regulariser
from mtl_jax.transfer.unlabelled import KINDS, Consistency, SelfTraining
from mtl_jax.trunks import Trunk
from mtl_jax.weighting import schedules


class OpenedRegularisers(NamedTuple):
    """The models that regularisers need.

    Attributes:
        teachers: As in Prepared; so are anchor_runs and compared_tasks.
    """

    teachers: dict[str, Teacher]
    anchor_runs: dict[str, TrainedRun]
    compared_tasks: dict[str, list[str]]


def active_in_phase(experiment: Experiment, number: int, steps: range) -> tuple[Regulariser, ...]:
    """The regularisers whose phase has begun, and whose weight is not 0 in all steps of a phase.

    Args:
        experiment: The experiment.
        number: The phase's place, from 0.
        steps: Its steps.
    """
    started = {"", *(phase.name for phase in experiment.phases[: number + 1])}
    return tuple(regulariser for regulariser in _active(experiment, steps) if regulariser.phase in started)


def open_regularisers(experiment: Experiment, trunk: Trunk, corpus: Corpus, texts: Sequence[str]) -> OpenedRegularisers:
    """Opens the teachers and other runs of all regularisers whose weight is not always 0.

    Args:
        experiment: The experiment.
        trunk: Its trunk.
        corpus: Its data.
        texts: Some training texts.

    Raises:
        UserError: One of them cannot be opened, or does not fit this run.
    """
    opened = OpenedRegularisers({}, {}, {})
    tasks = {task.name: task for task in corpus.tasks}
    length, dtype = experiment.batch.row_length, meshes.compute_dtype(experiment.dtype)
    for regulariser in _active(experiment, _all_steps(experiment)):
        name = regulariser.name
        if isinstance(regulariser, Distillation):
            teacher = open_teacher(regulariser, trunk, tasks, length, texts, dtype, packed=experiment.batch.packed)
            opened.teachers[name] = teacher
            if regulariser.of == "logits":
                opened.compared_tasks[name] = tasks_to_imitate(regulariser, teacher, tasks)
        elif isinstance(regulariser, SelfTraining | Consistency):
            opened.compared_tasks[name] = [task.name for task in _labelling(regulariser, experiment, corpus, trunk)]
        elif regulariser.level == "outputs" and tasks_named_by(regulariser):
            opened.compared_tasks[name] = list(tasks_named_by(regulariser))
        elif isinstance(regulariser, EWC):
            if regulariser.run:
                run = restore.open_finished(Path(regulariser.run), f"{FIELD}: run of {name}")
                fisher.check_source(run, regulariser)
                check_vocabulary(trunk.tokenizer, run.trunk.tokenizer, texts, f"{FIELD}: run of {name}, {regulariser.run},")
                opened.anchor_runs[name] = run
            elif regulariser.source not in corpus.splits["train"]:
                raise unknown(f"source of {name}:", regulariser.source, corpus.splits["train"])
            learned = opened.anchor_runs[name].tasks if regulariser.run else corpus.tasks
            fisher.check_labels(regulariser, [task for task in learned if task.source == regulariser.source])
    return opened


def _labelling(regulariser: SelfTraining | Consistency, experiment: Experiment, corpus: Corpus, trunk: Trunk) -> list[Task]:
    """The tasks that label the rows of a regulariser's source.

    Raises:
        UserError: One of them cannot, or its phase comes too early.
    """
    pairs = {source.name: bool(source.pair) for source in experiment.sources}
    named = regulariser.tasks or [task.name for task in corpus.tasks if task.compared_as and task.level == "example"]
    tasks = [task for task in corpus.tasks if task.name in named]
    if isinstance(regulariser, SelfTraining):
        if not regulariser.tasks:
            tasks = [task for task in tasks if task.compared_as in KINDS]
        pseudo_rows.check(regulariser, tasks, [task for task in corpus.tasks if task.source == regulariser.source])
        if regulariser.phase in ("", experiment.phases[0].name) and not experiment.init_from.path:
            raise UserError(
                f"{FIELD}: phase of {regulariser.name} is {regulariser.phase!r}, where the model has learned nothing yet: "
                "name a later phase, or begin from a trained model by init_from"
            )
        pseudo_rows.check_dropout(regulariser.choose, trunk, tasks, f"{FIELD}: {regulariser.name}")
        _check_pairs(regulariser, tasks, pairs)
        return tasks
    if not tasks:
        raise UserError(f"{FIELD}: {regulariser.name}: there is no task whose outputs can be compared")
    for task in tasks:
        if task.level != "example" or not task.compared_as:
            raise UserError(
                f"{FIELD}: {regulariser.name}: outputs of a {type(task).__name__} such as {task.name!r} cannot be compared"
            )
    others = [other.name for other in experiment.regularisers if other.doubles_rows]
    if len(others) > 1:
        raise UserError(f"{FIELD}: {listed(others)} each read every row twice; leave all but one out")
    _check_pairs(regulariser, tasks, pairs)
    return tasks


def _check_pairs(regulariser: SelfTraining | Consistency, tasks: Sequence[Task], pairs: Mapping[str, bool]) -> None:
    """Raises UserError where a source has pairs of texts, and one of the tasks reads single ones, or the other way round."""
    for task in tasks:
        if regulariser.source and pairs[regulariser.source] != pairs[task.source]:
            sides = [name for name, is_pair in sorted(pairs.items()) if is_pair and name in (regulariser.source, task.source)]
            raise UserError(
                f"{FIELD}: {regulariser.name}: of {regulariser.source!r} and {task.source!r}, which task {task.name!r} reads, "
                f"only {sides[0]!r} has pairs of texts"
            )


def projections(experiment: Experiment, teachers: Mapping[str, Teacher], width: int) -> dict[str, Any]:
    """{distillation: its projection f32[trunk's width, teacher's width]}, where these differ; trained among the heads.

    Args:
        experiment: The experiment; its seed decides the numbers.
        teachers: As in Prepared.
        width: The trunk's.
    """
    kernels = {}
    for regulariser in experiment.regularisers:
        if isinstance(regulariser, Distillation) and regulariser.name in teachers:
            teacher_width = teachers[regulariser.name].width
            if regulariser.of != "logits" and teacher_width != width:
                key = jax.random.fold_in(jax.random.key(experiment.seed), zlib.crc32(regulariser.name.encode()))
                kernel = jax.nn.initializers.lecun_normal()(key, (width, teacher_width))
                kernels[regulariser.name] = {"projection": {"kernel": kernel}}
    return kernels


def check(
    experiment: Experiment,
    tasks: Mapping[str, Task],
    trunk: Trunk,
    params: Any,
    anchor_runs: Mapping[str, TrainedRun],
    trains_trunk: bool,
) -> None:
    """Checks that regularisers match the parameters, and can have an effect.

    Args:
        experiment: The experiment.
        tasks: Its tasks, with their label sets.
        trunk: Its trunk.
        params: Its parameters.
        anchor_runs: As in Prepared.
        trains_trunk: Whether any part of the trunk trains in some phase.

    Raises:
        UserError: An expression matches no parameter, another run's parameters have other shapes, outputs cannot be compared,
            or there is no dropout that R-Drop could vary.
    """
    leaves = leaves_of(params)
    for regulariser in _active(experiment, _all_steps(experiment)):
        if regulariser.reads_vectors and trunks.copies(trunk) > 1:
            raise UserError(
                f"{FIELD}: {regulariser.name} reads the vectors of a row, and tasks of one source have vectors of their own "
                "here: declare the same file as a second source, or leave the sharing at Hard()"
            )
    if experiment.mixout.p:
        _matches("mixout.parameters", experiment.mixout.parameters, leaves)
    for regulariser in _active(experiment, _all_steps(experiment)):
        name = regulariser.name
        matched = {
            field: _matches(f"{FIELD}: {field} of {name}", getattr(regulariser, field), leaves)
            for field in regulariser.must_match
        }
        if isinstance(regulariser, EWC) and regulariser.run:
            check_shapes(regulariser, matched["parameters"], leaves, leaves_of(anchor_runs[name].params))
        elif isinstance(regulariser, Mix | NeighbourSmoothing):
            mixing.tasks_of(regulariser, tuple(tasks.values()))
            if isinstance(regulariser, Mix):
                mixing.check_layer(regulariser, trunk)
        elif isinstance(regulariser, RDrop):
            _check_r_drop(regulariser, tasks, trunk, (*experiment.adapters, experiment.sharing), trains_trunk)


def _active(experiment: Experiment, steps: range) -> list[Regulariser]:
    """The regularisers whose weight is not 0 in all of the steps."""
    return [
        regulariser
        for regulariser in experiment.regularisers
        if schedules.over(regulariser.weight, steps, regulariser.name).any()
    ]


def _all_steps(experiment: Experiment) -> range:
    return range(sum(phase.steps for phase in experiment.phases))


def _matches(where: str, pattern: str, leaves: Mapping[str, Any]) -> list[str]:
    paths = matching(pattern, leaves)
    if not paths:
        first, *_, last = leaves
        raise UserError(f"{where}, {pattern!r}, matches no parameter; paths look like {first} and {last}")
    return paths


def check_shapes(regulariser: EWC, paths: Collection[str], leaves: Mapping[str, Any], other_leaves: Mapping[str, Any]) -> None:
    """Raises UserError where another run's parameters have other shapes than this run's.

    Args:
        regulariser: Names the other run.
        paths: The parameters that are compared.
        leaves: {path: leaf} of this run.
        other_leaves: {path: leaf} of the other run.
    """
    for path in paths:
        shape = leaves[path].shape
        if path not in other_leaves or other_leaves[path].shape != shape:
            other_shape = f"of shape {other_leaves[path].shape}" if path in other_leaves else "absent"
            raise UserError(
                f"{FIELD}: run of {regulariser.name}: {path} is {other_shape} in {regulariser.run} and of shape {shape} here: "
                "it must be a run with the same trunk"
            )


def _check_r_drop(
    regulariser: RDrop, tasks: Mapping[str, Task], trunk: Trunk, adapters: Sequence[Any], trains_trunk: bool
) -> None:
    chosen = [tasks[name] for name in regulariser.tasks] or [task for task in tasks.values() if task.compared_as]
    for task in chosen:
        if not task.compared_as:
            raise UserError(
                f"{FIELD}: {regulariser.name}: outputs of a {type(task).__name__} such as {task.name!r} cannot be compared"
            )
    if not chosen:
        raise UserError(f"{FIELD}: {regulariser.name}: there is no task whose outputs can be compared")
    config = getattr(trunk.module, "config", None)
    rates = [getattr(config, name) for name in dir(config) if "dropout" in name]
    rates = [*rates, *(getattr(adapter, "dropout", 0.0) for adapter in adapters)] if trains_trunk else []
    in_trunk = any(rates) or (trains_trunk and trunks.draws_dropout(trunk))
    if not in_trunk and not any(task.dropout for task in chosen):
        raise UserError(
            f"{FIELD}: {regulariser.name} compares two passes that differ by dropout, but there is no dropout: set "
            "trunk.dropout or a task's"
        )
