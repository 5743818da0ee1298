"""What trains in each phase, as a table: shown before the first step."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import tabulate

from mtl_jax.experiment import Experiment, Phase
from mtl_jax.transfer import freezing
from mtl_jax.transfer.freezing import ParamRule


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
