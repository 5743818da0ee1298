"""A dry run: everything that happens before the first step, one step of the first phase, and nothing written."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import count
from mtl_jax.data.stream import stream
from mtl_jax.experiment import Experiment, data_seed_of
from mtl_jax.training import initial_parameters
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import jitted_step
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.prepared import features_shape, held_out_batches
from mtl_jax.training.references import References
from mtl_jax.training.setup import mixture_phases, prepare
from mtl_jax.training.train_state import StepInputs

log = logging.getLogger(__name__)


def dry_run(experiment: Experiment) -> str:
    """Reads and checks everything, logs the notes of a run, and compiles and takes one step of its first phase.

    Args:
        experiment: The experiment.

    Returns:
        A line on the step: the time to compile it, its time, and its memory.

    Raises:
        UserError: As train(), before its first step.
    """
    prepared, _, notes = initial_parameters.load(prepare(experiment))
    for note in [*prepared.notes, *notes]:
        log.info("%s", note)
    plan, mesh = prepared.plans[0], prepared.mesh
    state = initial_state(prepared)
    batches = stream(
        prepared.corpus,
        prepared.experiment.batch,
        data_seed_of(prepared.experiment),
        mixture_phases(prepared.experiment),
        jax.process_index(),
        jax.process_count(),
    )
    shape = features_shape(prepared, plan)  # zeros: the step costs the same
    table = None if shape is None else meshes.place(jnp.zeros(shape.shape), meshes.replicated(mesh))
    with contextlib.closing(batches), tempfile.TemporaryDirectory() as folder:
        references = References(prepared, Path(folder)).for_phase(plan, state, begins=True)
        step = jitted_step(prepared, plan)
        inputs = StepInputs(meshes.assemble(next(batches), meshes.by_rows(mesh)), table, references, held_out_batches(prepared))
        log.info("compiling a step of phase %s ...", plan.phase.name)
        started = time.monotonic()
        compiled = step.lower(state, inputs).compile()
        compiling, started = time.monotonic() - started, time.monotonic()
        jax.block_until_ready(compiled(state, inputs))
        taken = time.monotonic() - started
    steps = count(prepared.plans[-1].end, "step")
    return (
        f"dry run: a step of phase {plan.phase.name} compiles in {compiling:.1f} s, takes {taken:.2f} s the first time and "
        f"needs {meshes.bytes_of(compiled) / 1e9:.2f} GB on each device; the run has {steps}. Nothing was written."
    )
