"""A program of an ablation before its first step: data read, parameters made, steps compiled, runs put into chunks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax.ablation import fields, programs, stacking
from mtl_jax.ablation.fields import Numbers
from mtl_jax.ablation.plan import Program, Run, order_of
from mtl_jax.ablation.programs import Machine
from mtl_jax.core.errors import UserError
from mtl_jax.data.stream import stream
from mtl_jax.experiment import data_seed_of
from mtl_jax.training import init_from
from mtl_jax.training import mesh as meshes
from mtl_jax.training.setup import Prepared, prepare, reseeded, stretches

log = logging.getLogger(__name__)


class Ready(NamedTuple):
    """A program before its first step.

    Attributes:
        program: Its runs.
        prepared: Its template, prepared.
        params: {seed: initial parameters}.
        begun: {seed: contents of init_from.json}, empty where nothing was loaded.
        machine: Its compiled programs.
        chunks: Its runs in chunks.
    """

    program: Program
    prepared: Prepared
    params: dict[int, Any]
    begun: dict[int, dict[str, Any]]
    machine: Machine
    chunks: list[list[Run]]

    def values(self, chunk: Sequence[Run]) -> Numbers:
        """The numbers of a chunk's runs, filled up to the machine's size with the last one's."""
        every = fields.collect([run.experiment for run in self.program.runs])
        places = [self.program.runs.index(run) for run in chunk]
        places += [places[-1]] * (self.machine.size - len(places))
        return {name: array[np.array(places)] for name, array in every.items()}


def make_ready(program: Program, at_once: int = 0, memory: float = 0.0, size: int = 0, trains: bool = True) -> Ready:
    """Reads a program's data, makes the parameters of every seed, compiles its steps, and finds out how many runs fit.

    Args:
        program: The program.
        at_once: Most runs at once; 0: as many as fit.
        memory: GB of a device; 0: what there is.
        size: How many runs there were at once before a restart, maybe on other devices; that stays, as checkpoints have it.
            0: it begins now.
        trains: Whether steps are going to be taken; else all devices that are there are used, and any number of them will do.

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
    prepared = prepared._replace(mesh=mesh)
    params, begun = {}, {}
    for seed in sorted({run.experiment.seed for run in program.runs}):
        one = reseeded(prepared, seed)
        if program.template.init_from.path:
            one, begun[seed], said = init_from.begin(one)
            log.info("seed %d: %s", seed, said)
        params[seed] = one.params
    differs = stacking.differing(list(params.values()))
    every = fields.collect([run.experiment for run in program.runs])
    made: dict[int, Machine] = {}

    def bytes_of(count: int) -> int:
        made[count] = Machine(prepared, differs, count)
        places = np.arange(count) % len(program.runs)
        values = jax.device_put({name: array[places] for name, array in every.items()}, meshes.by_runs(mesh))
        return made[count].weigh(values, meshes.assemble(_some_batch(prepared), meshes.by_rows(mesh)))

    apart = mesh.shape[meshes.RUN]
    limit = int(memory * 1e9) or programs.memory()
    wanted = size or programs.fit(bytes_of, min(most, at_once or most), apart, limit)
    parts, even = programs.chunks(list(groups.values()), wanted, apart)
    even = size or even
    if even not in made and not size:  # not what fits, but what is needed for chunks of the same size
        bytes_of(even)
    machine = made[even] if even in made else Machine(prepared, differs, even)
    return Ready(program, prepared, params, begun, machine, parts)


def _some_batch(prepared: Prepared) -> Any:
    experiment = prepared.experiment
    batches = stream(prepared.corpus, experiment.batch, data_seed_of(experiment), stretches(experiment))
    batch = next(batches)
    batches.close()
    return batch
