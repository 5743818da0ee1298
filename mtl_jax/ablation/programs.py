"""The compiled programs of an ablation's runs: the train step and the outputs of all of them at once."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax import trunks
from mtl_jax.ablation import fields, stacking
from mtl_jax.ablation.fields import Numbers
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch
from mtl_jax.tasks import Seq2Seq
from mtl_jax.training import evaluation, gram_gradient, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.forward import cached_features, encode_tokens, needed_fields
from mtl_jax.training.phase_plan import PhasePlan, renumbered
from mtl_jax.training.setup import Prepared
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs, TrainState
from mtl_jax.transfer import averaging


class Machine:
    """What N runs of one program share; made once, used by one chunk of runs after another.

    Args:
        prepared: The program's template, prepared, on a mesh with an axis over runs.
        differs: Tree of bools: initial parameters that the runs do not share.
        size: N, a multiple of the mesh's axis over runs.

    Attributes:
        compile_seconds: Spent on compiling steps so far.
        compiled: Steps compiled so far.
        weight: What weigh() found.
    """

    def __init__(self, prepared: Prepared, differs: Any, size: int):
        self.prepared, self.size, self.mesh = prepared, size, prepared.mesh
        self.own = []  # by phase: the leaves that each run has of its own from it on
        own = differs
        for plan in prepared.plans:
            own = stacking.either(own, plan.mask)
            self.own.append(own)
        self.averaging = averaging.make(prepared.experiment.averaging)
        self.keep_better = stacking.keep_better(self.mesh)
        self.features = evaluation.make_features(encode_tokens(prepared.trunk.module), self.mesh)
        self.compile_seconds, self.compiled, self.weight = 0.0, 0, 0
        self._steps: dict[Any, Any] = {}
        self._outputs: dict[Any, Any] = {}
        self._collect: dict[int, Any] = {}

    def begin(self, plan: PhasePlan, values: Numbers, params: Any) -> TrainState:
        """What a phase starts with but for parameters, keys and step: optimizer, rule and average of all runs."""
        trained, _ = trees.split(params, plan.mask)
        found = jax.jit(self._beginning(plan), out_shardings=meshes.by_runs(self.mesh))(values, trained)
        return TrainState(None, None, found[0], found[1], None, found[2])  # type: ignore[arg-type]

    def begin_shapes(self, plan: PhasePlan, values: Numbers, params: Any) -> TrainState:
        """The shapes of that."""
        trained, _ = trees.split(params, plan.mask)
        found = jax.eval_shape(self._beginning(plan), values, trained)
        return TrainState(None, None, found[0], found[1], None, found[2])  # type: ignore[arg-type]

    def _beginning(self, plan: PhasePlan) -> Callable[[Numbers, Any], Any]:
        names = [task.name for task in self.prepared.corpus.tasks]

        def one(values: Numbers, trained: Any) -> Any:
            mine = renumbered(plan, fields.insert(self.prepared.experiment, values))
            rule_state = gram_gradient.init_rule(mine.rule, names, trained["trunk"])
            return mine.optimizer.init(trained), rule_state, self.averaging.init(trained)

        return jax.vmap(one, axis_size=self.size)

    def step(self, plan: PhasePlan, *arguments: Any, apart: frozenset[str] = frozenset()) -> Any:
        """The compiled step of a phase: (numbers, state, inputs) -> (state, StepMetrics of all runs).

        Args:
            plan: The phase.
            *arguments: Those of the step, or their shapes.
            apart: The references of which each run has its own.
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
            run_plan = renumbered(plan, experiment)
            gradients = gradient_fn(self.prepared._replace(experiment=experiment), run_plan)
            step = make_train_step(gradients, run_plan.optimizer, plan.mask, sources, self.averaging.follow)
            return step(state, inputs)

        axes = stacking.axes(self.own[plan.number])
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
        placed = (stacking.shardings(self.own[plan.number], self.mesh), meshes.by_runs(self.mesh))
        return jax.jit(of_all_runs, donate_argnums=1, out_shardings=placed)

    def weigh(self, values: Numbers, batch: Batch) -> int:
        """Bytes on a device in the heaviest phase: its step, as XLA plans it, and what lies beside it.

        That are the best parameters, and on CPU, where both share one memory, the copy that a checkpoint is written from; what
        regularisers hold on to is estimated by the size of what trains.
        """
        whole, by_runs = meshes.replicated(self.mesh), meshes.by_runs(self.mesh)
        for plan in self.prepared.plans:
            own = self.own[plan.number]

            def of_run(has: bool, leaf: Any) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct((self.size, *leaf.shape) if has else leaf.shape, leaf.dtype)

            params = jax.tree.map(of_run, own, self.prepared.params)
            fresh = self.begin_shapes(plan, values, params)
            key = jax.ShapeDtypeStruct((self.size, 2), np.uint32)
            step = jax.ShapeDtypeStruct((), np.int32)
            shapes = TrainState(step, params, fresh.opt_state, fresh.rule_state, key, fresh.average)  # type: ignore[arg-type]
            state: Any = stacking.placed(shapes, stacking.shardings(own, self.mesh))
            table = None
            if plan.cached:
                examples = [part for split in self.prepared.corpus.splits.values() for part in split.values()]
                width = trunks.width(self.prepared.trunk, self.prepared.params["trunk"])
                shape: tuple[int, ...] = (sum(len(part.tokens) for part in examples), width)
                if self.own_trunk(plan):
                    table = jax.ShapeDtypeStruct((self.size, *shape), np.float32, sharding=by_runs)
                else:
                    table = jax.ShapeDtypeStruct(shape, np.float32, sharding=whole)
            unregularised = plan._replace(regularisers=(), mixout_paths=())
            program = self.step(unregularised, values, state, StepInputs(batch, table))  # type: ignore[arg-type]
            best, trained = stacking.own_part(params, own), stacking.own_part(params, plan.mask)
            beside = _bytes(best) + (2 * _bytes(trained) if plan.regularisers or plan.mixout_paths else 0)
            if jax.default_backend() == "cpu":
                beside += _bytes((shapes, best))
            self.weight = max(self.weight, weight_of(program) + beside // self.mesh.shape[meshes.RUN])
        return self.weight

    def own_trunk(self, plan: PhasePlan) -> bool:
        """Whether the runs' trunks differ in a phase."""
        return any(jax.tree.leaves(self.own[plan.number]["trunk"]))

    def _table_axis(self, plan: PhasePlan) -> int | None:
        return 0 if self.own_trunk(plan) else None

    def outputs(self, plan: PhasePlan, cached: bool) -> evaluation.Apply:
        """Jitted: evaluation.Outputs of all runs, an axis over runs in front."""
        key = (plan.number, cached)
        if key not in self._outputs:
            tasks = self.prepared.corpus.tasks
            encode = cached_features if cached else encode_tokens(self.prepared.trunk.module, needed_fields(tasks))
            over = (stacking.axes(self.own[plan.number]).params, None, self._table_axis(plan) if cached else None)
            self._outputs[key] = evaluation.make_outputs(encode, tasks, self.mesh, over)
        return self._outputs[key]

    def collect(self, plan: PhasePlan, state: TrainState) -> TrainState:
        """The state with these parameters in its average, where that is one over evaluations."""
        collect = self.averaging.collect
        if collect is None:
            return state
        if plan.number not in self._collect:
            self._collect[plan.number] = jax.jit(jax.vmap(collect), donate_argnums=0, out_shardings=meshes.by_runs(self.mesh))
        trained, _ = trees.split(state.params, plan.mask)
        return state._replace(average=self._collect[plan.number](state.average, trained))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


Scores = dict[str, dict[str, float]]


def scores_of(
    machine: Machine,
    apply: evaluation.Apply,
    params: Any,
    split: str,
    which: Sequence[bool],
    own: Any,
    beams: Callable[[Seq2Seq], int],
    table: Any = None,
) -> list[Scores | None]:
    """{task: {metric: value}} of those runs that are asked for; where a loss is not finite, losses only.

    Args:
        machine: The runs' program.
        apply: machine.outputs(...).
        params: Parameters of all runs.
        split: dev or test.
        which: For each run whether it is asked for.
        own: Tree of bools: which leaves of the parameters are own.
        beams: Of a task that decodes.
        table: Features, where apply looks them up.
    """
    prepared = machine.prepared
    data, tasks, batching = prepared.corpus.splits[split], prepared.corpus.tasks, prepared.experiment.batch
    parts = list(data.values())
    found = evaluation.run_each(apply, params, tasks, parts, batching, machine.mesh, machine.size, table=table)
    scores: list[Scores | None] = []
    for number, asked in enumerate(which):
        losses = found[number].losses
        if not asked:
            scores.append(None)
        elif not all(math.isfinite(loss) for loss in losses.values()):
            scores.append({task: {"loss": loss} for task, loss in losses.items()})
        else:
            texts: Scores = {}
            if any(task.decodes for task in tasks):
                alone = jax.device_put(stacking.take(params, own, number), jax.devices()[0])
                devices = list(machine.mesh.devices.flat)
                texts = text_evaluation.text_scores(tasks, prepared.trunk, alone, data, beams, devices=devices)
            scores.append(evaluation.score(tasks, data, found[number], texts))
    return scores


MEMINFO = Path("/proc/meminfo")


def weight_of(compiled: Any) -> int:
    """Bytes that a compiled program needs on a device: arguments, results and what lies in between."""
    stats = compiled.memory_analysis()
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(kept + stats.temp_size_in_bytes)


def fit(bytes_of: Callable[[int], int], count: int, together: int, limit: int) -> int:
    """How many runs go into one program, by what programs weigh.

    Args:
        bytes_of: Runs in a program to its bytes on a device; asked seldom, since it compiles.
        count: Runs there are.
        together: They come in multiples of this, the devices that have runs of their own.
        limit: Bytes of a device.

    Raises:
        UserError: Not even the smallest number fits.
    """
    whole = math.ceil(count / together) * together
    most = bytes_of(whole)
    if most <= limit:
        return whole
    least = bytes_of(together) if whole > together else most
    if least > limit:
        raise UserError(
            f"a run needs {least / 1e9:.2f} GB on each device, and there are {limit / 1e9:.2f}: fewer rows in a batch "
            "(batch.rows, batch.accumulate), or --memory, if there is more"
        )
    per_run = max((most - least) / (whole - together), 1.0)
    size = min(whole - together, int((limit - least) / per_run) // together * together + together)
    while size > together and bytes_of(size) > limit:
        size -= together
    return size


def chunks(groups: Sequence[Sequence[Any]], size: int, together: int) -> tuple[list[list[Any]], int]:
    """Runs in chunks of at most `size`, as even as can be, and the one size that fits all of them.

    Args:
        groups: Runs that may be in one chunk.
        size: At most so many, a multiple of `together`.
        together: The size is a multiple of this.
    """
    parts = []
    for group in groups:
        for places in np.array_split(np.arange(len(group)), math.ceil(len(group) / size)):
            parts.append([group[place] for place in places])
    return parts, math.ceil(max(len(part) for part in parts) / together) * together


def memory() -> int:
    """Bytes that a device has for us: what it says, or nine tenths of what the machine has free."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    free = 0
    if MEMINFO.exists():
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    # Elsewhere than on Linux nobody says what is free: half of what there is.
    free = free or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free * 9 // 10 // jax.device_count()
