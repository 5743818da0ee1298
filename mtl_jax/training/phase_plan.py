"""The phases of a run, worked out: what trains in each, by which rule and how fast."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tabulate

from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import leaves_of, matching
from mtl_jax.experiment import Experiment, Phase, rule_of, weighs_heads
from mtl_jax.tasks import Task
from mtl_jax.training import gram_gradient
from mtl_jax.training.forward import needed_fields
from mtl_jax.training.regularisation import prepare
from mtl_jax.transfer import freezing
from mtl_jax.transfer import optimizer as optimizers
from mtl_jax.transfer.freezing import ParamRule
from mtl_jax.transfer.regularisers import AnyRegulariser, Distillation
from mtl_jax.weighting import Rule, schedules


def per_task(rule: Rule) -> bool:
    """Whether the rule compares or changes the task gradients."""
    return rule.needs_gram or rule.transform is not None


class PhasePlan(NamedTuple):
    """A phase, worked out.

    Attributes:
        phase: Its declaration.
        number: Its place, from 0.
        start: Steps of the run before it.
        end: Steps of the run after it.
        decided: Tree of parameter rules over the parameters.
        mask: Tree of bools over the parameters: which train.
        rule: Its weighting rule. A rule that compares task gradients gives way to `equal` where no shared parameter trains.
        rate: Learning rate by step of the phase, of rules that don't change it.
        optimizer: The optax transformation over the trainable leaves.
        cached: Whether the trunk is frozen whole, all heads read pooled vectors only, and these are looked up.
        fresh_rule: Whether the rule's state starts anew with this phase.
        weightless: The tasks whose weight is 0 in all its steps, and whose outputs no regulariser compares.
        regularisers: The regularisers of the phase.
        mixout_paths: The parameters to which Mixout applies in it.
    """

    phase: Phase
    number: int
    start: int
    end: int
    decided: Any
    mask: Any
    rule: Rule
    rate: Any
    optimizer: Any
    cached: bool
    fresh_rule: bool
    weightless: tuple[str, ...] = ()
    regularisers: tuple[AnyRegulariser, ...] = ()
    mixout_paths: tuple[str, ...] = ()


def plan(experiment: Experiment, tasks: tuple[Task, ...], params: Any, watched: Mapping[str, Sequence[str]]) -> list[PhasePlan]:
    """The phases of a run.

    Args:
        experiment: The experiment.
        tasks: Its tasks, filled in.
        params: Its parameters.
        watched: As in Prepared.

    Raises:
        UserError: Rules do not fit the parameters, or a weighting rule the phase.
    """
    plans: list[PhasePlan] = []
    start = 0
    for number, phase in enumerate(experiment.phases):
        decided = freezing.decide(params, phase.rules)
        mask = jax.tree.map(lambda rule: rule.train, decided)
        if not any(jax.tree.leaves(mask)):
            raise UserError(f"phase {phase.name!r}: its rules freeze every parameter; nothing would train")
        trains_trunk = any(jax.tree.leaves(mask["trunk"]))
        rule = _rule(experiment, phase, trains_trunk)
        if per_task(rule):
            gram_gradient.check(params, mask, experiment.gram_over)
            for task in tasks:
                if experiment.gram_over == gram_gradient.REPRESENTATION and task.shift_free:
                    raise UserError(
                        f"gram_over representation: task {task.name!r} chooses between tokens, so a vector added to all of "
                        "them changes nothing, and its gradient is always 0; use trunk, or a part of it"
                    )
            if rule.transform is not None and experiment.gram_over != gram_gradient.TRUNK:
                raise UserError(f"weighting {experiment.weighting} changes the trunk's task gradients: gram_over must be trunk")
        same = bool(plans) and per_task(plans[-1].rule) == per_task(rule)
        same = same and not phase.weights and not plans[-1].phase.weights
        # A transform's state has the shape of what trains.
        same = same and (rule.transform is None or plans[-1].mask == mask)
        steps = range(start, start + phase.steps)
        regularisers = prepare.of_phase(experiment, number, steps)
        vectors = any(isinstance(each, Distillation) and each.of == "hidden" for each in regularisers)
        compared = {name for each in regularisers for name in watched.get(each.name, ())}
        trained = {path: None for path, trains in leaves_of(mask).items() if trains}
        plans.append(
            PhasePlan(
                phase=phase,
                number=number,
                start=start,
                end=start + phase.steps,
                decided=decided,
                mask=mask,
                rule=rule,
                rate=optimizers.schedule(experiment.optimizer, _peak(experiment, phase), phase.steps),
                optimizer=optimizers.build(experiment.optimizer, decided, _peak(experiment, phase), phase.steps),
                cached=phase.cache_features and not trains_trunk and needed_fields(tasks) == ("pooled",) and not vectors,
                fresh_rule=not same,
                weightless=() if vectors else _weightless(experiment, phase, rule, steps, compared),
                regularisers=regularisers,
                mixout_paths=tuple(matching(experiment.mixout.parameters, trained)) if experiment.mixout.p else (),
            )
        )
        start += phase.steps
    return plans


def renumbered(plan: PhasePlan, experiment: Experiment) -> PhasePlan:
    """The same phase of an experiment that differs in numbers only: weights, rates, decay, options of the rule.

    Args:
        plan: The phase.
        experiment: The other experiment; its numbers may be traced, as under vmap.
    """
    phase = experiment.phases[plan.number]
    names = {each.name for each in plan.regularisers}
    return plan._replace(
        phase=phase,
        rule=_rule(experiment, phase, any(jax.tree.leaves(plan.mask["trunk"]))),
        rate=optimizers.schedule(experiment.optimizer, _peak(experiment, phase), phase.steps),
        optimizer=optimizers.build(experiment.optimizer, plan.decided, _peak(experiment, phase), phase.steps),
        regularisers=tuple(each for each in experiment.regularisers if each.name in names),
    )


def _peak(experiment: Experiment, phase: Phase) -> float:
    return experiment.optimizer.learning_rate if phase.learning_rate is None else phase.learning_rate


def _rule(experiment: Experiment, phase: Phase, trains_trunk: bool) -> Rule:
    """The rule of a phase; one that compares task gradients gives way to `equal` where no shared parameter trains."""
    rule = rule_of(experiment, phase)
    if per_task(rule) and not trains_trunk:
        equal = rule_of(dataclasses.replace(experiment, weighting="equal", weighting_options={}), phase)
        return equal._replace(weighs_heads=rule.weighs_heads)  # heads are trained alike in all phases
    return rule


def _weightless(experiment: Experiment, phase: Phase, rule: Rule, steps: range, looked_at: Collection[str]) -> tuple[str, ...]:
    """The tasks whose weight is 0 in all of these steps, and at which no regulariser looks; () where that is every task."""
    weights = phase.weights or ({} if experiment.combinators else experiment.weights)
    if not weighs_heads(experiment, rule):  # a head learns by its plain loss, whatever the task's weight
        return ()
    idle = [task for task, weight in weights.items() if not schedules.over(weight, steps, task).any()]
    found = tuple(task for task in idle if task not in looked_at)
    return found if len(found) < len(weights) else ()


class Group(NamedTuple):
    """A rule and the number of parameters that it decides on."""

    rule: ParamRule
    size: int


def groups(params: Any, rules: Sequence[ParamRule]) -> list[Group]:
    """The rules in order, with the number of parameters that each decides on.

    Raises:
        UserError: As freezing.decide.
    """
    sizes = dict.fromkeys(rules, 0)
    for rule, leaf in zip(jax.tree.leaves(freezing.decide(params, rules)), jax.tree.leaves(params), strict=True):
        sizes[rule] += leaf.size
    return list(itertools.starmap(Group, sizes.items()))


def table(experiment: Experiment, params: Any) -> str:
    """A line for each phase and group: parameters, share of all, peak learning rate, decay, schedule.

    Rules in a row that differ in a layer's number only, and those in a row that freeze, share a line.
    """
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    rows = []
    for phase in experiment.phases:
        found = groups(params, phase.rules)
        for number, (_, same) in enumerate(itertools.groupby(found, key=lambda group: _kind(group.rule))):
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
