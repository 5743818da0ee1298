"""The plan of each phase: which parameters train, by which weighting rule and optimizer; and the table that shows it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tabulate

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.trees import leaves_of, matching
from mtl_jax.data import augmentations
from mtl_jax.data.mixture_schedule import ScheduleSequence
from mtl_jax.data.poisson import PoissonSchedule
from mtl_jax.experiment import Experiment, Phase, rule_name, rule_of, weighs_heads
from mtl_jax.tasks import Task
from mtl_jax.training import gram_gradient
from mtl_jax.training.forward import text_vector
from mtl_jax.training.regularisation import prepare as regularisation
from mtl_jax.training.task_gradients import NO_ADAPTERS
from mtl_jax.transfer import freezing, optax_rules
from mtl_jax.transfer import optimizer as optimizers
from mtl_jax.transfer.adapters import OwnParts
from mtl_jax.transfer.freezing import ParamRule
from mtl_jax.transfer.regularisers import Regulariser
from mtl_jax.weighting import Rule, blind, schedules


def needs_task_gradients(rule: Rule) -> bool:
    """Whether the rule compares or changes the task gradients."""
    return rule.needs_gram or rule.needs_cross or rule.transform is not None


def needs_trunk(rule: Rule) -> bool:
    """Whether the rule reads more than losses, which makes sense only where shared parameters train."""
    return needs_task_gradients(rule) or rule.held_out is not None


class PhasePlan(NamedTuple):
    """The plan of a phase.

    Attributes:
        phase: Its declaration.
        number: Its place, from 0.
        start: Steps of the run before it.
        end: Steps of the run after it.
        param_rules: Tree of parameter rules over the parameters.
        mask: Tree of bools over the parameters: which train.
        since: For each parameter that trains, the number of the phase since which it trains without a break, else None; None
            in place of the tree: not known.
        rule: Its weighting rule. `equal` replaces a rule that reads more than losses where no shared parameter trains.
        learning_rate: Step of the phase -> the learning rate, before parameter rules scale it.
        optimizer: The optax transformation over the trainable leaves.
        cached_features: Whether all of the trunk is frozen, and the heads read one vector of each text, which is computed once.
        resets_rule: Whether the rule's state is initialised again at its start.
        zero_weight_tasks: The tasks whose weight is 0 in all its steps, and whose outputs no regulariser compares.
        regularisers: The regularisers of the phase.
        mixout_paths: The parameters to which Mixout applies in it.
        own: Which parameters of the trunk belong to single tasks.
    """

    phase: Phase
    number: int
    start: int
    end: int
    param_rules: Any
    mask: Any
    since: Any
    rule: Rule
    learning_rate: Any
    optimizer: Any
    cached_features: bool
    resets_rule: bool
    zero_weight_tasks: tuple[str, ...] = ()
    regularisers: tuple[Regulariser, ...] = ()
    mixout_paths: tuple[str, ...] = ()
    own: OwnParts = NO_ADAPTERS


def plan(
    experiment: Experiment,
    tasks: tuple[Task, ...],
    params: Any,
    compared_tasks: Mapping[str, Sequence[str]],
    copies: int = 1,
    own: OwnParts = NO_ADAPTERS,
) -> list[PhasePlan]:
    """The phases of a run.

    Args:
        experiment: The experiment.
        tasks: Its tasks, with their label sets.
        params: Its parameters.
        compared_tasks: As in Prepared.
        copies: How many copies of a row leave the trunk.
        own: Which parameters of the trunk belong to single tasks.

    Raises:
        UserError: Rules do not fit the parameters, or a weighting rule the phase.
    """
    plans: list[PhasePlan] = []
    start = 0
    for number, phase in enumerate(experiment.phases):
        param_rules = freezing.decide(params, phase.rules)
        mask = jax.tree.map(lambda rule: rule.train, param_rules)
        if not any(jax.tree.leaves(mask)):
            raise UserError(f"phase {phase.name!r}: its rules freeze every parameter; nothing would train")
        trains_trunk = any(jax.tree.leaves(mask["trunk"]))
        rule = _rule(experiment, phase, mask, own)
        if needs_task_gradients(rule):
            gram_gradient.check(params, mask, experiment.gram_over, own)
            for task in tasks:
                if experiment.gram_over == gram_gradient.REPRESENTATION and task.shift_free:
                    raise UserError(
                        f"gram_over representation: task {task.name!r} chooses between tokens, so a vector added to all of "
                        "them changes nothing, and its gradient is always 0; use trunk, or a part of it"
                    )
            if rule.transform is not None and experiment.gram_over != gram_gradient.TRUNK:
                raise UserError(
                    f"weighting {rule_name(experiment)} changes the trunk's task gradients: gram_over must be trunk"
                )
        keeps_rule = bool(plans) and needs_trunk(plans[-1].rule) == needs_trunk(rule)
        keeps_rule = keeps_rule and not phase.weights and not plans[-1].phase.weights
        # A transform's state has the shapes of the trainable leaves.
        keeps_rule = keeps_rule and (rule.transform is None or plans[-1].mask == mask)
        steps = range(start, start + phase.steps)
        regularisers = regularisation.active_in_phase(experiment, number, steps)
        reads_tokens = any(chosen.reads_tokens for chosen in regularisers)
        compared = {name for regulariser in regularisers for name in compared_tasks.get(regulariser.name, ())}
        # A text that is another one in every pass has no fixed features.
        same_texts = not any(
            augmentations.in_passes(augmentations.of_source(source, experiment.augment)) for source in experiment.sources
        )
        fixed = same_texts and not any(chosen.changes_inputs for chosen in regularisers)
        only_texts = bool(text_vector(tasks)) and copies == 1 and not reads_tokens and fixed
        trained = {path: None for path, trains in leaves_of(mask).items() if trains}
        since = freezing.training_since([*(before.mask for before in plans), mask])
        plans.append(
            PhasePlan(
                phase=phase,
                number=number,
                start=start,
                end=start + phase.steps,
                param_rules=param_rules,
                mask=mask,
                since=since,
                rule=rule,
                learning_rate=optimizers.schedule(experiment.optimizer, _peak(experiment, phase), phase.steps),
                optimizer=_optimizer(experiment, phase, param_rules, since),
                cached_features=phase.cache_features and not trains_trunk and only_texts,
                resets_rule=not keeps_rule,
                zero_weight_tasks=() if reads_tokens else _zero_weight_tasks(experiment, phase, rule, steps, compared),
                regularisers=regularisers,
                mixout_paths=tuple(matching(experiment.mixout.parameters, trained)) if experiment.mixout.p else (),
                own=own,
            )
        )
        start += phase.steps
    return plans


def check_halves(plan: PhasePlan, schedule: ScheduleSequence | PoissonSchedule) -> None:
    """Checks that a batch has two independent halves with rows of every source, if the rule of a phase needs them.

    Raises:
        UserError: It has not.
    """
    if not plan.rule.needs_cross:
        return
    assert isinstance(schedule, ScheduleSequence)  # no rule of a private run compares gradients
    name = plan.rule.name
    doubling = [regulariser.name for regulariser in plan.regularisers if regulariser.doubles_rows]
    if doubling:
        raise UserError(
            f"weighting {name} needs independent halves of a batch, and {listed(doubling)} has every row twice: leave it out"
        )
    for source, rows in schedule.fewest(range(plan.start, plan.end)).items():
        if 0 < rows < 2:
            raise UserError(
                f"weighting {name} needs two rows of every source in a step, one in each half of the batch, and source "
                f"{source!r} has {rows:.3g}: raise batch.rows or the source's share"
            )


def with_numbers_of(plan: PhasePlan, experiment: Experiment) -> PhasePlan:
    """The same phase with the numbers of another experiment: weights, learning rates, decay, options of the rule.

    Args:
        plan: The phase.
        experiment: The other experiment, which differs in numbers only; they may be traced, as under vmap.
    """
    phase = experiment.phases[plan.number]
    names = {regulariser.name for regulariser in plan.regularisers}
    return plan._replace(
        phase=phase,
        rule=_rule(experiment, phase, plan.mask, plan.own),
        learning_rate=optimizers.schedule(experiment.optimizer, _peak(experiment, phase), phase.steps),
        optimizer=_optimizer(experiment, phase, plan.param_rules, plan.since),
        regularisers=tuple(regulariser for regulariser in experiment.regularisers if regulariser.name in names),
    )


def with_ages_of(plan: PhasePlan, opt_state: Any, experiment: Experiment) -> PhasePlan:
    """The plan for an optimizer state: the phase, unless the state is of a run whose earlier phases trained other parameters.

    That is so after a configuration was changed: then every parameter has a bias correction by its own count.

    Args:
        plan: The phase.
        opt_state: The state with which its steps begin.
        experiment: The experiment of the plan.
    """
    if optax_rules.same_ages(opt_state, plan.since):
        return plan
    return plan._replace(since=None, optimizer=_optimizer(experiment, plan.phase, plan.param_rules, None))


def _optimizer(experiment: Experiment, phase: Phase, param_rules: Any, since: Any) -> Any:
    return optimizers.build(experiment.optimizer, param_rules, _peak(experiment, phase), phase.steps, since)


def _peak(experiment: Experiment, phase: Phase) -> float:
    return experiment.optimizer.learning_rate if phase.learning_rate is None else phase.learning_rate


def _rule(experiment: Experiment, phase: Phase, mask: Any, own: OwnParts) -> Rule:
    """The rule of a phase; `equal` replaces one that reads more than losses where no shared parameter trains.

    Parameters of single tasks within the trunk are not shared. The rule of a private run does not see the losses.
    """
    rule = rule_of(experiment, phase)
    if experiment.optimizer.private.clip:
        return blind.blind(rule)
    trains_shared = any(trains and not all(own.of(path)) for path, trains in leaves_of(mask["trunk"]).items())
    if needs_trunk(rule) and not trains_shared:
        equal = rule_of(dataclasses.replace(experiment, weighting="equal", weighting_options={}), phase)
        return equal._replace(weighs_heads=rule.weighs_heads)  # heads are weighted in the same way in all phases
    return rule


def _zero_weight_tasks(
    experiment: Experiment, phase: Phase, rule: Rule, steps: range, compared: Collection[str]
) -> tuple[str, ...]:
    """The tasks with weight 0 in all of the steps, without those that a regulariser compares; () where that is every task."""
    weights = phase.weights or ({} if experiment.combinators else experiment.weights)
    if not weighs_heads(experiment, rule):  # a head learns by its plain loss, whatever its task's weight
        return ()
    zero = [task for task, weight in weights.items() if not schedules.over(weight, steps, task).any()]
    skipped = tuple(task for task in zero if task not in compared)
    return skipped if len(skipped) < len(weights) else ()


class Group(NamedTuple):
    """A parameter rule and the number of parameters that it applies to."""

    rule: ParamRule
    size: int


def groups(params: Any, rules: Sequence[ParamRule]) -> list[Group]:
    """The rules in order, each with the number of parameters that it applies to.

    Raises:
        UserError: As freezing.decide.
    """
    sizes = dict.fromkeys(rules, 0)
    for rule, leaf in zip(jax.tree.leaves(freezing.decide(params, rules)), jax.tree.leaves(params), strict=True):
        sizes[rule] = sizes.get(rule, 0) + leaf.size  # the rule of what no rule lets train is none of them
    return list(itertools.starmap(Group, sizes.items()))


def table(experiment: Experiment, params: Any) -> str:
    """A line for each phase and group of rules: parameters, share of all, peak learning rate, decay, schedule.

    Consecutive rules that differ only in the number of a layer share a line, and so do consecutive rules that freeze.
    """
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    rows = []
    for phase in experiment.phases:
        by_line = itertools.groupby(groups(params, phase.rules), key=lambda group: _kind(group.rule))
        for number, (_, same) in enumerate(by_line):
            rows.append([phase.name if number == 0 else "", *_cells(experiment, phase, list(same), total)])
    header = ["phase", "parameters", "count", "share", "learning rate", "decay", "schedule"]
    sides = ("left", "left", "right", "right", "left", "left", "left")
    return tabulate.tabulate(rows, header, tablefmt="simple", disable_numparse=True, colalign=sides)


def _kind(rule: ParamRule) -> tuple[Any, ...]:
    return (re.sub(r"\d+", "", rule.pattern), rule.weight_decay, rule.schedule) if rule.train else ()


def _cells(experiment: Experiment, phase: Phase, same: list[Group], total: int) -> list[str]:
    config, rule, size = experiment.optimizer, same[0].rule, sum(group.size for group in same)
    pattern = rule.pattern if len(same) == 1 else f"{rule.pattern} ... {same[-1].rule.pattern}"
    cells = [pattern, f"{size:,}", f"{size / total:.1%}"]
    if not rule.train:
        return [*cells, "frozen", "", ""]
    peak = config.learning_rate if phase.learning_rate is None else phase.learning_rate
    rates = dict.fromkeys(f"{peak * rate:.2g}" for rate in (rule.rate, same[-1].rule.rate))
    decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
    return [*cells, " ... ".join(rates), f"{decay:g}" if config.name == "adamw" else "", rule.schedule or config.schedule]
