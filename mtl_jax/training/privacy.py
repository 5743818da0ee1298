"""The privacy of a run: what it refuses, the noise and steps that its budget allows, and the epsilon that it spent.

The unit is one row of one source. Two data sets are neighbours if one has one row more; a row's epsilon follows from the
probability with which rows of its source are drawn, and the run's is the largest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, count
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.poisson import PoissonSchedule
from mtl_jax.experiment import Experiment, rule_of
from mtl_jax.tasks import Task
from mtl_jax.transfer import accountants
from mtl_jax.transfer.private import Private, secret_of, seed_of
from mtl_jax.trunks import Pretrained, TrunkConfig
from mtl_jax.trunks.from_scratch import Transformer
from mtl_jax.weighting import blind

OVERFLOW_SHARE = 0.01  # the share of delta that pays for batches of more than batch.rows rows


class Facts(NamedTuple):
    """What a run knows of itself at a step, beside its metrics.

    Attributes:
        evaluated: Steps done -> numbers for the record of an evaluation in metrics.jsonl.
        finished: Steps done -> fields of results.json.
    """

    evaluated: Callable[[int], dict[str, float]] = lambda step: {}
    finished: Callable[[int], dict[str, Any]] = lambda step: {}


class Budget(NamedTuple):
    """A run within its budget.

    Attributes:
        experiment: The experiment, with the noise that was solved for, and no step that would exceed the budget.
        facts: The epsilon at a step.
        notes: Lines for the log.
    """

    experiment: Experiment
    facts: Facts = Facts()
    notes: tuple[str, ...] = ()


def check(experiment: Experiment) -> None:
    """Checks that nothing in a private experiment escapes the clipping and the noise.

    Raises:
        UserError: Something does; one line names it.
    """
    private, batch = experiment.optimizer.private, experiment.batch
    if not private.clip:
        return
    if batch.sampling != "poisson":
        raise UserError(
            f"optimizer.private: batch.sampling is {batch.sampling}, but the accountants assume that every row is drawn "
            "independently: add --batch.sampling poisson --batch.no-packed"
        )
    if batch.accumulate != 1:
        raise UserError("optimizer.private: batch.accumulate is not for private training; optimizer.private.micro_batch is")
    if batch.rows % private.micro_batch:
        raise UserError(f"optimizer.private.micro_batch is {private.micro_batch}; it must divide batch.rows, {batch.rows}")
    names = [task.name for task in experiment.tasks]
    for phase in experiment.phases:
        rule = rule_of(experiment, phase)
        if blind.reads_losses(rule, names):
            name = " with ".join([rule.name or "of the script", *experiment.combinators])
            raise UserError(
                f"optimizer.private: the weighting {name} is not private, as its weights depend on the rows of a batch; "
                "choose equal, fixed or scheduled"
            )
    for regulariser in experiment.regularisers:
        if regulariser.reads_rows:
            raise UserError(
                f"optimizer.private: the regulariser {regulariser.name} ({type(regulariser).__name__}) is not private, as it "
                "looks at rows beside the clipped gradients; L2SP is"
            )
    for task in experiment.tasks:
        if type(task).fitted is not Task.fitted and getattr(task, "balanced", True):
            raise UserError(
                f"optimizer.private: task {task.name!r} counts labels of the training rows (balanced), which is not private; "
                "give class_weights"
            )
    trunk = type(experiment.trunk)
    if not issubclass(trunk, Pretrained) and trunk.tokenizer in (TrunkConfig.tokenizer, Transformer.tokenizer):
        raise UserError(
            f"optimizer.private: the vocabulary of trunk {trunk.__name__} is made from the training texts, "
            "which is not private; take a Pretrained one"
        )
    secret_of(private)


def noise_key(experiment: Experiment) -> jax.Array:
    """u32[2], the key of the run, from which noise and dropout follow."""
    seed = seed_of(experiment.optimizer.private, experiment.seed, "noise", 8)
    return jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)


def within_budget(experiment: Experiment, corpus: Corpus, schedule: Any) -> Budget:
    """The run with its noise and steps; an experiment that is not private is returned as it is.

    Args:
        experiment: The experiment, checked.
        corpus: Its data.
        schedule: The rows of its batches.

    Raises:
        UserError: The data or the budget does not allow a private run.
    """
    private = experiment.optimizer.private
    if not private.clip:
        return Budget(experiment)
    assert isinstance(schedule, PoissonSchedule)
    _check_rows(experiment, corpus)
    steps = sum(phase.steps for phase in experiment.phases)
    notes = []
    if private.epsilon and not private.noise:
        noise = accountants.noise_for(lambda noise: spent(private, noise, schedule, steps), private.epsilon)
        private = dataclasses.replace(private, noise=noise)
        optimizer = dataclasses.replace(experiment.optimizer, private=private)
        experiment = dataclasses.replace(experiment, optimizer=optimizer)
        notes.append(f"private: noise {noise:g} spends epsilon {private.epsilon:g} over {count(steps, 'step')}")
    elif private.epsilon:
        within = functools.partial(spent, private, private.noise, schedule)
        allowed = accountants.steps_within(within, private.epsilon, steps)
        if allowed < steps:
            experiment = _ending_at(experiment, allowed)
            notes.append(
                f"private: the budget, epsilon {private.epsilon:g}, ends the run after {count(allowed, 'step')} of {steps}"
            )
            steps = allowed
    final = spent(private, private.noise, schedule, steps)
    guarantee = "nothing is guaranteed" if final == math.inf else f"epsilon {final:.3g}"
    notes.append(
        f"private: clip {private.clip:g}, noise {private.noise:g}, {guarantee} at delta {private.delta:g} "
        f"by {private.accountant}"
    )
    if private.noise and final == math.inf:
        notes.append(
            "private: for a guarantee, add noise, or make batches of more than batch.rows rows less likely by a smaller "
            "batch.expected_rows"
        )
    if not private.secret and private.noise:
        notes.append(
            "private: noise and drawn rows follow from the seed, so the guarantee holds only against those who do not know it; "
            "for parameters that you give away, set optimizer.private.secret"
        )
    if experiment.init_from.path:
        notes.append("private: what the run of init_from.path learned from the same rows is not counted")
    if experiment.sharing.earlier_runs():
        notes.append("private: what the runs of sharing.runs learned from the same rows is not counted")
    return Budget(
        experiment,
        Facts(
            functools.lru_cache(lambda step: _finite({"epsilon": spent(private, private.noise, schedule, step)})),
            # Where dev decides when the run ends, a smaller number of steps is no guarantee that was fixed before.
            lambda step: {"privacy": _record(private, schedule, steps if experiment.evaluation.patience else step)},
        ),
        tuple(notes),
    )


def spent(private: Private, noise: float, schedule: PoissonSchedule, steps: int) -> float:
    """The epsilon of a run at its delta: of the rows whose source spends the most; infinity where nothing is guaranteed.

    Args:
        private: Delta and accountant.
        noise: The noise multiplier.
        schedule: The rows of its batches.
        steps: Its steps.
    """
    return max(_by_source(private, noise, schedule, steps).values(), default=0.0)


def _by_source(private: Private, noise: float, schedule: PoissonSchedule, steps: int) -> dict[str, float]:
    """{source: the epsilon of its rows}.

    Where more rows are drawn than fit, the step is that of another mechanism. If this happens in a run with a probability tau,
    delta grows by (1 + e^epsilon) tau: Chua et al., 2024, https://arxiv.org/abs/2411.04205.
    """
    accountant = accountants.ACCOUNTANTS[private.accountant]
    rates, overflow = schedule.rates_until(steps), schedule.overflow(steps)
    delta = private.delta * (1 - OVERFLOW_SHARE)
    known: dict[tuple[tuple[float, int], ...], float] = {}
    for of_source in rates.values():
        if tuple(of_source) not in known:
            epsilon = accountant(noise, of_source, delta)
            paid = epsilon < 100 and (1 + math.exp(epsilon)) * overflow <= private.delta * OVERFLOW_SHARE
            known[tuple(of_source)] = epsilon if paid or not overflow else math.inf
    return {source: known[tuple(of_source)] for source, of_source in rates.items()}


def _record(private: Private, schedule: PoissonSchedule, steps: int) -> dict[str, Any]:
    """The field privacy of results.json."""
    by_source = _by_source(private, private.noise, schedule, steps)
    return {
        "epsilon": max(by_source.values(), default=0.0),
        "delta": private.delta,
        "unit": "one row of one source, added or removed",
        "clip": private.clip,
        "noise": private.noise,
        "accountant": private.accountant,
        "steps": steps,
        "expected_rows": sum(schedule.expected(0).values()),
        "overflow": schedule.overflow(steps),
        "secret": bool(private.secret),
        "sources": {
            source: {"rows": schedule.sizes[source], "rate": schedule.rates(0)[source], "epsilon": epsilon}
            for source, epsilon in by_source.items()
        },
    }


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _check_rows(experiment: Experiment, corpus: Corpus) -> None:
    for name, examples in corpus.splits["train"].items():
        if len(examples.tokens) > len(examples.data):
            raise UserError(
                f"optimizer.private: long rows of source {name!r} became several windows, but a row must be clipped as a "
                "whole; make batch.row_length longer, or leave long rows out"
            )
        if experiment.optimizer.private.delta * len(examples.data) >= 1:
            raise UserError(
                f"optimizer.private.delta is {experiment.optimizer.private.delta:g}, but source {name!r} has "
                f"{count(len(examples.data), 'training row')}: it must be below one over them, or a row may be given away"
            )


def _ending_at(experiment: Experiment, steps: int) -> Experiment:
    """The experiment whose last phase ends after `steps` steps of the run."""
    *before, last = experiment.phases
    left = steps - sum(phase.steps for phase in before)
    if left < 1:
        raise UserError(
            f"optimizer.private.epsilon is {experiment.optimizer.private.epsilon:g}, which is spent after "
            f"{count(steps, 'step')}, before phase {last.name!r} begins; take fewer steps, more noise or fewer rows"
        )
    return dataclasses.replace(experiment, phases=(*before, dataclasses.replace(last, steps=left)))
