"""The loop: phases of jitted steps, evaluation, checkpoints, resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax import trunks
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count
from mtl_jax.data.examples import Examples
from mtl_jax.data.stream import stream
from mtl_jax.experiment import Experiment, data_seed_of
from mtl_jax.tasks import Seq2Seq
from mtl_jax.training import (
    evaluation,
    fingerprint,
    frozen_params,
    hosts,
    init_from,
    metrics_log,
    non_finite,
    open_workdir,
    results,
    text_evaluation,
)
from mtl_jax.training import mesh as meshes
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.counts import Counts, other_work, steps_by_phase
from mtl_jax.training.features import Features
from mtl_jax.training.forward import cached_features, encode_tokens, needed_fields
from mtl_jax.training.metrics_log import Logger, Progress
from mtl_jax.training.phase_loop import Actions, SentStep, train_phase
from mtl_jax.training.preemption import Stop, asked_to_stop
from mtl_jax.training.references import References
from mtl_jax.training.setup import PhasePlan, Prepared, enter, initial_state, stretches, template
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs, TrainState
from mtl_jax.transfer import averaging

log = logging.getLogger(__name__)


def train(experiment: Experiment, workdir: str | Path, *, allow_config_change: bool = False) -> dict[str, Any]:
    """Trains an experiment in a workdir; goes on where an earlier process stopped, to the same numbers.

    Args:
        experiment: What to do.
        workdir: Where everything is written. A finished one is not trained again.
        allow_config_change: Go on in a workdir that was begun with another configuration.

    Returns:
        The contents of results.json.

    Raises:
        UserError: Bad input, found before anything is written; or a loss that is not finite.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    folder = Path(workdir)
    with contextlib.ExitStack() as stack:
        opened = hosts.alike(
            lambda: open_workdir.open_workdir(experiment, folder, allow_config_change, stack),
            lambda opened: fingerprint.of(opened.config, folder, opened.prepared),
        )
        if opened.prepared is None:
            log.info("%s is done", folder)
            return opened.done
        stack.enter_context(hosts.ending_together())
        workdirs.create(folder)
        hosts.check_shared(folder)
        return _train(opened.prepared, opened, folder)


def _train(prepared: Prepared, opened: open_workdir.Opened, folder: Path) -> dict[str, Any]:
    kept = prepared.experiment.checkpoints
    base = frozen_params.Base(lambda: opened.trunk, getattr(prepared.experiment.trunk, "path", ""))
    store = Store(folder, kept, criterion=prepared.experiment.evaluation.criterion, base=base)
    with contextlib.closing(store), asked_to_stop() as stop:
        run = _Run(prepared, folder, store, stop, begun=bool(opened.begun))
        state, step = run.resume()  # before anything of this configuration is written: it may not fit the checkpoints
        hosts.check_same([("checkpoint", {"step": step})])
        if not kept.frozen:
            store.left_out = frozen_params.to_leave_out((plan.mask for plan in prepared.plans), state.params, opened.trunk)
        if opened.changed:
            workdirs.forget_results(folder)
        for name, value in (("config", opened.config), ("versions", workdirs.versions()), ("data", opened.data)):
            workdirs.write_json(folder / f"{name}.json", value)
        if opened.begun:
            workdirs.write_json(folder / init_from.RECORD, opened.begun)
        if jax.process_index() == 0:
            trunks.save(prepared.trunk, folder / "trunk")
        for note in prepared.notes:
            log.info("%s", note)
        return run.train(state, step)


class _Run:
    """One process's part of a run: holds what lives as long as the process, so that the steps below read in order."""

    def __init__(self, prepared: Prepared, folder: Path, store: Store, stop: Stop, begun: bool = False):
        self.prepared, self.folder, self.store, self.stop, self.begun = prepared, folder, store, stop, begun
        self.experiment, self.mesh = prepared.experiment, prepared.mesh
        self.tasks = prepared.corpus.tasks
        encode = encode_tokens(prepared.trunk.module, needed_fields(self.tasks))
        batching, seed = self.experiment.batch, data_seed_of(self.experiment)
        self.stream = stream(
            prepared.corpus, batching, seed, stretches(self.experiment), jax.process_index(), jax.process_count()
        )
        self.features = Features(prepared, stop)
        self.outputs = evaluation.make_outputs(encode, self.tasks, self.mesh)
        self.outputs_of_features = evaluation.make_outputs(cached_features, self.tasks, self.mesh)
        self.programs: list[Any] = [self.features.apply, self.outputs, self.outputs_of_features]
        self.averaging = averaging.make(self.experiment.averaging)
        self.collect: Any = None
        if self.averaging.collect is not None:
            self.collect = jax.jit(self.averaging.collect, donate_argnums=0, out_shardings=meshes.replicated(self.mesh))
            self.programs.append(self.collect)
        self.examples = {name: len(part.tokens) for name, part in prepared.corpus.splits["train"].items()}
        self.counts = Counts(criterion=self.experiment.evaluation.criterion, seen={name: [0, 0, 0] for name in self.examples})
        self.undefined: set[str] = set()  # tasks whose metric was said to be undefined
        self.warned = False
        self.references = References(prepared, folder)

    def train(self, state: TrainState, step: int) -> dict[str, Any]:
        """From a state to the results."""
        self.started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(self.stream.close)
            self.logger = stack.enter_context(contextlib.closing(Logger(self.folder, step)))
            table = self._baselines()
            coming, stretches = other_work(self.experiment, step), steps_by_phase(self.experiment, step)
            progress = Progress("training", self.prepared.plans[-1].end, step, coming=coming, stretches=stretches)
            self.progress = stack.enter_context(contextlib.closing(progress))
            for plan in self.prepared.plans:
                if step < plan.end and not self._stopped_early():
                    if step == plan.start:
                        state = enter(plan, state, self.prepared)
                    references = self.references.enter(plan, state, step == plan.start)
                    if plan.cached and (table is None or plan.number > 0):
                        table = self.features.table(state.params, f"features for {plan.phase.name}")
                    state, step = self._phase(plan, state, step, table if plan.cached else None, references)
            self.progress.close()
            self.store.wait()
            return self._finish(step)

    def resume(self) -> tuple[TrainState, int]:
        """The state and step to go on from: of the newest checkpoint, or the beginning."""
        restored = self.store.latest(self._template)
        if restored is None:
            if self.experiment.init_from.path and not self.begun:
                raise UserError(
                    f"{self.store.folder}: no checkpoint can be used any more, see damaged/ beside it; the same command, given "
                    f"once more, begins anew from {self.experiment.init_from.path}"
                )
            return initial_state(self.prepared), 0
        criterion, self.counts = self.counts.criterion, Counts(**restored.record["counts"])
        if self.counts.criterion != criterion:  # a change that was allowed: what was best before says nothing now
            self.counts.criterion, self.counts.best, self.counts.evaluations_since_best = criterion, None, 0
        positions = restored.record["data"]
        if len(positions) != jax.process_count():
            raise UserError(
                f"{self.store.folder}: written by {count(len(positions), 'process', 'processes')}, and this run has "
                f"{jax.process_count()}; go on with as many, or choose another --workdir"
            )
        self.stream.set_state(positions[jax.process_index()])
        self.references.digests = dict(restored.record.get("references", {}))
        log.info("resuming from step %d", restored.step)
        return restored.state, restored.step

    def _template(self, record: dict[str, Any]) -> TrainState:
        return template(self.prepared, record["counts"]["phase"], record["step"])

    def _baselines(self) -> jax.Array | None:
        """Writes baselines.json once; returns the feature table of the untrained trunk if that took one."""
        path = self.folder / "baselines.json"
        kind = self.experiment.evaluation.baseline
        if meshes.agreed(path.exists()):
            return None
        table = None
        if kind == "probe":
            params = meshes.place(self.prepared.params, meshes.replicated(self.mesh))
            table = self.features.table(params, "features")
        started = time.monotonic()
        features = None if table is None else np.asarray(table)
        scores = results.baselines(self.prepared.corpus, self.experiment.sources, kind, features)
        if kind == "probe":
            log.info("linear probes fitted in %.0f s", time.monotonic() - started)
        workdirs.write_json(path, scores)
        return table

    def _phase(self, plan: PhasePlan, state: TrainState, step: int, table: Any, references: Any) -> tuple[TrainState, int]:
        step_gradients = gradient_fn(self.prepared, plan)
        train_step = jax.jit(
            make_train_step(step_gradients, plan.optimizer, plan.mask, len(self.examples), self.averaging.follow),
            donate_argnums=0,
            out_shardings=meshes.replicated(self.mesh),
        )
        self.programs.append(train_step)
        self.counts.phase = plan.number
        # All at once: asking the schedule step by step would run a small program each time.
        self.rates = np.broadcast_to(jax.vmap(plan.rate)(np.arange(plan.end - plan.start)), plan.end - plan.start)
        actions = Actions(
            take_step=lambda state, batch: train_step(
                state, StepInputs(meshes.assemble(batch, meshes.by_rows(self.mesh)), table, references)
            ),
            read=lambda sent: self._read(sent, plan),
            evaluate=lambda step, state: self._evaluate_and_save(step, plan, state, table),
            save=lambda step, state: self._save(step, state, None),
            wait=self.store.wait,
            ended=self._stopped_early,
        )
        return train_phase(state, step, plan, self.stream, actions, self.experiment, self.stop, self.progress)

    def _read(self, sent: SentStep, plan: PhasePlan) -> None:
        """Waits for the metrics of a step, logs them, and refuses those that are not finite."""
        metrics = jax.device_get(sent.metrics)
        self.counts.add(metrics.seen, sent.places)
        rate = float(self.rates[sent.step - 1 - plan.start])
        losses, record = metrics_log.step_record(metrics, self.counts.facts(self.examples), rate, plan.number)
        self.logger.write("train", sent.step, record)
        self.progress.update(1, record["tokens"], losses, title=plan.phase.name)
        unsolved = metrics_log.unsolved(metrics)
        if unsolved and not self.warned:
            self.warned = True
            log.warning("step %d: %s", sent.step, unsolved)
        trouble = metrics_log.not_finite(metrics)
        if trouble:
            self.logger.flush()
            self.store.wait()
            why = non_finite.of(sent.step, self.experiment, self.prepared.params, self.store)
            raise UserError(f"step {sent.step}: {trouble}; training stopped. {why}")

    def _evaluate_and_save(self, step: int, plan: PhasePlan, state: TrainState, table: Any) -> TrainState:
        state = self._collect(plan, state)
        self._save(step, state, self._evaluate(step, plan, state.measured(), table))
        return state

    def _collect(self, plan: PhasePlan, state: TrainState) -> TrainState:
        """The state with these parameters in its average, where that is one over evaluations."""
        if self.collect is None:
            return state
        trained, _ = trees.split(state.params, plan.mask)
        return state._replace(average=self.collect(state.average, trained))

    def _evaluate(self, step: int, plan: PhasePlan, params: Any, table: Any) -> float | None:
        """The dev criterion; None where it is not a number."""
        dev = self.prepared.corpus.splits["dev"]
        apply = self.outputs_of_features if plan.cached else self.outputs
        batching = self.experiment.batch
        found = evaluation.run(apply, params, self.tasks, list(dev.values()), batching, self.mesh, table=table)
        texts = self._texts(params, dev, lambda task: task.dev_beams, lambda: None)
        scores = evaluation.score(self.tasks, dev, found, texts)
        value = evaluation.criterion(self.experiment.evaluation.criterion, self.tasks, scores)
        record = {f"{task}/{metric}": x for task, metrics in scores.items() for metric, x in metrics.items()}
        self.logger.write("dev", step, {**record, "criterion": value, "phase": plan.number})
        for task, line in evaluation.undefined(self.tasks, scores, "dev").items():
            if task not in self.undefined:
                self.undefined.add(task)
                log.warning("step %d: the %s; it counts as 0 where checkpoints are compared", step, line)
        if math.isnan(value):
            log.warning("step %d: the dev criterion is not a number, so this checkpoint cannot be the best", step)
            self.counts.evaluations_since_best += 1
            return None
        if self.counts.best is None or value >= self.counts.best:
            self.counts.best, self.counts.evaluations_since_best = value, 0
        else:
            self.counts.evaluations_since_best += 1
        return value

    def _texts(
        self, params: Any, split: dict[str, Examples], beams: Callable[[Seq2Seq], int], between: Callable[[], None]
    ) -> dict[str, dict[str, float]]:
        """Metrics of generated texts, of the tasks that decode."""
        if not any(task.decodes for task in self.tasks):
            return {}
        whole, devices = meshes.own(params, self.mesh), meshes.own_devices(self.mesh)
        trunk = self.prepared.trunk
        return text_evaluation.text_scores(self.tasks, trunk, whole, split, beams, between, devices=devices, together=True)

    def _stopped_early(self) -> bool:
        patience = self.experiment.evaluation.patience
        return patience > 0 and self.counts.evaluations_since_best >= patience

    def _save(self, step: int, state: TrainState, dev: float | None) -> None:
        now = time.monotonic()
        self.counts.seconds += now - self.started
        self.started = now
        self.logger.flush()
        positions = meshes.gather(self.stream.get_state())
        record = {"step": step, "counts": dataclasses.asdict(self.counts), "data": positions}
        self.store.save(step, state, record | {"references": self.references.digests}, dev)

    def _finish(self, step: int) -> dict[str, Any]:
        best = self.store.best(lambda step: self.store.restore(step, self._template).state.measured())
        if best is None:
            raise UserError(f"{self.store.folder}: no checkpoint that was measured on dev can be read; use another workdir")
        scores = {}
        for split in ("dev", "test"):
            data = self.prepared.corpus.splits[split]
            batching = self.experiment.batch
            found = evaluation.run(self.outputs, best.value, self.tasks, list(data.values()), batching, self.mesh)
            # All steps are saved: asked to stop, it need not be waited for. Before that, what dev says belongs to the step.
            texts = self._texts(best.value, data, lambda task: task.beams, self.stop.check)
            scores[split] = evaluation.score(self.tasks, data, found, texts)
        self.counts.seconds += time.monotonic() - self.started
        return results.write(
            self.folder,
            self.experiment,
            self.tasks,
            scores,
            {task.name: task.signatures(self.prepared.corpus.splits["test"][task.source].data) for task in self.tasks},
            facts={
                "steps": step,
                "best_step": best.step,
                "best_criterion": best.dev,
                "seconds": round(self.counts.seconds, 1),
                **self.counts.facts(self.examples),
                "compiled_programs": sum(program._cache_size() for program in self.programs),
            },
        )
