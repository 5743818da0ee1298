"""The compiled programs of an ablation: the train step, and the evaluation outputs, of N runs at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import trunks
from mtl_jax.ablation import fields, stacking
from mtl_jax.ablation.fields import Numbers
from mtl_jax.core import trees
from mtl_jax.data.batches import Batch
from mtl_jax.models.trunk_output import TEXT_VECTORS
from mtl_jax.tasks import Seq2Seq
from mtl_jax.training import copy_scores, evaluation, gram_gradient, sharing_usage, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.forward import cached_for, encode_tokens, needed_fields, text_vector
from mtl_jax.training.phase_plan import PhasePlan, with_numbers_of
from mtl_jax.training.prepared import Prepared, held_out_batches
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs, TrainState
from mtl_jax.transfer import averaging


class Machine:
    """The compiled functions for N runs of one program, which one chunk of runs after another uses.

    Args:
        prepared: The program's template, prepared, on a mesh with an axis over runs.
        differs: Tree of bools: initial parameters that differ between runs.
        size: N, a multiple of the size of the mesh's axis over runs.

    Attributes:
        held_out: The held-out rows, for StepInputs.
        usage: sharing_usage.make_usage(...), for the parameters of one run.
        per_run: For each phase a tree of bools: the parameters with an axis over runs, f32[N, ...], from this phase on.
        compile_seconds: Seconds spent on compiling steps so far.
        compiled: Number of steps compiled so far.
        weight: The result of weigh(), bytes; 0 before.
    """

    def __init__(self, prepared: Prepared, differs: Any, size: int):
        self.prepared, self.size, self.mesh = prepared, size, prepared.mesh
        self.per_run = []
        per_run = differs
        for plan in prepared.plans:
            per_run = stacking.either(per_run, plan.mask)
            self.per_run.append(per_run)
        self.averaging = averaging.make(prepared.experiment.averaging)
        self.held_out = held_out_batches(prepared)
        self.keep_better = stacking.keep_better(self.mesh)
        vectors = (text_vector(prepared.corpus.tasks) or TEXT_VECTORS[0],)
        self.features = evaluation.make_features(encode_tokens(prepared.trunk.module, vectors), self.mesh)
        self.usage = sharing_usage.make_usage(prepared)
        self.compile_seconds, self.compiled, self.weight = 0.0, 0, 0
        self._steps: dict[Any, Any] = {}
        self._outputs: dict[Any, Any] = {}
        self._collect: dict[int, Any] = {}

    def begin(self, plan: PhasePlan, values: Numbers, params: Any) -> TrainState:
        """The initial states of optimizer, rule and average of all runs in a phase, as a TrainState without other fields."""
        trained, _ = trees.split(params, plan.mask)
        initial = jax.jit(self._initial_states(plan), out_shardings=meshes.by_runs(self.mesh))(values, trained)
        return TrainState(None, None, initial[0], initial[1], None, initial[2])  # type: ignore[arg-type]

    def begin_shapes(self, plan: PhasePlan, values: Numbers, params: Any) -> TrainState:
        """The shapes of the result of begin()."""
        trained, _ = trees.split(params, plan.mask)
        initial = jax.eval_shape(self._initial_states(plan), values, trained)
        return TrainState(None, None, initial[0], initial[1], None, initial[2])  # type: ignore[arg-type]

    def _initial_states(self, plan: PhasePlan) -> Callable[[Numbers, Any], Any]:
        names = [task.name for task in self.prepared.corpus.tasks]

        def init_run(values: Numbers, trained: Any) -> Any:
            run_plan = with_numbers_of(plan, fields.insert(self.prepared.experiment, values))
            rule_state = gram_gradient.init_rule(run_plan.rule, names, trained["trunk"], run_plan.own)
            return run_plan.optimizer.init(trained), rule_state, self.averaging.init(trained)

        return jax.vmap(init_run, axis_size=self.size)

    def step(self, plan: PhasePlan, *arguments: Any, apart: frozenset[str] = frozenset()) -> Any:
        """The compiled step of a phase: (numbers, state, inputs) -> (state, StepMetrics of all runs).

        Args:
            plan: The phase.
            *arguments: The arguments of the step, or their shapes.
            apart: Names of the references with an axis over runs.
        """
        names = tuple(each.name for each in plan.regularisers)
        batch = arguments[2].batch
        key = (plan.number, names, plan.mixout_paths, apart, *(leaf.shape for leaf in jax.tree.leaves(batch)))
        if key not in self._steps:
            started = time.monotonic()
            self._steps[key] = self._make_step(plan, arguments[2], apart).lower(*arguments).compile()
            self.compile_seconds += time.monotonic() - started
            self.compiled += 1
        return self._steps[key]

    def _make_step(self, plan: PhasePlan, inputs: StepInputs, apart: frozenset[str]) -> Any:
        sources = len(self.prepared.corpus.splits["train"])

        def of_one_run(values: Numbers, state: TrainState, inputs: StepInputs) -> Any:
            experiment = fields.insert(self.prepared.experiment, values)
            run_plan = with_numbers_of(plan, experiment)
            gradients = gradient_fn(self.prepared._replace(experiment=experiment), run_plan)
            step = make_train_step(gradients, run_plan.optimizer, plan.mask, sources, self.averaging.follow)
            return step(state, inputs)

        axes = stacking.axes(self.per_run[plan.number])
        features_axis = None if inputs.features is None else self._table_axis(plan)
        reference_axes = (
            None if inputs.references is None else {name: 0 if name in apart else None for name in inputs.references}
        )
        of_all_runs = jax.vmap(
            of_one_run,
            in_axes=(0, axes, StepInputs(None, features_axis, reference_axes)),  # type: ignore[arg-type]
            out_axes=(axes, 0),
            axis_size=self.size,
            spmd_axis_name=meshes.RUN,
        )
        placed = (stacking.shardings(self.per_run[plan.number], self.mesh), meshes.by_runs(self.mesh))
        return jax.jit(of_all_runs, donate_argnums=1, out_shardings=placed)

    def weigh(self, values: Numbers, batch: Batch) -> int:
        """Bytes on a device in the phase that needs most: the step as XLA plans it, and the arrays kept besides.

        The latter are the best parameters, and on CPU, where host and device share one memory, the copy that a checkpoint is
        written from. The size of regularisers' references is estimated by that of the trainable parameters.
        """
        whole, by_runs = meshes.replicated(self.mesh), meshes.by_runs(self.mesh)
        for plan in self.prepared.plans:
            per_run = self.per_run[plan.number]

            def stacked(per_run: bool, leaf: Any) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct((self.size, *leaf.shape) if per_run else leaf.shape, leaf.dtype)

            params = jax.tree.map(stacked, per_run, self.prepared.params)
            initial = self.begin_shapes(plan, values, params)
            key = jax.ShapeDtypeStruct((self.size, 2), np.uint32)
            step = jax.ShapeDtypeStruct((), np.int32)
            shapes = TrainState(step, params, initial.opt_state, initial.rule_state, key, initial.average)  # type: ignore[arg-type]
            state: Any = stacking.placed(shapes, stacking.shardings(per_run, self.mesh))
            table = None
            if plan.cached_features:
                examples = [part for split in self.prepared.corpus.splits.values() for part in split.values()]
                width = trunks.width(self.prepared.trunk)
                shape: tuple[int, ...] = (sum(len(part.tokens) for part in examples), width)
                if self.trunks_differ(plan):
                    table = jax.ShapeDtypeStruct((self.size, *shape), np.float32, sharding=by_runs)
                else:
                    table = jax.ShapeDtypeStruct(shape, np.float32, sharding=whole)
            unregularised = plan._replace(regularisers=(), mixout_paths=())
            program = self.step(unregularised, values, state, StepInputs(batch, table, None, self.held_out))  # type: ignore[arg-type]
            best, trained = stacking.per_run_part(params, per_run), stacking.per_run_part(params, plan.mask)
            beside = _bytes(best) + (2 * _bytes(trained) if plan.regularisers or plan.mixout_paths else 0)
            if jax.default_backend() == "cpu":
                beside += _bytes((shapes, best))
            self.weight = max(self.weight, meshes.bytes_of(program) + beside // self.mesh.shape[meshes.RUN])
        return self.weight

    def trunks_differ(self, plan: PhasePlan) -> bool:
        """Whether the runs' trunks differ in a phase."""
        return any(jax.tree.leaves(self.per_run[plan.number]["trunk"]))

    def _table_axis(self, plan: PhasePlan) -> int | None:
        return 0 if self.trunks_differ(plan) else None

    def outputs(self, plan: PhasePlan, cached: bool) -> evaluation.Apply:
        """Jitted: evaluation.Outputs of all runs, with an axis over runs in front."""
        key = (plan.number, cached)
        if key not in self._outputs:
            tasks = self.prepared.corpus.tasks
            encode = cached_for(tasks) if cached else encode_tokens(self.prepared.trunk.module, needed_fields(tasks))
            over = (stacking.axes(self.per_run[plan.number]).params, None, self._table_axis(plan) if cached else None)
            self._outputs[key] = evaluation.make_outputs(encode, tasks, self.mesh, over)
        return self._outputs[key]

    def collect(self, plan: PhasePlan, state: TrainState) -> TrainState:
        """The state with its parameters added to the average, if that is one over evaluations."""
        collect = self.averaging.collect
        if collect is None:
            return state
        if plan.number not in self._collect:
            self._collect[plan.number] = jax.jit(jax.vmap(collect), donate_argnums=0, out_shardings=meshes.by_runs(self.mesh))
        trained, _ = trees.split(state.params, plan.mask)
        return state._replace(average=self._collect[plan.number](state.average, trained))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class RunScores(NamedTuple):
    """How one run does on a split.

    Attributes:
        scores: {task: {metric: value}}; only losses for a run with a loss that is not finite.
        without_copies: As copy_scores.without_copies(); {} for dev.
    """

    scores: dict[str, dict[str, float]]
    without_copies: dict[str, dict[str, Any]]


def scores_of(
    machine: Machine,
    apply: evaluation.Apply,
    params: Any,
    split: str,
    which: Sequence[bool],
    per_run: Any,
    beams: Callable[[Seq2Seq], int],
    table: Any = None,
) -> list[RunScores | None]:
    """The scores of the runs in `which`, None for the others.

    Args:
        machine: The runs' program.
        apply: machine.outputs(...).
        params: Parameters of all runs.
        split: dev or test.
        which: For each run whether it is evaluated.
        per_run: Tree of bools: the leaves with an axis over runs.
        beams: Task to its number of beams, for tasks that decode.
        table: Cached features, if apply reads them.
    """
    prepared = machine.prepared
    data, tasks, batching = prepared.corpus.splits[split], prepared.corpus.tasks, prepared.experiment.batch
    parts = list(data.values())
    copies = prepared.test_copies if split == "test" else {}
    outputs = evaluation.predict_runs(apply, params, tasks, parts, batching, machine.mesh, machine.size, table=table)
    scores: list[RunScores | None] = []
    for number, evaluated in enumerate(which):
        losses = outputs[number].losses
        if not evaluated:
            scores.append(None)
        elif not all(math.isfinite(loss) for loss in losses.values()):
            scores.append(RunScores({task: {"loss": loss} for task, loss in losses.items()}, {}))
        else:
            texts: text_evaluation.Texts = {}
            if any(task.generates for task in tasks):
                run_params = jax.device_put(stacking.take(params, per_run, number), jax.devices()[0])
                devices = list(machine.mesh.devices.flat)
                texts = text_evaluation.generated_texts(tasks, prepared.trunk, run_params, data, beams, devices=devices)
            without = copy_scores.without_copies(tasks, data, outputs[number], texts, copies)
            of_texts = text_evaluation.scores_of(tasks, texts)
            scores.append(RunScores(evaluation.score(tasks, data, outputs[number], of_texts), without))
    return scores
