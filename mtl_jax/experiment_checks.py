"""The checks of an experiment: its fields, one by one and together, before anything is read or written."""

from __future__ import annotations

import string

from mtl_jax import weighting
from mtl_jax.core import configuration
from mtl_jax.core.errors import UserError, count, listed, unknown
from mtl_jax.data import augmentations, batch_shape, mixture, units
from mtl_jax.experiment import Experiment, Phase, rule_of, weighs_heads
from mtl_jax.models import remat
from mtl_jax.models.kernels import KERNELS
from mtl_jax.sharing import base as sharing
from mtl_jax.transfer import adapters as adapting
from mtl_jax.transfer import averaging, freezing, loading, regulariser_checks
from mtl_jax.transfer import optimizer as optimizers
from mtl_jax.trunks import Pretrained

BASELINES = ("none", "constant", "probe")
DTYPES = ("auto", "float32", "bfloat16")
SHARDINGS = ("replicated", "fsdp", "auto")
NAME_CHARACTERS = set(string.ascii_letters + string.digits + "_-")


def check(experiment: Experiment) -> None:
    """Checks an experiment before anything is read or written.

    Raises:
        UserError: One line that names the field and says what to write.
    """
    configuration.check_kinds(experiment)
    configuration.check(experiment, coarse=True)  # refuses what the checks below cannot compare; they say more
    _check_names(experiment)
    steps = _check_phases(experiment)
    _check_tasks(experiment)
    _check_languages(experiment)
    loading.check(experiment.init_from)
    adapting.check(experiment.adapters)
    sharing.check(experiment.sharing, [adapter.name for adapter in experiment.adapters])
    for adapter in experiment.adapters:
        adapter.check_rows(experiment.batch.slots)
    names, phases = [task.name for task in experiment.tasks], [phase.name for phase in experiment.phases]
    regulariser_checks.check(experiment.regularisers, experiment.mixout, names, phases, steps)
    for regulariser in experiment.regularisers:
        for source in regulariser.sources:
            if source not in [declared.name for declared in experiment.sources]:
                raise unknown(f"source of {regulariser.name}:", source, [declared.name for declared in experiment.sources])
    _check_settings(experiment)
    batch_shape.check(experiment.batch)
    optimizers.check(experiment.optimizer)
    averaging.make(experiment.averaging)
    augmentations.check(
        experiment.sources, experiment.tasks, experiment.augment, private=bool(experiment.optimizer.private.clip)
    )
    configuration.check(experiment)
    experiment.trunk.check()


def _check_names(experiment: Experiment) -> None:
    for kind, names in {
        "task": [task.name for task in experiment.tasks],
        "source": [source.name for source in experiment.sources],
        "phase": [phase.name for phase in experiment.phases],
    }.items():
        if not names:
            raise UserError(f"the experiment has no {kind}")
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise UserError(f"{kind} names must differ: {listed(sorted(repeated))}")
        for name in names:
            if not name or not set(name) <= NAME_CHARACTERS:
                raise UserError(f"{kind} name {name!r}: use letters, digits, '_' and '-' only")


def _check_phases(experiment: Experiment) -> int:
    """Checks the phases, and returns the number of steps of the run."""
    start = 0
    for phase in experiment.phases:
        if phase.steps < 1:
            raise UserError(f"phase {phase.name!r}: steps is {phase.steps}; it must be at least 1")
        if phase.learning_rate is not None and not phase.learning_rate >= 0:
            raise UserError(f"phase {phase.name!r}: learning_rate is {phase.learning_rate}; it must not be negative")
        freezing.check(phase.rules)
        for rule in phase.rules:
            optimizers.check_rule(experiment.optimizer, rule)
        if phase.mixture or phase.shares:
            mixture.check(phase.mixture, "", phase.shares, f"phases.{phase.name}")
        rule_of(experiment, phase).init([task.name for task in experiment.tasks])
        steps = range(start, start + phase.steps)
        weighting.check_steps(phase.weights or experiment.weights, steps)
        _check_some_weight(experiment, phase, steps)
        start += phase.steps
    return start


def _check_some_weight(experiment: Experiment, phase: Phase, steps: range) -> None:
    """Raises UserError if all given weights are 0 in all steps of a phase, and nothing else changes a parameter."""
    weights = phase.weights or ({} if experiment.combinators else experiment.weights)
    if not weights or experiment.regularisers or not weighs_heads(experiment, rule_of(experiment, phase)):
        return
    if not any(weighting.schedules.over(weight, steps, task).any() for task, weight in weights.items()):
        field = f"phases.{phase.name}.weights" if phase.weights else "weights"
        raise UserError(
            f"{field}: every task's weight is 0 in all steps of phase {phase.name!r}, so nothing would be learned; give one "
            "task a weight above 0"
        )


def _check_tasks(experiment: Experiment) -> None:
    sources = {source.name: source for source in experiment.sources}
    for task in experiment.tasks:
        if task.source not in sources:
            raise unknown(f"source of task {task.name!r}:", task.source, sources)
        task.check()
        task.check_source(sources[task.source])
        if task.target_length > experiment.batch.target_row_length:
            raise UserError(
                f"task {task.name!r}: target_length is {task.target_length}, but rows have room for "
                f"{count(experiment.batch.target_row_length, 'target token')}: make batch.target_length as long"
            )
        others = [other.name for other in experiment.tasks if other.source == task.source and other is not task]
        if (task.corrupts or task.makes_tokens) and others:
            does = "changes the texts" if task.corrupts else "reads the answers beside the texts"
            raise UserError(
                f"task {task.name!r} {does} of source {task.source!r}, so task {others[0]!r} cannot have it, too: "
                "declare the same file as a second source"
            )
    batch = experiment.batch
    shape = units.Shape(batch.packed, batch.sampling, batch.slots, batch.row_length, batch.accumulate)
    units.check(experiment.sources, experiment.tasks, shape, bool(experiment.optimizer.private.clip))


def _check_languages(experiment: Experiment) -> None:
    for source in experiment.sources:
        tasks = {task.languages[0]: task.name for task in experiment.tasks if task.source == source.name and task.languages[0]}
        if len(tasks) > 1:
            declared = " and ".join(f"{code!r} in task {task!r}" for code, task in tasks.items())
            raise UserError(f"source {source.name!r}: a text has one language, but source_language is {declared}")


def _check_settings(experiment: Experiment) -> None:
    """Checks single fields of the experiment, its evaluation and its checkpoints."""
    evaluation, checkpoints = experiment.evaluation, experiment.checkpoints
    for field, value, choices in (
        ("evaluation.baseline", evaluation.baseline, BASELINES),
        ("dtype", experiment.dtype, DTYPES),
        ("gram_dtype", experiment.gram_dtype, DTYPES[1:]),
        ("sharding", experiment.sharding, SHARDINGS),
        ("remat", experiment.remat, remat.CHOICES),
        ("kernels", experiment.kernels, KERNELS),
    ):
        if value not in choices:
            raise unknown(field, value, choices)
    if not isinstance(experiment.weigh_heads, bool) and experiment.weigh_heads != "rule":
        raise UserError(f"weigh_heads is {experiment.weigh_heads!r}; it must be true, false or rule")
    for field, number in (
        ("evaluation.every", evaluation.every),
        ("checkpoints.every", checkpoints.every),
        ("checkpoints.keep", checkpoints.keep),
    ):
        if number < 1:
            raise UserError(f"{field} is {number}; it must be at least 1")
    if not checkpoints.frozen and (not isinstance(experiment.trunk, Pretrained) or experiment.trunk.fresh):
        raise UserError("checkpoints.frozen is false, but a trunk from scratch is in its checkpoints only: leave it true")
    seeds = (("seed", experiment.seed), ("data_seed", experiment.data_seed or 0))
    for field, number in (*seeds, ("devices", experiment.devices)):
        if number < 0:
            raise UserError(f"{field} is {number}; it must not be negative")
