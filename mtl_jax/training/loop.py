"""The loop of one run: its phases of jitted steps, evaluations, checkpoints, and the results at the end."""

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

from mtl_jax.core import log_lines, trees
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.hooks import Callbacks
from mtl_jax.core.progress import Progress
from mtl_jax.data.examples import Examples
from mtl_jax.data.stream import stream
from mtl_jax.experiment import data_seed_of
from mtl_jax.tasks import Seq2Seq
from mtl_jax.training import copy_scores, evaluation, initial_parameters, metrics_log, results, step_checks, text_evaluation
from mtl_jax.training import counts as counting
from mtl_jax.training import mesh as meshes
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.build_step import jitted_step
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.counts import Counts, evaluations_and_checkpoints, steps_by_phase
from mtl_jax.training.features import Features
from mtl_jax.training.forward import cached_for, encode_tokens, needed_fields
from mtl_jax.training.phase_loop import Actions, SentStep, train_phase
from mtl_jax.training.phase_plan import PhasePlan, with_ages_of
from mtl_jax.training.phase_state import initial_state, start_phase, template
from mtl_jax.training.preemption import Stop
from mtl_jax.training.prepared import Prepared, held_out_batches
from mtl_jax.training.references import References, chosen_rows, restricted_sources
from mtl_jax.training.setup import mixture_phases
from mtl_jax.training.sharing_usage import make_usage, usage_record
from mtl_jax.training.train_state import StepInputs, TrainState
from mtl_jax.transfer import averaging

log = logging.getLogger(__name__)

NO_CALLBACKS = Callbacks()


class TrainingRun:
    """One process's part of a run, with everything that lives as long as the process.

    Args:
        prepared: The run.
        folder: Its workdir.
        store: Its checkpoints.
        stop: Whether the process was asked to stop.
        params_loaded: Whether prepared.params were loaded from other runs in this process.
    """

    def __init__(self, prepared: Prepared, folder: Path, store: Store, stop: Stop, params_loaded: bool = False):
        self.prepared, self.folder, self.store, self.stop, self.params_loaded = prepared, folder, store, stop, params_loaded
        self.experiment, self.mesh = prepared.experiment, prepared.mesh
        self.tasks = prepared.corpus.tasks
        savings = prepared.savings._replace(remat="none")
        encode = encode_tokens(prepared.trunk.module, needed_fields(self.tasks), savings)
        batching, seed = self.experiment.batch, data_seed_of(self.experiment)
        self.stream = stream(
            prepared.corpus, batching, seed, mixture_phases(self.experiment), jax.process_index(), jax.process_count()
        )
        self.features = Features(prepared, stop)
        self.outputs = evaluation.make_outputs(encode, self.tasks, self.mesh, savings=savings)
        self.outputs_of_features = evaluation.make_outputs(cached_for(self.tasks), self.tasks, self.mesh, savings=savings)
        self.programs: list[Any] = [self.features.apply, self.outputs, self.outputs_of_features]
        self.usage = make_usage(prepared)
        self.programs += [] if self.usage is None else [self.usage]
        self.averaging = averaging.make(self.experiment.averaging)
        self.collect: Any = None
        if self.averaging.collect is not None:
            self.collect = self._jitted_collect(self.averaging.collect)
            self.programs.append(self.collect)
        self.examples = {name: len(part.tokens) for name, part in prepared.corpus.splits["train"].items()}
        self.counts = counting.start(prepared.corpus, self.experiment.evaluation.criterion)
        self.undefined: set[str] = set()  # tasks for which the log has the warning of an undefined metric
        # The step and dev scores of the best checkpoint, if to test it at the end would compute the same.
        self.best_dev: tuple[int, dict[str, dict[str, float]]] | None = None
        self.warned_of_solver = False
        self.references = References(prepared, folder, self._best_params)
        self.held_out = held_out_batches(prepared)
        self.dev_table = results.DevTable(self.tasks)

    def resume(self) -> tuple[TrainState, int]:
        """The state and step of the newest checkpoint, or the initial ones.

        Raises:
            UserError: The checkpoints do not fit the run, or none of a run with loaded parameters can be read.
        """
        restored = self.store.latest(self._template)
        if restored is None:
            origin = initial_parameters.origin(self.experiment)
            if origin and not self.params_loaded:
                raise UserError(
                    f"{self.store.folder}: no checkpoint can be read any more, see damaged/ beside it; run the same command "
                    f"once more to begin anew from {origin}"
                )
            return initial_state(self.prepared), 0
        criterion, self.counts = self.counts.criterion, Counts(**restored.record["counts"])
        if self.counts.criterion != criterion:  # an allowed change: values of another criterion cannot be compared
            self.counts.criterion, self.counts.best, self.counts.evaluations_since_best = criterion, None, 0
        positions = restored.record["data"]
        if len(positions) != jax.process_count():
            raise UserError(
                f"{self.store.folder}: written by {count(len(positions), 'process', 'processes')}, and this run has "
                f"{jax.process_count()}; resume with as many, or choose another --workdir"
            )
        self.stream.set_state(positions[jax.process_index()])
        self.references.digests = dict(restored.record.get("references", {}))
        log.info("resuming from step %d", restored.step)
        return restored.state, restored.step

    def _template(self, record: dict[str, Any]) -> TrainState:
        return template(self.prepared, record["counts"]["phase"], record["step"])

    def train(self, state: TrainState, step: int, callbacks: Callbacks = NO_CALLBACKS) -> dict[str, Any]:
        """Trains from a state to the end; returns the contents of results.json."""
        self.started, self.callbacks = time.monotonic(), callbacks
        with contextlib.ExitStack() as stack:
            stack.callback(self.stream.close)
            self.logger = stack.enter_context(contextlib.closing(metrics_log.Logger(self.folder, step)))
            table = self._baselines()
            extra_work, steps_left = evaluations_and_checkpoints(self.experiment, step), steps_by_phase(self.experiment, step)
            progress = Progress("training", self.prepared.plans[-1].end, step, coming=extra_work, stretches=steps_left)
            self.progress = stack.enter_context(contextlib.closing(progress))
            for plan in self.prepared.plans:
                if step < plan.end and not self._stopped_early():
                    if step == plan.start:
                        state = start_phase(plan, state, self.prepared)
                    references = self.references.for_phase(plan, state, step == plan.start)
                    before = restricted_sources(self.prepared.plans[plan.number - 1]) if plan.number else set()
                    self.stream.keep(chosen_rows(plan, references), before if step == plan.start else None)
                    if plan.cached_features and (table is None or plan.number > 0):
                        table = self.features.table(state.params, f"features for {plan.phase.name}")
                    state, step = self._phase(plan, state, step, table if plan.cached_features else None, references)
            self.progress.close()
            self.store.wait()
            self.callbacks.check()
            contents = self._finish(step)
            self.callbacks.call("at_end", contents)
            return contents

    def _best_params(self, state: TrainState) -> Any:
        """The parameters of the best checkpoint so far; those of the state before there is one."""
        self.store.wait()
        best = self.store.best(lambda step: self.store.restore(step, self._template).state.measured())
        return state.params if best is None else best.value

    def _baselines(self) -> jax.Array | None:
        """Writes baselines.json, once; returns the features of the untrained trunk where they were needed."""
        path = self.folder / "baselines.json"
        kind = self.experiment.evaluation.baseline
        if meshes.from_host_0(path.exists()):
            return None
        table = None
        if kind == "probe":
            params = self.prepared.placement.place(self.prepared.params)
            table = self.features.table(params, "features")
        started = time.monotonic()
        features = None if table is None else np.asarray(table)
        scores = results.compute_baselines(self.prepared.corpus, self.experiment.sources, kind, features)
        if kind == "probe":
            log.info("linear probes fitted in %.0f s", time.monotonic() - started)
        workdirs.write_json(path, scores)
        return table

    def _phase(self, plan: PhasePlan, state: TrainState, step: int, table: Any, references: Any) -> tuple[TrainState, int]:
        plan = with_ages_of(plan, state.opt_state, self.experiment)
        train_step = jitted_step(self.prepared, plan)
        self.programs.append(train_step)
        self.counts.phase = plan.number
        title = f"phase {plan.phase.name}: to step {plan.end} of {self.prepared.plans[-1].end}, compiling ..."
        log.info("%s", title, extra={"colour": log_lines.BOLD})
        # The rates of all steps at once: the schedule of a single step would run a small program in each step.
        steps = plan.end - plan.start
        self.rates = np.broadcast_to(jax.jit(jax.vmap(plan.learning_rate))(np.arange(steps)), steps)
        actions = Actions(
            take_step=lambda state, batch: train_step(
                state, StepInputs(meshes.assemble(batch, meshes.by_rows(self.mesh)), table, references, self.held_out)
            ),
            read=lambda sent: self._read(sent, plan),
            evaluate=lambda step, state: self._evaluate_and_save(step, plan, state, table),
            save=lambda step, state: self._save(step, state, None),
            wait=self.store.wait,
            ended=self._stopped_early,
        )
        return train_phase(state, step, plan, self.stream, actions, self.experiment, self.stop, self.progress)

    def _read(self, sent: SentStep, plan: PhasePlan) -> None:
        """Waits for the metrics of a step, logs them, and raises UserError where they are not finite."""
        metrics = jax.device_get(sent.metrics)
        self.counts.add(metrics.seen, sent.places, metrics.made)
        rate = float(self.rates[sent.step - 1 - plan.start])
        losses, record = metrics_log.step_record(metrics, self.counts.facts(self.examples), rate, plan.number)
        self.logger.write("train", sent.step, record)
        self.progress.update(1, record["tokens"], losses, title=plan.phase.name)
        self.callbacks.call("after_metrics", sent.step, record)
        unsolved = step_checks.unsolved(metrics)
        if unsolved and not self.warned_of_solver:
            self.warned_of_solver = True
            log.warning("step %d: %s", sent.step, unsolved)
        problem = step_checks.non_finite_metric(metrics)
        if problem:
            self.logger.flush()
            self.store.wait()
            advice = step_checks.explain_non_finite(sent.step, self.experiment, self.prepared.params, self.store)
            raise UserError(f"step {sent.step}: {problem}; training stopped. {advice}")

    def _evaluate_and_save(self, step: int, plan: PhasePlan, state: TrainState, table: Any) -> TrainState:
        state = self._collect(plan, state)
        self._save(step, state, self._evaluate(step, plan, state.measured(), table))
        return state

    def _jitted_collect(self, collect: Callable[[Any, Any], Any]) -> Any:
        placement = self.prepared.placement
        if not placement.cut:
            return jax.jit(collect, donate_argnums=0, out_shardings=meshes.replicated(self.mesh))
        return jax.jit(lambda average, trained: placement.constrained(collect(average, trained)), donate_argnums=0)

    def _collect(self, plan: PhasePlan, state: TrainState) -> TrainState:
        """The state with the current parameters in its average, where the average is over evaluations."""
        if self.collect is None:
            return state
        trained, _ = trees.split(state.params, plan.mask)
        return state._replace(average=self.collect(state.average, trained))

    def _evaluate(self, step: int, plan: PhasePlan, params: Any, table: Any) -> float | None:
        """The dev criterion; None where it is NaN."""
        dev = self.prepared.corpus.splits["dev"]
        apply = self.outputs_of_features if plan.cached_features else self.outputs
        batching = self.experiment.batch
        predictions = evaluation.predict(apply, params, self.tasks, list(dev.values()), batching, self.mesh, table=table)
        texts = self._texts(params, dev, lambda task: task.dev_beams, lambda: None)
        scores = evaluation.score(self.tasks, dev, predictions, text_evaluation.scores_of(self.tasks, texts))
        value = evaluation.criterion(self.experiment.evaluation.criterion, self.tasks, scores)
        record = {f"{task}/{metric}": score for task, metrics in scores.items() for metric, score in metrics.items()}
        record |= {"criterion": value, "phase": plan.number, **self.prepared.facts.evaluated(step)}
        self.logger.write("dev", step, record)
        if self.usage is not None:
            self.logger.write(metrics_log.USAGE, step, usage_record(self.usage, params, self.prepared))
        self.callbacks.call("after_evaluation", step, record)
        for task, line in evaluation.undefined(self.tasks, scores, "dev").items():
            if task not in self.undefined:
                self.undefined.add(task)
                log.warning("step %d: the %s; it counts as 0 where checkpoints are compared", step, line)
        if math.isnan(value):
            log.warning("step %d: the dev criterion is not a number, so this checkpoint cannot be the best", step)
            self.counts.evaluations_since_best += 1
            return None
        best = self.counts.best is None or value >= self.counts.best
        if best:
            self.counts.best, self.counts.evaluations_since_best = value, 0
            same = apply is self.outputs and not any(task.generates for task in self.tasks)  # else with fewer beams
            self.best_dev = (step, scores) if same else None
        else:
            self.counts.evaluations_since_best += 1
        for row in self.dev_table.rows(step, scores, value, best):
            log.info("%s", row, extra={"colour": log_lines.GREEN} if row.endswith("*") else {})
        return value

    def _texts(
        self, params: Any, split: dict[str, Examples], beams: Callable[[Seq2Seq], int], after_text: Callable[[], None]
    ) -> text_evaluation.Texts:
        """The generated texts of the tasks that decode."""
        if not any(task.generates for task in self.tasks):
            return {}
        params = self.prepared.placement.whole(params)  # each device generates texts of its own
        local_params, devices = meshes.to_local_devices(params, self.mesh), meshes.local_devices(self.mesh)
        return text_evaluation.generated_texts(
            self.tasks, self.prepared.trunk, local_params, split, beams, after_text, devices=devices, share_work=True
        )

    def _stopped_early(self) -> bool:
        patience = self.experiment.evaluation.patience
        return patience > 0 and self.counts.evaluations_since_best >= patience

    def _save(self, step: int, state: TrainState, dev: float | None) -> None:
        before, self.started = self.started, time.monotonic()
        self.counts.seconds += self.started - before
        self.logger.flush()
        positions = meshes.gather(self.stream.get_state())
        record = {"step": step, "counts": dataclasses.asdict(self.counts), "data": positions}
        self.store.save(step, state, record | {"references": self.references.digests}, dev)

    def _finish(self, step: int) -> dict[str, Any]:
        """Measures the best checkpoint on dev and test, and writes the results."""
        best = self.store.best(lambda step: self.store.restore(step, self._template).state.measured())
        if best is None:
            raise UserError(f"{self.store.folder}: no checkpoint that was evaluated on dev can be read; use another workdir")
        scores: dict[str, dict[str, dict[str, float]]] = {}
        log.info("testing the parameters of step %d ...", best.step)
        for split in ("dev", "test"):
            self.stop.check()  # all steps are saved: the same command comes here again
            if split == "dev" and self.best_dev is not None and self.best_dev[0] == best.step:
                scores[split] = self.best_dev[1]
                continue
            data = self.prepared.corpus.splits[split]
            batching = self.experiment.batch
            predictions = evaluation.predict(self.outputs, best.value, self.tasks, list(data.values()), batching, self.mesh)
            # All steps are saved by now, so a stop need not wait for the texts, unlike those of an evaluation in training.
            texts = self._texts(best.value, data, lambda task: task.beams, self.stop.check)
            scores[split] = evaluation.score(self.tasks, data, predictions, text_evaluation.scores_of(self.tasks, texts))
        without = copy_scores.without_copies(self.tasks, data, predictions, texts, self.prepared.test_copies)
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
                **self.prepared.facts.finished(step),
                "compiled_programs": sum(program._cache_size() for program in self.programs),
            },
            without_copies=without,
        )
