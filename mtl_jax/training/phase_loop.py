"""The steps of a phase: a batch in, metrics out one step late, evaluations and checkpoints in their places.

One run trains by this loop, and so do the many runs of an ablation; they differ in their actions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from mtl_jax.core.errors import Interrupted
from mtl_jax.core.progress import Progress
from mtl_jax.data.batches import Batch
from mtl_jax.experiment import Experiment
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.preemption import Stop
from mtl_jax.training.train_state import StepMetrics


class SentStep(NamedTuple):
    """A step that the device works on, or has done, and whose metrics the host has not read.

    Attributes:
        step: Its number, from 1.
        places: Places for tokens in its batch, over all hosts.
        metrics: Of the step, still on the device.
    """

    step: int
    places: int
    metrics: StepMetrics


class Actions(NamedTuple):
    """The parts of the loop that depend on how many runs it trains. The state is any pytree.

    Attributes:
        take_step: (state, host batch) -> new state and metrics, without waiting for them.
        read: Waits for the metrics of a step, logs them, and deals with those that are not finite.
        evaluate: (step, state) -> state: evaluates on dev, and saves a checkpoint with the result.
        save: (step, state): saves a checkpoint that was not evaluated, and returns before it is written.
        wait: Waits until all checkpoints are written.
        ended: Whether training ends before the last step.
    """

    take_step: Callable[[Any, Batch], tuple[Any, StepMetrics]]
    read: Callable[[SentStep], None]
    evaluate: Callable[[int, Any], Any]
    save: Callable[[int, Any], None]
    wait: Callable[[], None]
    ended: Callable[[], bool]


def train_phase(
    state: Any,
    step: int,
    plan: PhasePlan,
    batches: Iterator[Batch],
    actions: Actions,
    experiment: Experiment,
    stop: Stop,
    progress: Progress,
    runs: int = 1,
) -> tuple[Any, int]:
    """Trains to the end of a phase.

    Args:
        state: The state at `step`.
        step: Steps done.
        plan: The phase.
        batches: The coming batches.
        actions: How a step is taken, read, evaluated and saved.
        experiment: Says how often to evaluate and to save.
        stop: Whether the process was asked to stop.
        progress: The bar; its unit is a step of one run.
        runs: How many runs are trained at once.

    Returns:
        The new state; the steps done.

    Raises:
        Interrupted: The process was asked to stop; the state is saved.
    """
    sent: SentStep | None = None

    def read_sent() -> None:
        nonlocal sent
        if sent is not None:
            read, sent = sent, None
            actions.read(read)

    first = step
    while step < plan.end and not actions.ended():
        if stop.requested(step):
            read_sent()
            actions.save(step, state)
            actions.wait()
            raise Interrupted(f"stopped at step {step}; the same command resumes from there")
        batch = next(batches)
        state, metrics = actions.take_step(state, batch)
        if step == first:
            progress.beside("compilation")
        step += 1
        read_sent()  # of the step before: the device is already at work on this one
        sent = SentStep(step, batch.tokens.size * jax.process_count(), metrics)
        if step % experiment.evaluation.every == 0 or step == plan.end:
            read_sent()
            state = actions.evaluate(step, state)
            progress.beside("evaluation", runs)
        elif step % experiment.checkpoints.every == 0:
            read_sent()
            actions.save(step, state)
            progress.beside("checkpoint", runs)
    return state, step
