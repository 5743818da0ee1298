"""The loop of a chunk of runs: phases of steps that all of them take at once, evaluations, checkpoints, resuming.

As training.loop, with an axis over runs: work that is the same for all runs is done once, and a run that diverges does not
change the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.ablation import chunk_state, stacking
from mtl_jax.ablation.chunk_state import with_best
from mtl_jax.ablation.fields import Numbers
from mtl_jax.ablation.plan import Run, order_of
from mtl_jax.ablation.programs import Machine, scores_of
from mtl_jax.ablation.stacking import Together
from mtl_jax.core import trees
from mtl_jax.core.progress import Progress
from mtl_jax.data.batches import Batch
from mtl_jax.data.stream import stream
from mtl_jax.training import counts as counting
from mtl_jax.training import evaluation, metrics_log, results, sharing_usage, step_checks
from mtl_jax.training import mesh as meshes
from mtl_jax.training.checkpoint_store import Restored, Store
from mtl_jax.training.counts import Counts, evaluations_and_checkpoints, steps_by_phase
from mtl_jax.training.metrics_log import Logger
from mtl_jax.training.phase_loop import Actions, SentStep, train_phase
from mtl_jax.training.phase_plan import PhasePlan, with_numbers_of
from mtl_jax.training.preemption import Stop
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.references import References
from mtl_jax.training.setup import mixture_phases
from mtl_jax.training.train_state import StepInputs, StepMetrics, TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass
class RunStatus:
    """The progress of one run, saved in each checkpoint's record under "fates".

    Attributes:
        best: Its best dev criterion.
        best_step: The step of the best criterion.
        since_best: Evaluations since then.
        diverged: "at step N: " and the number that is not finite; empty: all are.
        ended: The step at which it diverged or stopped early; later steps are ignored. 0: it is still trained.
        facts: Counts.facts(...) at that step; {}: it is still trained, or ended before checkpoints had them.
    """

    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    diverged: str = ""
    ended: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Shared(NamedTuple):
    """The objects that all chunks of a program use.

    Attributes:
        machine: Its compiled functions.
        params: {seed: initial parameters}.
        table: () -> f32[n, H], the features of the untrained trunk where it is the same for all runs.
        run_folder: Run to its folder, a workdir without checkpoints and trunk.
        stop: Whether the process was asked to stop.
        progress: The bar over the whole ablation; a unit is a step of a run.
    """

    machine: Machine
    params: dict[int, Any]
    table: Callable[[], jax.Array]
    run_folder: Callable[[Run], Path]
    stop: Stop
    progress: Progress


class Chunk:
    """Runs that are trained at once.

    Args:
        shared: The objects that all chunks of the program use.
        runs: The runs, at most as many as the machine's size; copies of the last one fill the remaining places.
        values: fields.collect(...) of these runs, filled up in the same way.
        folder: The directory of their checkpoints.
    """

    def __init__(self, shared: Shared, runs: Sequence[Run], values: Numbers, folder: Path):
        self.shared, self.machine, self.runs, self.folder = shared, shared.machine, list(runs), folder
        self.prepared, self.mesh = self.machine.prepared, self.machine.mesh
        self.experiment, self.tasks = self.prepared.experiment, self.prepared.corpus.tasks
        self.values = jax.device_put(values, meshes.by_runs(self.mesh))
        order = order_of(self.runs[0])
        self.stream = stream(self.prepared.corpus, self.experiment.batch, order, mixture_phases(self.experiment))
        self.examples = {name: len(part.tokens) for name, part in self.prepared.corpus.splits["train"].items()}
        self.counts = counting.start(self.prepared.corpus)
        self.statuses = [RunStatus() for _ in self.runs]
        self.warned_of_solver: set[int] = set()
        self.references = [References(self._prepared_of(run), shared.run_folder(run)) for run in self.runs]

    def train(self) -> list[RunStatus]:
        """Trains from the newest checkpoint, or the beginning; writes the results of every run."""
        self.started = time.monotonic()
        checkpoints = dataclasses.replace(self.experiment.checkpoints, frozen=True)
        with contextlib.ExitStack() as stack:
            self.store = stack.enter_context(contextlib.closing(Store(self.folder, checkpoints)))
            stack.callback(self.stream.close)
            state = self._resume()
            step = int(state.step)
            self.loggers = [
                stack.enter_context(contextlib.closing(Logger(self.shared.run_folder(run), step, events=False)))
                for run in self.runs
            ]
            self._skip(0, step)
            for plan in self.prepared.plans:
                if step < plan.end and not self._ended():
                    if step == plan.start and plan.number:
                        state = chunk_state.start_phase(self.machine, self.values, plan, state)
                    references, apart = self._references_of(plan, state, step == plan.start)
                    state, step = self._phase(plan, state, step, references, apart)
            self._skip(step, self.prepared.plans[-1].end)
            self.store.wait()
            self._finish(step, state)
        return self.statuses

    def _skip(self, start: int, stop: int) -> None:
        span = (self.experiment, start, stop, len(self.runs))
        self.shared.progress.skip(steps_by_phase(*span), evaluations_and_checkpoints(*span))

    def newest(self) -> Together | None:
        """The state of the newest checkpoint, for reading; counts, statuses and data position become those of it."""
        with contextlib.closing(Store(self.folder, self.experiment.checkpoints, read_only=True)) as store:
            steps = store.steps()
            return self._restored(store.restore(steps[-1], self._template)) if steps else None

    def _resume(self) -> Together:
        restored = self.store.latest(self._template)
        if restored is None:
            copies = [self.runs[-1]] * (self.machine.size - len(self.runs))
            seeds = [run.experiment.seed for run in (*self.runs, *copies)]
            return chunk_state.initial_state(self.machine, self.values, self.shared.params, seeds)
        log.info("%s: resuming from step %d", self.folder, restored.step)
        return self._restored(restored)

    def _restored(self, restored: Restored) -> Together:
        record = restored.record
        self.counts, self.statuses = Counts(**record["counts"]), [RunStatus(**status) for status in record["fates"]]
        self.stream.set_state(record["data"])
        for references, digests in zip(self.references, record["references"], strict=True):
            references.digests = dict(digests)
        return restored.state

    def _template(self, record: dict[str, Any]) -> Together:
        plan, params = self.prepared.plans[record["counts"]["phase"]], self.shared.params[self.runs[0].experiment.seed]
        return chunk_state.template(self.machine, self.values, plan, params)

    def _prepared_of(self, run: Run) -> Prepared:
        """The prepared run that is trained outside of a chunk, for work that is done run by run."""
        plans = [with_numbers_of(plan, run.experiment) for plan in self.prepared.plans]
        params = self.shared.params[run.experiment.seed]
        return self.prepared._replace(experiment=run.experiment, params=params, plans=plans)

    def _references_of(self, plan: PhasePlan, state: Together, begins: bool) -> tuple[Any, frozenset[str]]:
        """The references of the regularisers of a phase, and the names of those that differ between runs."""
        if not any(phase.regularisers or phase.mixout_paths for phase in self.prepared.plans):
            return None, frozenset()
        per_run, by_run = self.machine.per_run[plan.number], []
        for number, references in enumerate(self.references):
            run_plan = references.prepared.plans[plan.number]
            run_state = stacking.take_state(state.state(), per_run, number)
            by_run.append(jax.device_get(references.for_phase(run_plan, run_state, begins)))
        if by_run[0] is None:
            return None, frozenset()
        by_run += [by_run[-1]] * (self.machine.size - len(by_run))
        stacked, apart = {}, set()
        for name in by_run[0]:
            trees_of_runs = [of_run[name] for of_run in by_run]
            first = trees_of_runs[0]
            if any(jax.tree.leaves(stacking.differing(trees_of_runs))):
                apart.add(name)
                stacked[name] = stacking.stack(trees_of_runs, jax.tree.map(lambda _: True, first), self.mesh)
            else:
                stacked[name] = meshes.place(first, meshes.replicated(self.mesh))
        return stacked, frozenset(apart)

    def _table(self, plan: PhasePlan, state: Together) -> Any:
        """The cached features of a phase, f32[n, H], or f32[N, n, H] where the trunks differ; None: it has none."""
        if not plan.cached_features:
            return None
        if not self.machine.trunks_differ(plan):
            return self.shared.table()
        per_run, apply, batching = self.machine.per_run[plan.number], self.machine.features, self.experiment.batch
        parts = [part for split in self.prepared.corpus.splits.values() for part in split.values()]
        tables = [
            evaluation.features(apply, stacking.take(state.params, per_run, number), parts, batching, self.mesh)
            for number in range(self.machine.size)
        ]
        return meshes.place(np.stack(tables), meshes.by_runs(self.mesh))

    def _phase(
        self, plan: PhasePlan, state: Together, step: int, references: Any, apart: frozenset[str]
    ) -> tuple[Together, int]:
        table = self._table(plan, state)
        self.counts.phase = plan.number
        steps = np.arange(plan.end - plan.start)
        run_plans = [with_numbers_of(plan, run.experiment) for run in self.runs]
        self.rates = [np.broadcast_to(jax.vmap(run_plan.learning_rate)(steps), len(steps)) for run_plan in run_plans]
        actions = Actions(
            take_step=lambda state, batch: self._step(plan, state, batch, table, references, apart),
            read=lambda sent: self._read(sent, plan),
            evaluate=lambda step, state: self._evaluate_and_save(step, plan, state, table),
            save=self._save,
            wait=self.store.wait,
            ended=self._ended,
        )
        shared, runs = self.shared, len(self.runs)
        return train_phase(state, step, plan, self.stream, actions, self.experiment, shared.stop, shared.progress, runs)

    def _step(
        self, plan: PhasePlan, before: Together, batch: Batch, table: Any, references: Any, apart: frozenset[str]
    ) -> tuple[Together, StepMetrics]:
        batch = meshes.assemble(batch, meshes.by_rows(self.mesh))
        inputs = StepInputs(batch, table, references, self.machine.held_out)
        run_step = self.machine.step(plan, self.values, before.state(), inputs, apart=apart)
        state, metrics = run_step(self.values, before.state(), inputs)
        return with_best(state, before.best), metrics

    def _read(self, sent: SentStep, plan: PhasePlan) -> None:
        """Waits for the metrics of a step, logs them run by run, and ends the runs whose metrics are not finite."""
        metrics = jax.device_get(sent.metrics)
        self.counts.add(metrics.seen[0], sent.places, None if metrics.made is None else metrics.made[0])
        facts, tokens = self.counts.facts(self.examples), 0
        for number, status in enumerate(self.statuses):
            if status.ended:
                continue
            run_metrics = jax.tree.map(lambda leaf, number=number: leaf[number], metrics)
            rate = float(self.rates[number][sent.step - 1 - plan.start])
            _, record = metrics_log.step_record(run_metrics, facts, rate, plan.number)
            tokens += record["tokens"]
            self.loggers[number].write("train", sent.step, record)
            if problem := step_checks.non_finite_metric(run_metrics):
                self._diverged(number, sent.step, problem)
            unsolved = step_checks.unsolved(run_metrics)
            if unsolved and number not in self.warned_of_solver:
                self.warned_of_solver.add(number)
                log.warning("run %s, step %d: %s", self.runs[number].name, sent.step, unsolved)
        self.shared.progress.update(len(self.runs), tokens, title=plan.phase.name)

    def _diverged(self, number: int, step: int, problem: str) -> None:
        self.statuses[number].diverged = f"at step {step}: {problem}"
        self._end(number, step)
        log.warning("run %s diverged at step %d: %s; the other runs are trained on", self.runs[number].name, step, problem)

    def _end(self, number: int, step: int) -> None:
        """Ends a run at a step whose metrics are the last that were read; its counts are those up to this step."""
        self.statuses[number].ended, self.statuses[number].facts = step, self.counts.facts(self.examples)

    def _ended(self) -> bool:
        """Whether every run has diverged or stopped early."""
        return all(status.ended for status in self.statuses)

    def _evaluate_and_save(self, step: int, plan: PhasePlan, before: Together, table: Any) -> Together:
        state = self.machine.collect(plan, before.state())
        evaluated = with_best(state, self._evaluate(step, plan, state, before.best, table))
        self._save(step, evaluated)
        return evaluated

    def _evaluate(self, step: int, plan: PhasePlan, state: TrainState, best: Any, table: Any) -> Any:
        """Measures all runs on dev; returns the best parameters so far of each run."""
        measured, per_run = state.measured(), self.machine.per_run[plan.number]
        active = [not status.ended for status in self.statuses]
        apply = self.machine.outputs(plan, plan.cached_features)
        scores_by_run = scores_of(self.machine, apply, measured, "dev", active, per_run, lambda task: task.dev_beams, table)
        better = np.zeros(self.machine.size, bool)
        for number, (status, run_scores) in enumerate(zip(self.statuses, scores_by_run, strict=True)):
            if run_scores is None:
                continue
            scores = run_scores.scores
            not_finite = [task for task, metrics in scores.items() if not math.isfinite(metrics["loss"])]
            if not_finite:
                self._diverged(number, step, f"the dev loss of task {not_finite[0]!r} is {scores[not_finite[0]]['loss']}")
                continue
            value = evaluation.criterion(self.experiment.evaluation.criterion, self.tasks, scores)
            record = {f"{task}/{metric}": score for task, metrics in scores.items() for metric, score in metrics.items()}
            self.loggers[number].write("dev", step, {**record, "criterion": value, "phase": plan.number})
            if self.machine.usage is not None:
                run_params = stacking.take(measured, per_run, number)
                weights = sharing_usage.usage_record(self.machine.usage, run_params, self.prepared)
                self.loggers[number].write(metrics_log.USAGE, step, weights)
            better[number] = status.best is None or value >= status.best
            if better[number]:
                status.best, status.best_step, status.since_best = value, step, 0
            else:
                status.since_best += 1
                if status.since_best == self.experiment.evaluation.patience:
                    self._end(number, step)
        return self.machine.keep_better(best, stacking.per_run_part(measured, per_run), jnp.asarray(better))

    def _save(self, step: int, state: Together) -> None:
        before, self.started = self.started, time.monotonic()
        self.counts.seconds += self.started - before
        for logger in self.loggers:
            logger.flush()
        record = {
            "step": step,
            "counts": dataclasses.asdict(self.counts),
            "fates": [dataclasses.asdict(status) for status in self.statuses],
            "data": self.stream.get_state(),
            "references": [references.digests for references in self.references],
        }
        self.store.save(step, state, record, None)

    def _finish(self, step: int, state: Together) -> None:
        """Measures each run's best parameters on dev and test, and writes its results."""
        plan = self.prepared.plans[self.counts.phase]
        per_run = self.machine.per_run[plan.number]
        params = trees.merge(state.best, state.params)
        measured = [status.best is not None for status in self.statuses]
        apply = self.machine.outputs(plan, False)
        scores = {
            split: scores_of(self.machine, apply, params, split, measured, per_run, lambda task: task.beams)
            for split in ("dev", "test")
        }
        self.counts.seconds += time.monotonic() - self.started
        test_split = self.prepared.corpus.splits["test"]
        signatures = {task.name: task.signatures(test_split[task.source].data) for task in self.tasks}
        for number, (run, status) in enumerate(zip(self.runs, self.statuses, strict=True)):
            dev, test = scores["dev"][number], scores["test"][number]
            if dev is None or test is None:  # it was never measured
                continue
            facts = {
                "run": run.name,
                "diverged": status.diverged,
                "steps": status.ended or step,
                "best_step": status.best_step,
                "best_criterion": status.best,
                "seconds": round(self.counts.seconds, 1),
                "runs_at_once": len(self.runs),
                **(status.facts or self.counts.facts(self.examples)),
            }
            folder, run_scores = self.shared.run_folder(run), {"dev": dev.scores, "test": test.scores}
            copies = {"without_copies": test.without_copies}
            results.write(folder, run.experiment, self.tasks, run_scores, signatures, facts, figure=False, **copies)
