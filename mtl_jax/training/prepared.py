"""A run before its first step: what preparing it makes, and what the loops read of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mtl_jax import trunks
from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.examples import Examples
from mtl_jax.data.mixture_schedule import ScheduleSequence
from mtl_jax.data.poisson import PoissonSchedule
from mtl_jax.experiment import Experiment
from mtl_jax.models import kernels
from mtl_jax.training import held_out, privacy
from mtl_jax.training.forward import Savings
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.regularisation.teachers import Teacher
from mtl_jax.training.restore import TrainedRun
from mtl_jax.training.sharding import Placement
from mtl_jax.trunks import Trunk


class Prepared(NamedTuple):
    """A run before its first step.

    Attributes:
        experiment: The experiment, tasks selected.
        corpus: Its data; corpus.tasks have the label sets found in it.
        schedule: The sources of the rows of each batch.
        trunk: The loaded trunk.
        params: The initial parameters, on the host or on the default device, float32.
        plans: The phases.
        mesh: The devices.
        notes: Lines for the log before training.
        teachers: {distillation: the model that it imitates}.
        anchor_runs: {EWC: the run whose parameters it stays near}; only those that name another run.
        compared_tasks: {regulariser: the tasks whose outputs it compares}; only those that name tasks or imitate logits.
        copies: The numbers of training rows that are copies of held-out rows, for data.json; {} where there are none.
        test_copies: {source: {place of a test row: kind of its closest copy in train}}.
        held_out: The training rows that a weighting rule measures weights on and that are not trained on; () if none does.
        facts: What the run knows of itself at a step, beside its metrics, such as the epsilon that it has spent.
        cut: Whether its state is cut over the devices; else each has all of it.
    """

    experiment: Experiment
    corpus: Corpus
    schedule: ScheduleSequence | PoissonSchedule
    trunk: Trunk
    params: Any
    plans: list[PhasePlan]
    mesh: Mesh
    notes: list[str]
    teachers: dict[str, Teacher]
    anchor_runs: dict[str, TrainedRun]
    compared_tasks: dict[str, list[str]]
    copies: dict[str, Any]
    test_copies: Mapping[str, Mapping[str, str]]
    held_out: tuple[Examples, ...] = ()
    facts: privacy.Facts = privacy.Facts()
    cut: bool = False

    @property
    def placement(self) -> Placement:
        """How its state lies on the devices."""
        return Placement(self.mesh, self.cut)

    @property
    def savings(self) -> Savings:
        """How its passes save memory."""
        return Savings(self.placement if self.cut else None, self.experiment.remat)


def on_mesh(prepared: Prepared, mesh: Mesh) -> Prepared:
    """The run on other devices, its trunk with the kernels for these.

    Raises:
        UserError: There are no such kernels for them, or a rule of the run cannot have them.
    """
    trunk, name = prepared.trunk, prepared.experiment.kernels
    if any(plan.rule.held_out is not None for plan in prepared.plans):
        if name == "fused":
            raise UserError(
                "kernels is fused, but a weighting rule that reads held-out rows needs derivatives along a direction, which "
                "fused kernels have not: set kernels to auto"
            )
        name = "plain" if name == "auto" else name
    module = kernels.with_kernels(trunk.module, name, mesh)
    return prepared._replace(mesh=mesh, trunk=trunk._replace(module=module))


def held_out_batches(prepared: Prepared) -> Batch | None:
    """StepInputs.held_out of a run, on its devices."""
    corpus, batching = prepared.corpus, prepared.experiment.batch
    return held_out.batches(prepared.held_out, corpus.tasks, batching, corpus.has_types, prepared.mesh)


def features_shape(prepared: Prepared, plan: PhasePlan) -> jax.ShapeDtypeStruct | None:
    """The table of pooled vectors of a phase whose trunk is frozen; None: the phase has none."""
    if not plan.cached_features:
        return None
    texts = sum(len(part.tokens) for split in prepared.corpus.splits.values() for part in split.values())
    return jax.ShapeDtypeStruct((texts, trunks.width(prepared.trunk)), np.float32)
