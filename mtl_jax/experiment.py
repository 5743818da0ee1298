"""The experiment: one frozen dataclass that a script builds, the command line can change, and check() checks."""

from __future__ import annotations

import dataclasses
import logging
import string
from collections.abc import Mapping
from typing import Any, Literal

from mtl_jax import weighting
from mtl_jax.core import configuration
from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, count, listed, unknown
from mtl_jax.data import augmentations, batches, mixture, units
from mtl_jax.data.batches import Batching
from mtl_jax.data.source import Augmentation, Source
from mtl_jax.models import remat
from mtl_jax.models.kernels import KERNELS
from mtl_jax.sharing import base as sharing
from mtl_jax.sharing.base import Hard, Sharing
from mtl_jax.tasks import Task
from mtl_jax.transfer import adapters as adapting
from mtl_jax.transfer import averaging, freezing, loading, private, regularisers
from mtl_jax.transfer import optimizer as optimizers
from mtl_jax.transfer.adapters import Adapter
from mtl_jax.transfer.loading import InitFrom
from mtl_jax.transfer.optimizer import Optimizer
from mtl_jax.transfer.penalties import Mixout
from mtl_jax.transfer.phases import Phase as Phase
from mtl_jax.transfer.regularisers import Regulariser
from mtl_jax.trunks import Pretrained, TrunkConfig

BASELINES = ("none", "constant", "probe")
DTYPES = ("auto", "float32", "bfloat16")
SHARDINGS = ("replicated", "fsdp", "auto")
NAME_CHARACTERS = set(string.ascii_letters + string.digits + "_-")
HeadWeights = bool | Literal["rule"]
Weighting = str | weighting.Rule

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation(Configuration):
    """Evaluation on dev during training, and the baselines that the result is compared with.

    Attributes:
        every: Steps between evaluations on dev; every phase also ends with one.
        criterion: The score that decides which checkpoint is the best: mean (of the tasks' metrics), a task, or TASK/METRIC.
            Higher is better.
        patience: Stop after this many evaluations without a new best score; 0: never.
        baseline: The baselines on test. constant: the majority class or the mean; for tasks that write texts, the first
            sentence of the input. probe: constant, and a linear model on the trunk's features before training. none: nothing.

    Examples:
        >>> mtl_jax.Evaluation(every=50, patience=3, criterion="fine/accuracy").patience
        3
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
        keep: Number of latest checkpoints that are kept, beside the best one by dev.
        frozen: Whether checkpoints include parameters of a pretrained trunk that train in no phase. If false, these are read
            from trunk.path again, which must not change; with adapters, a checkpoint then has a few MB.

    Examples:
        >>> mtl_jax.Checkpoints(every=500, keep=1).keep
        1
    """

    every: int = 100
    keep: int = 2
    frozen: bool = True


@dataclasses.dataclass(frozen=True)
class Experiment(Configuration):
    """Everything that decides the numbers of a run.

    Attributes:
        name: The experiment's name.
        trunk: The shared network.
        sources: Where rows come from.
        tasks: What is predicted from the rows.
        phases: Which parameters train, and for how long.
        init_from: Another run, or a checkpoint, that gives the initial parameters; a resumed run no longer needs it.
        adapters: Parameters that are added inside the trunk; the phases' rules call them trunk/adapters/NAME/...
        sharing: How the tasks share the trunk: all of it (Hard), or with parts of their own, experts or columns.
        weighting: The rule that weighs the losses, by its name; in a script also a weighting.Rule itself.
        weights: For --weighting fixed: one weight for each task. For scheduled: a number, or an optax schedule of the run's
            step such as "linear_schedule(1.0, 0.0, 1000)". For cosmos and pbi: preferences; none: 1 each.
        weighting_options: Options of the rule, such as c 0.5 for cagrad.
        combinators: Combinators around the rule, the innermost first: normalized[:total=T], every:k=K,
            subset:s=S[,temperature=T], clipped[:low=L,high=H], ema[:decay=D].
        gram_over: For rules that compare task gradients: the parameters that the gradients are taken with respect to. trunk:
            all its trainable parameters; a regular expression of parameter paths; representation: the trunk's output in place
            of parameters, which is the cheapest.
        gram_dtype: The dtype of stored task gradients, to which the trunk's gradient is therefore rounded: float32 or bfloat16.
            They need K times the memory of the trainable trunk.
        weigh_heads: Whether a head's own gradient is multiplied by its task's weight (by 0 if the weight is negative): true,
            false (the head follows its unweighted loss), or rule: as in the paper or program that the rule is from.
        regularisers: Losses beside those of the tasks, each with its own weight; the weighting rule does not see them.
        mixout: During training, some numbers of the parameters are replaced by their initial values.
        only: Train these tasks and leave the others out; empty: all.
        optimizer: How gradients become updates of the parameters.
        averaging: The parameters that are evaluated and kept. none: themselves; ema[:decay=D]: their debiased exponential
            moving average over the steps of a phase; last:n=N: their mean over the phase's last N evaluations.
        batch: Shape of a batch and mixture of the sources.
        evaluation: Evaluation on dev, early stopping, baselines.
        checkpoints: When checkpoints are written, and how many are kept.
        seed: Seed of the initialisation, the data order and dropout.
        data_seed: Seed of the data order alone; None: seed decides it, too. Runs with one data_seed see the same batches.
        dtype: Compute dtype: float32, bfloat16, or auto (float32 on CPU, bfloat16 elsewhere).
        devices: Number of devices to use; 0: all.
        augment: What makes training rows from those of every source, after what each source has in its own augment.
        private: Whether logs, error lines and records show file and line of a row only, and never its texts.
        sharding: Where parameters, optimizer, averages and references lie. replicated: whole on every device; fsdp: cut over
            the devices and gathered where a layer reads them; auto: fsdp where they would not fit into a device's memory.
        remat: The numbers of a layer that the backward pass computes again, in place of keeping them, which takes time and
            saves memory. none; layers: all but the layer's inputs; dots: all but these and the results of products with
            weights.
        kernels: How the trunk's layers are computed. plain: ordinary operations; fused: attention, layer norms and GELU as
            kernels for TPUs, attention by cuDNN on GPUs; auto: fused where there are such kernels, else plain.

    Examples:
        >>> experiment = mtl_jax.Experiment(
        ...     name="stars",
        ...     trunk=mtl_jax.Embedding(dimension=50),
        ...     sources=(mtl_jax.Source("reviews", "reviews.csv"),),
        ...     tasks=(mtl_jax.Regression(name="stars", source="reviews", column="stars"),),
        ...     phases=(mtl_jax.Phase("everything", steps=200),),
        ... )
        >>> dataclasses.replace(experiment, seed=1).seed
        1
    """

    name: str
    trunk: TrunkConfig
    sources: tuple[Source, ...]
    tasks: tuple[Task, ...]
    phases: tuple[Phase, ...]
    init_from: InitFrom = InitFrom()
    adapters: tuple[Adapter, ...] = ()
    sharing: Sharing = Hard()
    weighting: Weighting = "equal"
    weights: dict[str, float | str] = dataclasses.field(default_factory=dict)
    weighting_options: dict[str, float | str] = dataclasses.field(default_factory=dict)
    combinators: tuple[str, ...] = ()
    gram_over: str = "trunk"
    gram_dtype: str = "float32"
    weigh_heads: HeadWeights = "rule"
    regularisers: tuple[Regulariser, ...] = ()
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
    private: bool = False
    sharding: str = "replicated"
    remat: str = "none"
    kernels: str = "auto"
    augment: tuple[Augmentation, ...] = ()


def select(experiment: Experiment) -> Experiment:
    """The experiment reduced to the tasks that `only` names, with the weights, shares and regularisers that belong to them.

    Raises:
        UserError: `only` names an unknown task, or leaves a regulariser without any task.
    """
    names = [task.name for task in experiment.tasks]
    for name in experiment.only:
        if name not in names:
            raise unknown("task in only:", name, names)
    if not experiment.only:
        return experiment
    tasks = tuple(task for task in experiment.tasks if task.name in experiment.only)
    dropped = set(names) - set(experiment.only)
    kept = regularisers.without_tasks(experiment.regularisers, dropped)
    sources = {task.source for task in tasks} | {source for regulariser in kept for source in regulariser.sources}

    def selected_weights(weights: dict[str, float | str]) -> dict[str, float | str]:
        return {task: weight for task, weight in weights.items() if task not in dropped}

    def selected_shares(shares: dict[str, float]) -> dict[str, float]:
        return {source: share for source, share in shares.items() if source in sources}

    return dataclasses.replace(
        experiment,
        tasks=tasks,
        phases=tuple(
            dataclasses.replace(phase, weights=selected_weights(phase.weights), shares=selected_shares(phase.shares))
            for phase in experiment.phases
        ),
        batch=dataclasses.replace(experiment.batch, shares=selected_shares(experiment.batch.shares)),
        weights=selected_weights(experiment.weights),
        regularisers=kept,
    )


def unlabelled_sources(experiment: Experiment) -> tuple[str, ...]:
    """The sources that regularisers read and no task labels, in the order of the experiment."""
    read = {source for regulariser in experiment.regularisers for source in regulariser.sources}
    read -= {task.source for task in experiment.tasks}
    return tuple(source.name for source in experiment.sources if source.name in read)


def rule_of(experiment: Experiment, phase: Phase) -> weighting.Rule:
    """The weighting rule of a phase, its combinators included.

    Raises:
        UserError: The rule, a combinator or a weight is refused.
    """
    if phase.weights:
        return weighting.scheduled(phase.weights)
    rule = experiment.weighting if isinstance(experiment.weighting, weighting.Rule) else _rule_by_name(experiment)
    for combinator in experiment.combinators:
        rule = weighting.combine(rule, combinator)
    return rule


def _rule_by_name(experiment: Experiment) -> weighting.Rule:
    options: dict[str, Any] = dict(experiment.weighting_options)
    if weighting.takes_weights(str(experiment.weighting)):
        options.setdefault("weights", experiment.weights)
    elif experiment.weights:
        raise UserError(
            f"weights are for --weighting fixed or scheduled, but weighting is {experiment.weighting!r} (cosmos and pbi take "
            "them as preferences)"
        )
    return weighting.make(str(experiment.weighting), **options)


def rule_name(experiment: Experiment) -> str:
    """The name of the weighting rule in files and tables."""
    return weighting.name_of(experiment.weighting, [task.name for task in experiment.tasks])


def weighs_heads(experiment: Experiment, rule: weighting.Rule) -> bool:
    """Whether a head's own gradient is multiplied by its task's weight."""
    return rule.weighs_heads if experiment.weigh_heads == "rule" else bool(experiment.weigh_heads)


def data_seed_of(experiment: Experiment) -> int:
    """The seed of the data order."""
    seed = experiment.seed if experiment.data_seed is None else experiment.data_seed
    return private.seed_of(experiment.optimizer.private, seed, "rows", 16)


def keep_head_weights(experiment: Experiment, stored: Any) -> Experiment:
    """The experiment with the head weights of the workdir that it resumes.

    Earlier versions weighted the heads under every rule; their configurations have weigh_heads true, where today's default
    is "rule".

    Args:
        experiment: The experiment that resumes.
        stored: The parsed config.json of the workdir, or None.
    """
    if not (isinstance(stored, Mapping) and stored.get("weigh_heads") is True and experiment.weigh_heads == "rule"):
        return experiment
    if not all(rule_of(experiment, phase).weighs_heads for phase in experiment.phases):
        log.info("weigh_heads is rule, but this workdir was begun with true: its heads keep their weighted gradients")
    return dataclasses.replace(experiment, weigh_heads=True)


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
    regularisers.check(experiment.regularisers, experiment.mixout, names, phases, steps)
    for regulariser in experiment.regularisers:
        for source in regulariser.sources:
            if source not in [declared.name for declared in experiment.sources]:
                raise unknown(f"source of {regulariser.name}:", source, [declared.name for declared in experiment.sources])
    _check_settings(experiment)
    batches.check(experiment.batch)
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
