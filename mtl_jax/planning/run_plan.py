"""The plan of a run: the step of every phase, compiled for devices that are not here, and their compiler's estimates."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mtl_jax.core import log_lines
from mtl_jax.core.errors import UserError
from mtl_jax.data.stream import stream
from mtl_jax.experiment import Experiment, data_seed_of
from mtl_jax.planning import program_cost
from mtl_jax.planning.program_cost import ProgramCost
from mtl_jax.planning.topologies import Topology, topology
from mtl_jax.training import held_out, phase_state, setup
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import jitted_step
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.prepared import Prepared, features_shape, on_mesh
from mtl_jax.training.references import References
from mtl_jax.training.sharding import bytes_of, decide
from mtl_jax.training.train_state import StepInputs, TrainState

log = logging.getLogger(__name__)

PRODUCT = 0.88  # of a chip's arithmetic that a large product uses, by the compiler's estimate for v5e
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class PhaseCost(NamedTuple):
    """A step of a phase on one device, as the compiler estimates it.

    Attributes:
        phase: Its name.
        steps: Its number of steps.
        parameters: Bytes of parameters; if they are cut, of this device's part.
        optimizer: Bytes of the optimizer's state, and of averages and the rule's state.
        temporaries: Bytes of activations and other temporaries; None if the program does not fit.
        memory: Bytes of everything together.
        fits: Whether the memory of a device is enough.
        flops: Operations; None if the program does not fit, or processes a batch in parts, as compilers count a loop once.
        seconds: Time of a step without communication; None if the compiler gives no cycles.
        communication: The least seconds of the communication, part of which happens at the same time.
        cost: Cycles, places and collectives; None if the program does not fit.
        fused_cycles: An estimate for fused kernels, for which the compiler has none; part of the seconds.
        compile_seconds: Time of the compilation on this machine.
    """

    phase: str
    steps: int
    parameters: int
    optimizer: int
    temporaries: int | None
    memory: int
    fits: bool
    flops: float | None
    seconds: float | None
    communication: float | None
    cost: ProgramCost | None
    compile_seconds: float
    fused_cycles: float = 0.0


class Plan(NamedTuple):
    """The plan of a run on a topology.

    Attributes:
        topology: The devices.
        rows: Rows of a batch, over all devices.
        tokens: Tokens of a batch, padding included.
        dtype: The dtype of the computation.
        phases: The phases, in order.
        sharding: replicated or fsdp; for auto its choice.
        note: A line with the reason of the choice; "": none.
        remat: As Experiment.remat.
        accumulate: As Batching.accumulate.
    """

    topology: Topology
    rows: int
    tokens: int
    dtype: str
    phases: list[PhaseCost]
    sharding: str = "replicated"
    note: str = ""
    remat: str = "none"
    accumulate: int = 1

    def hours(self) -> float | None:
        """The time of all steps, without evaluation and waiting; None if the compiler gives no cycles."""
        if any(phase.seconds is None for phase in self.phases):
            return None
        return sum(phase.steps * (phase.seconds or 0.0) for phase in self.phases) / 3600

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values, per device and step."""
        phases = []
        for phase in self.phases:
            values = phase._asdict()
            cost = values.pop("cost")
            values |= {
                "memory_bytes": values.pop("memory"),
                "cycles": cost and cost.cycles,
                "collectives": {} if cost is None else {kind: value._asdict() for kind, value in cost.collectives.items()},
                "places": {} if cost is None else cost.places,
                "unknown_loops": cost and cost.unknown_loops,
            }
            phases.append(values)
        return {
            "topology": self.topology.name,
            "devices": len(self.topology.devices),
            "rows": self.rows,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "sharding": self.sharding,
            "remat": self.remat,
            "hours": self.hours(),
            "phases": phases,
        }


def plan(experiment: Experiment, topologies: Sequence[str], rows: int = 0, sharding: str = "") -> list[Plan]:
    """The needs of a run on devices that are not here: memory, operations, time and communication of a step of every phase.

    The compilers of those devices compile the run's own steps; nothing is trained, and no parameter of a trunk from scratch is
    made. The numbers are the compilers' estimates, for one process with all devices.

    Args:
        experiment: The experiment.
        topologies: Names such as v5e:16x16.
        rows: Rows of a batch over all devices; 0: those of the experiment.
        sharding: replicated, fsdp or auto; "": that of the experiment.

    Returns:
        A plan for each topology.

    Raises:
        UserError: A topology is unknown, its compiler is not installed, or the rows are not a multiple of its devices; and as
            train() before its first step.

    >>> mtl_jax.plan(EXPERIMENT, ["v5e:2x2"], rows=64)[0].phases[0].fits  # doctest: +SKIP
    True
    """
    log_lines.show()
    if not topologies:
        raise UserError("--topology: name at least one, such as v5e:2x2")
    chosen = [topology(name) for name in topologies]
    rows = rows or experiment.batch.rows
    for item in chosen:
        if rows % len(item.devices):
            least = -(-rows // len(item.devices)) * len(item.devices)
            raise UserError(
                f"batch.rows is {rows}; it must be a multiple of the {len(item.devices)} devices of {item.name}: --rows {least}"
            )
    dtype = "bfloat16" if experiment.dtype == "auto" else experiment.dtype
    batch = dataclasses.replace(experiment.batch, rows=rows)
    here = dataclasses.replace(
        experiment, batch=batch, devices=1, dtype=dtype, kernels="auto", sharding=sharding or experiment.sharding
    )
    prepared = setup.prepare(here, abstract=True)
    prepared = prepared._replace(experiment=dataclasses.replace(prepared.experiment, kernels=experiment.kernels))
    inputs = _batch(prepared)
    return [_on(item, prepared, inputs) for item in chosen]


def _on(item: Topology, prepared: Prepared, inputs: Any) -> Plan:
    """The plan for a topology."""
    experiment, needed = prepared.experiment, phase_state.bytes_if_replicated(prepared)
    cut, note = decide(experiment.sharding, needed, len(item.devices), item.chip.memory)
    elsewhere = on_mesh(prepared, _mesh(item))._replace(cut=cut)
    phases = [_phase(elsewhere, phase, item, inputs) for phase in prepared.plans]
    tokens, sharding = int(np.prod(inputs.tokens.shape)), "fsdp" if cut else "replicated"
    parts, remat = experiment.batch.accumulate, experiment.remat
    return Plan(item, experiment.batch.rows, tokens, experiment.dtype, phases, sharding, note, remat, parts)


def _batch(prepared: Prepared) -> Any:
    """The first batch of a run; all batches have its shapes."""
    experiment = prepared.experiment
    batches = stream(prepared.corpus, experiment.batch, data_seed_of(experiment), setup.mixture_phases(experiment))
    with contextlib.closing(batches):
        return next(batches)


def _phase(prepared: Prepared, plan: PhasePlan, item: Topology, batch: Any) -> PhaseCost:
    log.info("compiling a step of phase %s for %s ...", plan.phase.name, item.name)
    state, inputs = _arguments(prepared, plan, batch)
    parameters = bytes_of(state.params)
    common: dict[str, Any] = {"phase": plan.phase.name, "steps": plan.end - plan.start, "parameters": parameters}
    common["optimizer"] = bytes_of(state) - parameters
    started = time.monotonic()
    try:
        compiled = jitted_step(prepared, plan).lower(state, inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _NEEDED.search(str(error))
        if needed is None:
            raise
        memory = int(float(needed[1]) * _UNITS[needed[2]])
        common |= {"memory": memory, "fits": False, "compile_seconds": time.monotonic() - started}
        return PhaseCost(**common, temporaries=None, flops=None, seconds=None, communication=None, cost=None)
    seconds = time.monotonic() - started
    cost = program_cost.read(compiled.as_text())
    memory, clock = meshes.bytes_of(compiled), item.chip.clock
    experiment = prepared.experiment
    in_parts = max(experiment.batch.accumulate, experiment.batch.recompute) > 1 or bool(experiment.private)
    devices = 1 if compiled.cost_analysis() else len(item.devices)
    fused = 0.0 if clock is None else cost.fused_cycles(PRODUCT * item.chip.flops / clock, item.chip.memory_bandwidth / clock)
    others = 1 - 1 / len(item.devices)
    # A device sends all of an array but its own part; for a whole sum on every device it sends as much again.
    sent = sum(value.bytes * (2 if kind == "all-reduce" else 1) for kind, value in cost.collectives.items()) * others
    return PhaseCost(
        **common,
        temporaries=int(compiled.memory_analysis().temp_size_in_bytes),
        memory=memory,
        fits=memory <= item.chip.memory,
        flops=None if in_parts else _flops(compiled, prepared, plan, batch) / devices,
        seconds=None if cost.cycles is None or clock is None else (cost.cycles + fused) / clock,
        fused_cycles=fused,
        communication=sent / item.chip.bandwidth,
        cost=cost,
        compile_seconds=seconds,
    )


def _arguments(prepared: Prepared, plan: PhasePlan, batch: Any) -> tuple[TrainState, StepInputs]:
    """The shapes and shardings of a step's arguments."""
    replicated, corpus, batching = meshes.replicated(prepared.mesh), prepared.corpus, prepared.experiment.batch
    measured = held_out.host_batches(prepared.held_out, corpus.tasks, batching, corpus.has_types, meshes.shards(prepared.mesh))
    inputs = StepInputs(
        _shapes(batch, meshes.by_rows(prepared.mesh)),
        _shapes(features_shape(prepared, plan), replicated),
        prepared.placement.shapes(References(prepared, Path()).shapes(plan)),
        _shapes(measured, meshes.by_rows(prepared.mesh, axis=1)),
    )
    return phase_state.template(prepared, plan.number, plan.start), inputs


def _flops(compiled: Any, prepared: Prepared, plan: PhasePlan, batch: Any) -> float:
    """Operations by the compiler's own count; without one, as for GPUs, those of the program before compilation."""
    counted = compiled.cost_analysis() or jitted_step(prepared, plan).lower(*_arguments(prepared, plan, batch)).cost_analysis()
    return float(counted["flops"])


def _mesh(item: Topology) -> Mesh:
    devices = list(item.devices)
    return jax.make_mesh((len(devices),), (meshes.DATA,), axis_types=(AxisType.Auto,), devices=devices)


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
