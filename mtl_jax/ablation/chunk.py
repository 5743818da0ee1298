"""The training of a chunk of runs: phases of steps that all of them take at once, evaluation, checkpoints, resuming.

Like training.loop, with an axis over runs: what is the same for all is done once, and what happens to one run leaves the others
alone.
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

from mtl_jax.ablation import stacking
from mtl_jax.ablation.fields import Numbers
from mtl_jax.ablation.plan import Run, order_of
from mtl_jax.ablation.programs import Machine, scores_of
from mtl_jax.ablation.stacking import Together
from mtl_jax.core import trees as freezing
from mtl_jax.core.errors import Interrupted
from mtl_jax.core.progress import Progress
from mtl_jax.data.stream import stream
from mtl_jax.training import evaluation, metrics_log, results
from mtl_jax.training import mesh as meshes
from mtl_jax.training.checkpoint_store import Restored, Store
from mtl_jax.training.counts import Counts, other_work, steps_by_phase
from mtl_jax.training.metrics_log import Logger
from mtl_jax.training.phase_plan import PhasePlan, renumbered
from mtl_jax.training.preemption import Stop
from mtl_jax.training.regularisation.references import References
from mtl_jax.training.setup import stretches
from mtl_jax.training.train_state import Metrics, TrainState
from mtl_jax.transfer import optax_rules

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Fate:
    """What has become of a run so far.

    Attributes:
        best: Its best dev criterion.
        best_step: The step of that.
        since_best: Evaluations since then.
        diverged: "at step N: what is not finite"; empty: all is well.
        ended: The step at which it diverged or stopped early, and after which nothing counts any more; 0: it goes on.
    """

    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    diverged: str = ""
    ended: int = 0


class _Pending(NamedTuple):
    step: int
    places: int
    metrics: Metrics


class Shared(NamedTuple):
    """What the chunks of a program share.

    Attributes:
        machine: Its compiled programs.
        params: {seed: initial parameters}.
        table: () -> f32[n, H], the features of the untrained trunk where all runs have the same.
        run_folder: Run to its folder, an ordinary workdir but for checkpoints and trunk.
        stop: Whether to stop.
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
        shared: What the chunks share.
        runs: The runs, as many as the machine's size or fewer: what is missing is filled up with copies that nobody sees.
        values: numbers.collect(...) of all of the program's runs, cut to these and filled up in the same way.
        folder: Where checkpoints are.
    """

    def __init__(self, shared: Shared, runs: Sequence[Run], values: Numbers, folder: Path):
        self.shared, self.machine, self.runs, self.folder = shared, shared.machine, list(runs), folder
        self.prepared, self.mesh = self.machine.prepared, self.machine.mesh
        self.experiment, self.tasks = self.prepared.experiment, self.prepared.corpus.tasks
        self.values = jax.device_put(values, meshes.by_runs(self.mesh))
        order = order_of(self.runs[0])
        self.stream = stream(self.prepared.corpus, self.experiment.batch, order, stretches(self.experiment))
        self.examples = {name: len(part.tokens) for name, part in self.prepared.corpus.splits["train"].items()}
        self.counts = Counts(seen={name: [0, 0, 0] for name in self.examples})
        self.fates = [Fate() for _ in self.runs]
        self.pending: _Pending | None = None
        self.warned: set[int] = set()
        self.references = [References(self._alone(run), shared.run_folder(run)) for run in self.runs]

    def train(self) -> list[Fate]:
        """From the newest checkpoint, or the beginning, to the results of every run."""
        self.started = time.monotonic()
        kept = dataclasses.replace(self.experiment.checkpoints, frozen=True)
        with contextlib.ExitStack() as stack:
            self.store = stack.enter_context(contextlib.closing(Store(self.folder, kept)))
            stack.callback(self.stream.close)
            now = self._resume()
            step = int(now.step)
            self.loggers = [
                stack.enter_context(contextlib.closing(Logger(self.shared.run_folder(run), step, events=False)))
                for run in self.runs
            ]
            self._skip(0, step)
            for plan in self.prepared.plans:
                if step < plan.end and not self._ended():
                    if step == plan.start and plan.number:
                        now = self._enter(plan, now)
                    held, apart = self._hold(plan, now, step == plan.start)
                    now, step = self._phase(plan, now, step, held, apart)
            self._skip(step, self.prepared.plans[-1].end)
            self.store.wait()
            self._finish(step, now)
        return self.fates

    def _skip(self, start: int, stop: int) -> None:
        span = (self.experiment, start, stop, len(self.runs))
        self.shared.progress.skip(steps_by_phase(*span), other_work(*span))

    def newest(self) -> Together | None:
        """The state of the newest checkpoint, without a step being taken; with it counts, fates and position."""
        with contextlib.closing(Store(self.folder, self.experiment.checkpoints, read_only=True)) as store:
            steps = store.steps()
            return self._restored(store.restore(steps[-1], self._template)) if steps else None

    def _resume(self) -> Together:
        restored = self.store.latest(self._template)
        if restored is None:
            return self._first()
        log.info("%s: resuming from step %d", self.folder, restored.step)
        return self._restored(restored)

    def _restored(self, restored: Restored) -> Together:
        record = restored.record
        self.counts, self.fates = Counts(**record["counts"]), [Fate(**fate) for fate in record["fates"]]
        self.stream.set_state(record["data"])
        for references, digests in zip(self.references, record["references"], strict=True):
            references.digests = dict(digests)
        return restored.state

    def _seeds(self) -> list[int]:
        filled = [*self.runs, *[self.runs[-1]] * (self.machine.size - len(self.runs))]
        return [run.experiment.seed for run in filled]

    def _first(self) -> Together:
        plan, own = self.prepared.plans[0], self.machine.own[0]
        params = stacking.stack([self.shared.params[seed] for seed in self._seeds()], own, self.mesh)
        fresh = self.machine.begin(plan, self.values, params)
        step = meshes.place(np.zeros((), np.int32), meshes.replicated(self.mesh))
        key, best = stacking.keys(self._seeds(), self.mesh), _copied(stacking.own_part(params, own))
        return Together(step, params, fresh.opt_state, fresh.rule_state, key, _copied(fresh.average), best)

    def _enter(self, plan: PhasePlan, now: Together) -> Together:
        """The state at the start of a later phase; see training.prepare.enter."""
        before, own = self.machine.own[plan.number - 1], self.machine.own[plan.number]
        params = stacking.widen(now.params, before, own, self.machine.size, self.mesh)
        best = jax.tree.map(
            lambda was, has, old, new: old if was else jnp.copy(new) if has else None, before, own, now.best, params
        )
        fresh = self.machine.begin(plan, self.values, params)
        moments = jax.device_put(optax_rules.carry(now.opt_state, fresh.opt_state), meshes.by_runs(self.mesh))
        rule_state = fresh.rule_state if plan.fresh_rule else now.rule_state
        return now._replace(params=params, opt_state=moments, rule_state=rule_state, average=_copied(fresh.average), best=best)

    def _template(self, record: dict[str, Any]) -> Together:
        plan = self.prepared.plans[record["counts"]["phase"]]
        own, size = self.machine.own[plan.number], self.machine.size
        some = self.shared.params[self._seeds()[0]]
        params = jax.tree.map(
            lambda has, leaf: jax.ShapeDtypeStruct((size, *leaf.shape) if has else leaf.shape, leaf.dtype), own, some
        )
        fresh = self.machine.begin_shapes(plan, self.values, params)
        step, key = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((size, 2), np.uint32)
        best = stacking.own_part(params, own)
        shapes: Any = (step, params, fresh.opt_state, fresh.rule_state, key, fresh.average, best)
        shardings = (*stacking.shardings(own, self.mesh), meshes.by_runs(self.mesh))
        return Together(*stacking.placed(shapes, shardings))

    def _alone(self, run: Run) -> Any:
        """A run as if it were trained alone, for what is done run by run."""
        plans = [renumbered(plan, run.experiment) for plan in self.prepared.plans]
        params = self.shared.params[run.experiment.seed]
        return self.prepared._replace(experiment=run.experiment, params=params, plans=plans)

    def _hold(self, plan: PhasePlan, now: Together, begins: bool) -> tuple[Any, frozenset[str]]:
        """What the regularisers of a phase hold on to, and of which of it each run has its own."""
        if not plan.held and not plan.mixed and not any(each.held or each.mixed for each in self.prepared.plans):
            return None, frozenset()
        own, found = self.machine.own[plan.number], []
        for number, references in enumerate(self.references):
            mine = references.prepared.plans[plan.number]
            found.append(jax.device_get(references.enter(mine, stacking.take_state(now.state(), own, number), begins)))
        if found[0] is None:
            return None, frozenset()
        found += [found[-1]] * (self.machine.size - len(found))
        trees, apart = {}, set()
        for name in found[0]:
            each = [held[name] for held in found]
            if any(jax.tree.leaves(stacking.differing(each))):
                apart.add(name)
                trees[name] = stacking.stack(each, jax.tree.map(lambda _: True, each[0]), self.mesh)
            else:
                trees[name] = meshes.place(each[0], meshes.replicated(self.mesh))
        return trees, frozenset(apart)

    def _table(self, plan: PhasePlan, now: Together) -> Any:
        """The features that a phase looks up, f32[n, H], or f32[N, n, H] where the trunks differ."""
        if not plan.cached:
            return None
        if not self.machine.own_trunk(plan):
            return self.shared.table()
        own, prepared = self.machine.own[plan.number], self.prepared
        parts = [part for split in prepared.corpus.splits.values() for part in split.values()]
        tables = [
            evaluation.features(
                self.machine.features, stacking.take(now.params, own, number), parts, self.experiment.batch, self.mesh
            )
            for number in range(self.machine.size)
        ]
        return meshes.place(np.stack(tables), meshes.by_runs(self.mesh))

    def _phase(self, plan: PhasePlan, now: Together, step: int, held: Any, apart: frozenset[str]) -> tuple[Together, int]:
        table = self._table(plan, now)
        self.counts.phase = plan.number
        steps = np.arange(plan.end - plan.start)
        plans = [renumbered(plan, run.experiment) for run in self.runs]
        self.rates = [np.broadcast_to(jax.vmap(mine.rate)(steps), len(steps)) for mine in plans]
        state, best, begun = now.state(), now.best, step
        while step < plan.end and not self._ended():
            if self.shared.stop.requested(step):
                self._read_pending(plan)
                self._save(step, _with_best(state, best))
                self.store.wait()
                raise Interrupted(f"stopped at step {step}; the same command goes on from there")
            host_batch = next(self.stream)
            batch = meshes.assemble(host_batch, meshes.by_rows(self.mesh))
            run_step = self.machine.step(plan, self.values, state, batch, table, held, apart=apart)
            if step == begun:
                self.shared.progress.beside("compilation")
            state, metrics = run_step(self.values, state, batch, table, held)
            step += 1
            self._read_pending(plan)
            self.pending = _Pending(step, host_batch.tokens.size, metrics)
            if step % self.experiment.evaluation.every == 0 or step == plan.end:
                self._read_pending(plan)
                state = self.machine.collect(plan, state)
                best = self._evaluate(step, plan, state, best, table)
                self._save(step, _with_best(state, best))
                self.shared.progress.beside("evaluation", len(self.runs))
            elif step % self.experiment.checkpoints.every == 0:
                self._read_pending(plan)
                self._save(step, _with_best(state, best))
                self.shared.progress.beside("checkpoint", len(self.runs))
        return _with_best(state, best), step

    def _read_pending(self, plan: PhasePlan) -> None:
        """Logs the step that was sent off last, and notes which runs are not finite any more."""
        if self.pending is None:
            return
        step, places, metrics = self.pending
        self.pending = None
        metrics = jax.device_get(metrics)
        self.counts.add(metrics.seen[0], places)
        facts, tokens = self.counts.facts(self.examples), 0
        for number, fate in enumerate(self.fates):
            if fate.ended:
                continue
            own = jax.tree.map(lambda leaf, number=number: leaf[number], metrics)
            _, record = metrics_log.read(own, facts["seen"])
            tokens += record["tokens"]
            record |= {
                "padding": facts["padding"],
                "learning_rate": float(self.rates[number][step - 1 - plan.start]),
                "phase": plan.number,
            }
            self.loggers[number].write("train", step, record)
            self._note(number, step, metrics_log.not_finite(own))
            unsolved = metrics_log.unsolved(own)
            if unsolved and number not in self.warned:
                self.warned.add(number)
                log.warning("run %s, step %d: %s", self.runs[number].name, step, unsolved)
        self.shared.progress.update(len(self.runs), tokens, title=plan.phase.name)

    def _note(self, number: int, step: int, trouble: str) -> None:
        if trouble:
            self.fates[number].diverged, self.fates[number].ended = f"at step {step}: {trouble}", step
            log.warning("run %s diverged at step %d: %s; the others go on", self.runs[number].name, step, trouble)

    def _ended(self) -> bool:
        """Whether no run goes on: each has diverged, or stopped early."""
        return all(fate.ended for fate in self.fates)

    def _evaluate(self, step: int, plan: PhasePlan, state: TrainState, best: Any, table: Any) -> Any:
        """Measures all runs on dev; the best parameters of each, with those that are better now."""
        measured, own = state.measured(), self.machine.own[plan.number]
        going = [not fate.ended for fate in self.fates]
        apply = self.machine.outputs(plan, plan.cached)
        scores = scores_of(self.machine, apply, measured, "dev", going, own, lambda task: task.dev_beams, table)
        better = np.zeros(self.machine.size, bool)
        for number, (fate, found) in enumerate(zip(self.fates, scores, strict=True)):
            if found is None:
                continue
            bad = [task for task, metrics in found.items() if not math.isfinite(metrics["loss"])]
            if bad:
                self._note(number, step, f"the dev loss of task {bad[0]!r} is {found[bad[0]]['loss']}")
                continue
            value = evaluation.criterion(self.experiment.evaluation.criterion, self.tasks, found)
            record = {f"{task}/{metric}": x for task, metrics in found.items() for metric, x in metrics.items()}
            self.loggers[number].write("dev", step, {**record, "criterion": value, "phase": plan.number})
            better[number] = fate.best is None or value >= fate.best
            if better[number]:
                fate.best, fate.best_step, fate.since_best = value, step, 0
            else:
                fate.since_best += 1
                if fate.since_best == self.experiment.evaluation.patience:
                    fate.ended = step
        return self.machine.keep_better(best, stacking.own_part(measured, own), jnp.asarray(better))

    def _save(self, step: int, now: Together) -> None:
        before, self.started = self.started, time.monotonic()
        self.counts.seconds += self.started - before
        for logger in self.loggers:
            logger.flush()
        record = {
            "step": step,
            "counts": dataclasses.asdict(self.counts),
            "fates": [dataclasses.asdict(fate) for fate in self.fates],
            "data": self.stream.get_state(),
            "references": [references.digests for references in self.references],
        }
        self.store.save(step, now, record, None)

    def _finish(self, step: int, now: Together) -> None:
        """Measures each run's best parameters on dev and test, and writes its results."""
        plan = self.prepared.plans[self.counts.phase]
        own = self.machine.own[plan.number]
        params = freezing.merge(now.best, now.params)
        measured = [fate.best is not None for fate in self.fates]
        apply = self.machine.outputs(plan, False)
        scores = {
            split: scores_of(self.machine, apply, params, split, measured, own, lambda task: task.beams)
            for split in ("dev", "test")
        }
        self.counts.seconds += time.monotonic() - self.started
        test = self.prepared.corpus.splits["test"]
        signatures = {task.name: task.signatures(test[task.source].data) for task in self.tasks}
        for number, (run, fate) in enumerate(zip(self.runs, self.fates, strict=True)):
            if fate.best is None:
                continue
            facts = {
                "run": run.name,
                "diverged": fate.diverged,
                "steps": fate.ended or step,
                "best_step": fate.best_step,
                "best_criterion": fate.best,
                "seconds": round(self.counts.seconds, 1),
                "runs_at_once": len(self.runs),
                **self.counts.facts(self.examples),
            }
            own_scores = {split: each[number] or {} for split, each in scores.items()}
            results.write(self.shared.run_folder(run), run.experiment, self.tasks, own_scores, signatures, facts, figure=False)


def _with_best(state: TrainState, best: Any) -> Together:
    return Together(*state, best)


def _copied(tree: Any) -> Any:
    """In buffers of its own: the step donates its state, and a buffer can be donated only once."""
    return jax.tree.map(jnp.copy, tree)
