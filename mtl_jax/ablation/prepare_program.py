"""Prepares a program of an ablation: reads data, makes parameters, compiles steps, and divides the runs into chunks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax.ablation import device_memory, fields, stacking
from mtl_jax.ablation.fields import Numbers
from mtl_jax.ablation.plan import Program, Run, order_of
from mtl_jax.ablation.programs import Machine
from mtl_jax.core.errors import UserError
from mtl_jax.data.stream import stream
from mtl_jax.experiment import data_seed_of
from mtl_jax.training import initial_parameters
from mtl_jax.training import mesh as meshes
from mtl_jax.training.prepared import Prepared, on_mesh
from mtl_jax.training.setup import mixture_phases, prepare, with_seed

log = logging.getLogger(__name__)


class Ready(NamedTuple):
    """A program that is ready for its first step.

    Attributes:
        program: The program.
        prepared: Its template, prepared.
        params: {seed: initial parameters}.
        loaded: {seed: {file: its contents}}: where parameters are from, such as init_from.json; empty for a seed without any.
        machine: Its compiled functions.
        chunks: Its runs in chunks that are trained at once.
    """

    program: Program
    prepared: Prepared
    params: dict[int, Any]
    loaded: dict[int, dict[str, dict[str, Any]]]
    machine: Machine
    chunks: list[list[Run]]

    def values(self, chunk: Sequence[Run]) -> Numbers:
        """The numbers of a chunk's runs, filled up to the machine's size with those of the last run."""
        collected = fields.collect([run.experiment for run in self.program.runs])
        places = [self.program.runs.index(run) for run in chunk]
        places += [places[-1]] * (self.machine.size - len(places))
        return {name: array[np.array(places)] for name, array in collected.items()}


def make_ready(program: Program, at_once: int = 0, memory: float = 0.0, size: int = 0, trains: bool = True) -> Ready:
    """Reads a program's data, makes the parameters of every seed, compiles its steps, and measures how many runs fit.

    Args:
        program: The program.
        at_once: Most runs at once; 0: as many as fit.
        memory: GB of a device that may be used; 0: its free memory.
        size: Number of runs at once before a restart, possibly on other devices; it is kept, since checkpoints have it. 0: the
            program has not begun.
        trains: Whether steps will be taken; if not, all devices are used, whatever their number.

    Raises:
        UserError: The experiment is refused, or not even one run fits.
    """
    if at_once < 0 or memory < 0:
        raise UserError(f"--at-once is {at_once} and --memory {memory:g}; neither can be negative")
    prepared = prepare(dataclasses.replace(program.template, devices=1))
    groups: dict[int, list[Run]] = {}
    for run in program.runs:
        groups.setdefault(order_of(run), []).append(run)
    most = max(len(group) for group in groups.values())
    rows, devices = (program.template.batch.rows, program.template.devices) if trains else (0, 0)
    mesh = meshes.make_for_runs(rows, min(most, at_once or most), devices, size)
    prepared = on_mesh(prepared, mesh)
    params, loaded = {}, {}
    for seed in sorted({run.experiment.seed for run in program.runs}):
        seeded, loaded[seed], lines = initial_parameters.load(with_seed(prepared, seed))
        for line in lines:
            log.info("seed %d: %s", seed, line)
        params[seed] = seeded.params
    differs = stacking.differing(list(params.values()))
    collected = fields.collect([run.experiment for run in program.runs])
    machines: dict[int, Machine] = {}

    def measure(count: int) -> int:
        machines[count] = Machine(prepared, differs, count)
        places = np.arange(count) % len(program.runs)
        values = jax.device_put({name: array[places] for name, array in collected.items()}, meshes.by_runs(mesh))
        return machines[count].weigh(values, meshes.assemble(_first_batch(prepared), meshes.by_rows(mesh)))

    multiple = mesh.shape[meshes.RUN]
    limit = int(memory * 1e9) or device_memory.available()
    fitting = size or device_memory.runs_that_fit(measure, min(most, at_once or most), multiple, limit)
    chunks, even_size = device_memory.chunks(list(groups.values()), fitting, multiple)
    size, begins = size or even_size, not size
    if size not in machines and begins:  # chunks of even size may have fewer runs than fit
        measure(size)
    machine = machines[size] if size in machines else Machine(prepared, differs, size)
    return Ready(program, prepared, params, loaded, machine, chunks)


def _first_batch(prepared: Prepared) -> Any:
    experiment = prepared.experiment
    batches = stream(prepared.corpus, experiment.batch, data_seed_of(experiment), mixture_phases(experiment))
    batch = next(batches)
    batches.close()
    return batch
