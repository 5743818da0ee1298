"""The experiment: one frozen dataclass that a script builds and the command line can change."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import cattrs
from cattrs.strategies import configure_tagged_union

from mtl_jax import weighting
from mtl_jax.core import configuration
from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, count, listed, unknown
from mtl_jax.core.files import to_json as strict
from mtl_jax.data import batches, mixture
from mtl_jax.data.batches import Batching
from mtl_jax.data.source import Source
from mtl_jax.tasks import AnyTask
from mtl_jax.transfer import adapters as adapting
from mtl_jax.transfer import averaging, freezing, loading, regularisers
from mtl_jax.transfer import optimizer as optimizers
from mtl_jax.transfer.adapters import AnyAdapter
from mtl_jax.transfer.loading import InitFrom
from mtl_jax.transfer.optimizer import Optimizer
from mtl_jax.transfer.penalties import Mixout
from mtl_jax.transfer.phases import Phase as Phase
from mtl_jax.transfer.regularisers import AnyRegulariser
from mtl_jax.trunks import AnyTrunk, Pretrained

BASELINES = ("none", "constant", "probe")
DTYPES = ("auto", "float32", "bfloat16")
HeadWeights = bool | Literal["rule"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation(Configuration):
    """Measuring on dev while training, and what the result is compared with.

    Attributes:
        every: Steps between evaluations on dev; the end of a phase is always one.
        criterion: What makes a checkpoint the best: mean (of the tasks' metrics), a task, or TASK/METRIC. Higher is better.
        patience: Stop after so many evaluations without a new best; 0: never.
        baseline: Compared with on test. constant: majority class or mean; of tasks that write texts, the first sentence of what
            they read. probe: that, and a linear model on the trunk's features before training. none: nothing.
    """

    every: int = 100
    criterion: str = "mean"
    patience: int = 0
    baseline: str = "constant"


@dataclasses.dataclass(frozen=True)
class Checkpoints(Configuration):
    """When checkpoints are written and which are kept.

    Attributes:
        every: Steps between checkpoints; one is also written with every evaluation, and at the end.
        keep: How many of the latest are kept, beside the best by dev.
        frozen: Whether parameters of a pretrained trunk that train in no phase are in them, too. Else they are read from
            trunk.path again, which must not change; with adapters, a checkpoint is a few MB.
    """

    every: int = 100
    keep: int = 2
    frozen: bool = True


@dataclasses.dataclass(frozen=True)
class Experiment(Configuration):
    """Everything that decides a run's numbers.

    Attributes:
        name: The experiment's name.
        trunk: The shared network.
        sources: Where rows come from.
        tasks: What is predicted from them.
        phases: What trains, and for how long.
        init_from: Another run, or a checkpoint, whose parameters these begin as; a run that goes on does not need it any more.
        adapters: Parameters added inside the trunk, trunk/adapters/NAME/... to the phases' rules.
        weighting: The rule that weighs the losses.
        weights: For --weighting fixed: one weight for each task. For scheduled: a number, or an optax schedule of the run's
            step such as "linear_schedule(1.0, 0.0, 1000)".
        weighting_options: Options of the rule, such as c 0.5 for cagrad.
        combinators: What is done to the rule, the innermost first: normalized[:total=T], every:k=K, subset:s=S[,temperature=T],
            clipped[:low=L,high=H], ema[:decay=D].
        gram_over: For rules that compare task gradients: over which parameters. trunk: all of it that trains; a regular
            expression of parameter paths; representation: the trunk's output, the cheapest.
        gram_dtype: In which task gradients are held, and so the trunk's gradient is rounded: float32 or bfloat16. They take K
            times the trainable trunk.
        weigh_heads: Whether a head's own gradient is multiplied by its task's weight, or by 0 where that is negative: true,
            false (it follows its plain loss), or rule: as the rule's source has it.
        regularisers: Losses beside those of the tasks, which the weighting rule does not see, each with a weight of its own.
        mixout: Mixing parameters with their start while training.
        only: Train these tasks and leave the others out; empty: all.
        optimizer: How parameters follow the gradient.
        averaging: What is measured on dev and test, and kept as the result. none: the parameters as they are; ema[:decay=D]:
            their debiased exponential moving average over a phase's steps; last:n=N: their mean over its last N evaluations.
        batch: Shape of a batch and mixture of the sources.
        evaluation: Dev evaluation, early stopping, baselines.
        checkpoints: When checkpoints are written, how many are kept.
        seed: Seed of initialisation, data order and dropout.
        data_seed: Seed of the data order, where it is to be another; None: the same. Runs that share it see the same batches.
        dtype: Compute dtype: float32, bfloat16, or auto (float32 on CPU, bfloat16 elsewhere).
        devices: Number of devices to use; 0: all.
    """

    name: str
    trunk: AnyTrunk
    sources: tuple[Source, ...]
    tasks: tuple[AnyTask, ...]
    phases: tuple[Phase, ...]
    init_from: InitFrom = InitFrom()
    adapters: tuple[AnyAdapter, ...] = ()
    weighting: str = "equal"
    weights: dict[str, float | str] = dataclasses.field(default_factory=dict)
    weighting_options: dict[str, float | str] = dataclasses.field(default_factory=dict)
    combinators: tuple[str, ...] = ()
    gram_over: str = "trunk"
    gram_dtype: str = "float32"
    weigh_heads: HeadWeights = "rule"
    regularisers: tuple[AnyRegulariser, ...] = ()
    mixout: Mixout = Mixout()
    only: tuple[str, ...] = ()
    optimizer: Optimizer = Optimizer()
    averaging: str = "none"
    batch: Batching = Batching()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    seed: int = 0
    data_seed: int | None = None
    dtype: str = "auto"
    devices: int = 0


def select(experiment: Experiment) -> Experiment:
    """The experiment with only the tasks that `only` names, their weights and regularisers, and the shares of their sources.

    Raises:
        UserError: `only` names an unknown task, or leaves a regulariser without any.
    """
    names = [task.name for task in experiment.tasks]
    for name in experiment.only:
        if name not in names:
            raise unknown("task in only:", name, names)
    if not experiment.only:
        return experiment
    dropped = set(names) - set(experiment.only)

    def kept(weights: dict[str, float | str]) -> dict[str, float | str]:
        return {task: weight for task, weight in weights.items() if task not in dropped}

    sources = {task.source for task in experiment.tasks if task.name not in dropped}

    def seen(shares: dict[str, float]) -> dict[str, float]:
        return {source: share for source, share in shares.items() if source in sources}

    return dataclasses.replace(
        experiment,
        tasks=tuple(task for task in experiment.tasks if task.name not in dropped),
        phases=tuple(
            dataclasses.replace(phase, weights=kept(phase.weights), shares=seen(phase.shares)) for phase in experiment.phases
        ),
        batch=dataclasses.replace(experiment.batch, shares=seen(experiment.batch.shares)),
        weights=kept(experiment.weights),
        regularisers=regularisers.of_tasks(experiment.regularisers, dropped),
    )


def rule_of(experiment: Experiment, phase: Phase) -> weighting.Rule:
    """The weighting rule of a phase.

    Raises:
        UserError: The rule or a weight is refused.
    """
    if phase.weights:
        return weighting.scheduled(phase.weights)
    options: dict[str, Any] = dict(experiment.weighting_options)
    if experiment.weighting in ("fixed", "scheduled"):
        options["weights"] = experiment.weights
    elif experiment.weights:
        raise UserError(f"weights are for --weighting fixed or scheduled, but weighting is {experiment.weighting!r}")
    rule = weighting.make(experiment.weighting, **options)
    for combinator in experiment.combinators:
        rule = weighting.combine(rule, combinator)
    return rule


def weighs_heads(experiment: Experiment, rule: weighting.Rule) -> bool:
    """Whether a head's own gradient is multiplied by its task's weight."""
    return rule.weighs_heads if experiment.weigh_heads == "rule" else bool(experiment.weigh_heads)


def as_begun(experiment: Experiment, before: Any) -> Experiment:
    """The experiment, with the heads weighted as in the workdir in which it goes on.

    Before a rule said how its heads are trained, every rule weighted them, and configurations say so by true.

    Args:
        experiment: The experiment now.
        before: config.json of the workdir, or None.
    """
    if not (isinstance(before, Mapping) and before.get("weigh_heads") is True and experiment.weigh_heads == "rule"):
        return experiment
    if not all(rule_of(experiment, phase).weighs_heads for phase in experiment.phases):
        log.info("weigh_heads is rule, but this workdir was begun with true: its heads keep their weighted gradients")
    return dataclasses.replace(experiment, weigh_heads=True)


def check(experiment: Experiment) -> None:
    """Finds what is wrong with an experiment before anything is read or written.

    Raises:
        UserError: One line that names the field.
    """
    configuration.check(experiment, coarse=True)  # what the checks below could not take; they say more than the last one
    for what, names in {
        "task": [t.name for t in experiment.tasks],
        "source": [s.name for s in experiment.sources],
        "phase": [p.name for p in experiment.phases],
    }.items():
        if not names:
            raise UserError(f"the experiment has no {what}")
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UserError(f"{what} names must differ: {listed(sorted(twice))}")
        for name in names:
            if not name or not set(name) <= _NAME_CHARACTERS:
                raise UserError(f"{what} name {name!r}: use letters, digits, '_' and '-' only")
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
    for task in experiment.tasks:
        if task.source not in [s.name for s in experiment.sources]:
            raise unknown(f"source of task {task.name!r}:", task.source, [s.name for s in experiment.sources])
        task.check()
        task.check_source(next(s for s in experiment.sources if s.name == task.source))
        if task.target_length > experiment.batch.target_row_length:
            raise UserError(
                f"task {task.name!r}: target_length is {task.target_length}, but rows have room for "
                f"{count(experiment.batch.target_row_length, 'target token')}: make batch.target_length as long"
            )
        others = [other.name for other in experiment.tasks if other.source == task.source and other is not task]
        if task.corrupts and others:
            raise UserError(
                f"task {task.name!r} changes the texts of source {task.source!r}, so task {others[0]!r} cannot have it, too: "
                "declare the same file as a second source"
            )
    loading.check(experiment.init_from)
    adapting.check(experiment.adapters, {task.name: task.source for task in experiment.tasks})
    names, phases = [task.name for task in experiment.tasks], [phase.name for phase in experiment.phases]
    regularisers.check(experiment.regularisers, experiment.mixout, names, phases, start)
    for field, value, choices in (
        ("evaluation.baseline", experiment.evaluation.baseline, BASELINES),
        ("dtype", experiment.dtype, DTYPES),
        ("gram_dtype", experiment.gram_dtype, DTYPES[1:]),
    ):
        if value not in choices:
            raise unknown(field, value, choices)
    if not isinstance(experiment.weigh_heads, bool) and experiment.weigh_heads != "rule":
        raise UserError(f"weigh_heads is {experiment.weigh_heads!r}; it must be true, false or rule")
    for field, number in (
        ("evaluation.every", experiment.evaluation.every),
        ("checkpoints.every", experiment.checkpoints.every),
        ("checkpoints.keep", experiment.checkpoints.keep),
    ):
        if number < 1:
            raise UserError(f"{field} is {number}; it must be at least 1")
    if not experiment.checkpoints.frozen and (not isinstance(experiment.trunk, Pretrained) or experiment.trunk.fresh):
        raise UserError("checkpoints.frozen is false, but a trunk from scratch is in its checkpoints only: leave it true")
    seeds = (("seed", experiment.seed), ("data_seed", experiment.data_seed or 0))
    for field, number in (*seeds, ("devices", experiment.devices)):
        if number < 0:
            raise UserError(f"{field} is {number}; it must not be negative")
    batches.check(experiment.batch)
    optimizers.check(experiment.optimizer)
    averaging.make(experiment.averaging)
    configuration.check(experiment)


def _check_some_weight(experiment: Experiment, phase: Phase, steps: range) -> None:
    """Raises UserError where all given weights are 0 in all steps of a phase, and nothing else moves a parameter."""
    weights = phase.weights or ({} if experiment.combinators else experiment.weights)
    if not weights or experiment.regularisers or not weighs_heads(experiment, rule_of(experiment, phase)):
        return
    if not any(weighting.schedules.over(weight, steps, task).any() for task, weight in weights.items()):
        where = f"phases.{phase.name}.weights" if phase.weights else "weights"
        raise UserError(
            f"{where}: every task's weight is 0 in all steps of phase {phase.name!r}, so nothing would be learned; give one "
            "task a weight above 0"
        )


_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def data_seed_of(experiment: Experiment) -> int:
    """The seed of the data order."""
    return experiment.seed if experiment.data_seed is None else experiment.data_seed


def to_json(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON-able values; unions carry their class name as "kind"."""
    return _converter().unstructure(experiment)


def from_json(values: Any, where: str = "config.json") -> Experiment:
    """The inverse of to_json.

    Args:
        values: Parsed JSON.
        where: The file that they are from, for errors.

    Raises:
        UserError: They are not those of an experiment, or a number is none that a field can have.
    """
    experiment: Experiment = _structured(values, Experiment, where)
    try:
        configuration.check(experiment, leave_out=configuration.SEEDS)  # earlier versions took any
    except UserError as error:
        raise UserError(f"{where}: not what mtl_jax wrote ({error})") from error
    return experiment


def _structured(values: Any, kind: Any, where: str) -> Any:
    try:
        return _converter().structure(values, kind)
    # A union's kind that is not known or not a text: cattrs looks it up as it is.
    except (cattrs.BaseValidationError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        told = cattrs.transform_error(error) if isinstance(error, cattrs.BaseValidationError) else [repr(error)]
        raise UserError(
            f"{where}: not what mtl_jax wrote ({told[0].replace(' @ $.', ' at ').replace(' @ $', '')[:200]}); it may be of "
            "another version, or damaged"
        ) from error


def completed(values: Any) -> Any:
    """A configuration that an earlier version wrote, with the fields that came later at their defaults; else as it is."""
    try:
        return json.loads(strict(to_json(_structured(values, Experiment, ""))))
    except UserError:
        return values  # of another shape: whatever differs will be shown


def tasks_to_json(tasks: Sequence[AnyTask]) -> dict[str, Any]:
    """Tasks, filled with what was found in the data, as JSON-able values by name."""
    return {task.name: _converter().unstructure(task, AnyTask) for task in tasks}


def tasks_from_json(values: Mapping[str, Any], where: str = "data.json") -> tuple[AnyTask, ...]:
    """The inverse of tasks_to_json.

    Raises:
        UserError: They are not those of tasks.
    """
    return tuple(_structured(value, AnyTask, where) for value in values.values())


def _head_weights(value: Any, _: Any) -> HeadWeights:
    if not isinstance(value, bool) and value != "rule":
        raise ValueError(f"{value!r} is not true, false or rule")
    return cast(HeadWeights, value)


@functools.cache  # making one takes a tenth of a second
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(float | str, _number_or_text)
    converter.register_structure_hook(HeadWeights, _head_weights)
    # JSON has no infinity: unbounded is written as a text. Before the unions, whose hooks are made from those there are.
    converter.register_unstructure_hook(float, lambda x: x if abs(x) != float("inf") else str(x))
    configure_tagged_union(AnyTrunk, converter, tag_name="kind")
    configure_tagged_union(AnyTask, converter, tag_name="kind")
    configure_tagged_union(AnyAdapter, converter, tag_name="kind")
    configure_tagged_union(AnyRegulariser, converter, tag_name="kind")
    return converter


def _number_or_text(value: Any, _: Any) -> float | str:
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number or a text")
    return value
