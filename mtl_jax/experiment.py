"""The experiment: one frozen dataclass that a script builds and the command line can change."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

from mtl_jax import weighting
from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.source import Augmentation, Source
from mtl_jax.sharing.base import Hard, Sharing
from mtl_jax.tasks import Task
from mtl_jax.transfer import private, regulariser_checks
from mtl_jax.transfer.adapters import Adapter
from mtl_jax.transfer.loading import InitFrom
from mtl_jax.transfer.optimizer import Optimizer
from mtl_jax.transfer.penalties import Mixout
from mtl_jax.transfer.phases import Phase as Phase
from mtl_jax.transfer.regularisers import Regulariser
from mtl_jax.trunks import TrunkConfig

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
    kept = regulariser_checks.without_tasks(experiment.regularisers, dropped)
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
