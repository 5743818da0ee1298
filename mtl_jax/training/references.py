"""The references of regularisers: earlier parameters, Fisher information, teachers. Written once, not with every checkpoint.

reference/NAME.safetensors in the workdir is written when its phase begins. Checkpoints contain its SHA-256, so a resumed run
uses the same bits or stops. Teachers are not copied; they are compared by their SHA-256, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core import digests
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import writing
from mtl_jax.core.trees import leaves_of, matching
from mtl_jax.pretrained.saving import Saved, write_safetensors
from mtl_jax.pretrained.tensor_files import open_safetensors
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.regularisation import fisher, pseudo_rows
from mtl_jax.training.train_state import TrainState
from mtl_jax.transfer.regularisers import EWC, Distillation, Regulariser, start_of
from mtl_jax.transfer.unlabelled import SelfTraining

log = logging.getLogger(__name__)


class References:
    """The references of a run.

    Args:
        prepared: The run.
        folder: Its workdir.
        best: From the state at the start of a round of self-training to the parameters of the model that labels.

    Attributes:
        digests: {name: SHA-256} of the references used so far; part of every checkpoint.
    """

    def __init__(self, prepared: Prepared, folder: Path, best: Callable[[TrainState], Any] = lambda state: state.params):
        self.prepared, self.folder, self._best = prepared, folder / "reference", best
        self.digests: dict[str, str] = {}
        self._placed: dict[str, Any] = {}

    def for_phase(self, plan: PhasePlan, state: TrainState, begins: bool) -> Any:
        """{name: tree}, the references that a phase needs, on the devices; None: it needs none.

        Args:
            plan: The phase.
            state: The state in it.
            begins: Whether the phase begins now; else a run resumes in it.

        Raises:
            UserError: A reference file is missing, or a file or teacher has changed since the run began.
        """
        if begins:
            self._write_references(plan, state)
        names = self._needed(plan)
        references = {name: self._placed[name] if name in self._placed else self._place(name) for name in sorted(names)}
        self._placed = references
        return references or None

    def shapes(self, plan: PhasePlan) -> Any:
        """{name: tree of shapes and dtypes} of what for_phase() returns, without making or reading anything."""
        return {name: self._shape(name) for name in sorted(self._needed(plan))} or None

    def _shape(self, name: str) -> Any:
        prepared, paths = self.prepared, set[str]()
        for plan in prepared.plans:
            if start_of(plan.phase.name) == name:
                paths = self._start_paths(plan)
        for regulariser in self._active():
            if isinstance(regulariser, Distillation) and name in regulariser.references("").values():
                return jax.eval_shape(lambda tree: tree, prepared.teachers[regulariser.name].params)
            if isinstance(regulariser, EWC) and name in regulariser.references("").values():
                paths = self._ewc_paths(regulariser)
        for plan in prepared.plans:
            for regulariser in _self_trained(plan):
                if pseudo_rows.reference_of(regulariser, plan.phase.name) == name:
                    rows = len(prepared.corpus.splits["train"][regulariser.source].tokens)
                    tasks = [task for task in prepared.corpus.tasks if task.name in prepared.compared_tasks[regulariser.name]]
                    shapes = {
                        task.name: {pseudo_rows.TARGETS: (rows, task.outputs), pseudo_rows.WEIGHTS: (rows,)} for task in tasks
                    }
                    return {
                        pseudo_rows.leaf(task, what): jax.ShapeDtypeStruct(shape, jnp.float32)
                        for task, arrays in shapes.items()
                        for what, shape in arrays.items()
                    }
        leaves = leaves_of(prepared.params)
        return {path: jax.ShapeDtypeStruct(leaves[path].shape, jnp.float32) for path in sorted(paths)}

    def _ewc_paths(self, regulariser: EWC) -> set[str]:
        """The parameters that a Fisher information is kept of."""
        return {path for later in self.prepared.plans for path in matching(regulariser.parameters, _trained(later))}

    def _needed(self, plan: PhasePlan) -> set[str]:
        names = {name for regulariser in plan.regularisers for name in self._names(regulariser)}
        names |= {pseudo_rows.reference_of(chosen, plan.phase.name) for chosen in _self_trained(plan)}
        return names | ({start_of(self._first_phase)} if plan.mixout_paths else set())

    def _names(self, regulariser: Regulariser) -> list[str]:
        return list(regulariser.references(regulariser.phase or self._first_phase).values())

    @property
    def _first_phase(self) -> str:
        return self.prepared.plans[0].phase.name

    def _write_references(self, plan: PhasePlan, state: TrainState) -> None:
        """Writes the references that are made at the start of a phase."""
        if any(start_of(plan.phase.name) in self._needed(later) for later in self.prepared.plans):
            leaves, paths = leaves_of(state.params), self._start_paths(plan)
            start = self.prepared.placement.on_host({path: leaves[path] for path in sorted(paths)})
            self._write(start_of(plan.phase.name), lambda: start)
        for regulariser in self._active():
            if isinstance(regulariser, EWC):
                named = plan.phase.name == (regulariser.phase or self._first_phase)
                if plan.number == 0 if regulariser.run else named:
                    self._write_fisher(regulariser, state)

        for regulariser in _self_trained(plan):
            self._write_pseudo_labels(regulariser, plan, self._best(state))

    def _write_pseudo_labels(self, regulariser: SelfTraining, plan: PhasePlan, params: Any) -> None:
        """Writes the pseudo-labels of the round that begins."""
        prepared = self.prepared
        tasks = [task for task in prepared.corpus.tasks if task.name in prepared.compared_tasks[regulariser.name]]
        examples, phase = prepared.corpus.splits["train"][regulariser.source], plan.phase.name
        batching, seed = prepared.experiment.batch, prepared.experiment.seed
        local = jax.device_put(prepared.placement.on_host(params), jax.local_devices()[0])

        def make() -> dict[str, np.ndarray]:
            return pseudo_rows.make(regulariser, prepared.trunk.module, local, tasks, examples, batching, seed, phase)

        self._write(pseudo_rows.reference_of(regulariser, phase), make)

    def _active(self) -> list[Regulariser]:
        """The regularisers that are active in some phase."""
        active = [regulariser for plan in self.prepared.plans for regulariser in plan.regularisers]
        return [regulariser for regulariser in self.prepared.experiment.regularisers if regulariser in active]

    def _start_paths(self, plan: PhasePlan) -> set[str]:
        """The parameters whose values at the start of this phase are compared with, and that train in it or later."""
        paths: set[str] = set()
        for later in self.prepared.plans[plan.number :]:
            trained = _trained(later)
            for regulariser in later.regularisers:
                if start_of(plan.phase.name) in self._names(regulariser):
                    paths.update(regulariser.start_paths(trained))
            if plan.number == 0:
                paths.update(later.mixout_paths)
        return paths

    def _write_fisher(self, regulariser: EWC, state: TrainState) -> None:
        """Writes the Fisher information of a source, and the anchor where it is from another run."""
        prepared, batching = self.prepared, self.prepared.experiment.batch
        paths = sorted(self._ewc_paths(regulariser))
        params = None if regulariser.run else prepared.placement.on_host(state.params)

        def make() -> dict[str, np.ndarray]:
            log.info("%s: Fisher information of %s", regulariser.name, regulariser.source)
            seed = prepared.experiment.seed
            if regulariser.run:
                run = prepared.anchor_runs[regulariser.name]
                tasks, examples = fisher.tasks_and_examples(run, regulariser)
                run_batching = run.experiment.batch
                return fisher.diagonal(regulariser, run.trunk.module, run.params, tasks, examples, run_batching, paths, seed)
            train = prepared.corpus.splits["train"]
            tasks = [task for task in prepared.corpus.tasks if task.source == regulariser.source]
            place = list(train).index(regulariser.source)
            module, examples = prepared.trunk.module, train[regulariser.source]
            return fisher.diagonal(regulariser, module, params, tasks, examples, batching, paths, seed, place)

        names = regulariser.references(regulariser.phase or self._first_phase)
        self._write(names["fisher"], make)
        if regulariser.run:
            leaves = leaves_of(prepared.anchor_runs[regulariser.name].params)
            self._write(names["anchor"], lambda: {path: leaves[path] for path in paths})

    def _write(self, name: str, make: Any) -> None:
        """Writes a reference, whole or not at all, on host 0; all hosts then read the same file."""
        if jax.process_index() == 0:
            leaves, part = make(), self._file(name).with_suffix(".part")
            with writing(self._file(name)):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    write_safetensors(part, {path: Saved(leaf, False) for path, leaf in leaves.items()})
                    part.replace(self._file(name))
                finally:
                    part.unlink(missing_ok=True)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)
        self.digests.pop(name, None)
        self._placed.pop(name, None)

    def _place(self, name: str) -> Any:
        """A reference on the devices; its digest is recorded, or compared with the recorded one."""
        regularisers = self.prepared.experiment.regularisers
        distillations = {
            chosen.references("")["teacher"]: chosen for chosen in regularisers if isinstance(chosen, Distillation)
        }
        if name in distillations:
            distillation = distillations[name]
            tree, origin = self.prepared.teachers[distillation.name].params, f"the teacher {distillation.teacher}"
        else:
            tree, origin = self._read(name), str(self._file(name))
        digest = digests.of_tree(tree)
        if self.digests.setdefault(name, digest) != digest:
            raise UserError(f"{origin} has changed since this run began; put it back, or choose another --workdir")
        return self.prepared.placement.place(jax.tree.map(np.array, tree))

    def _read(self, name: str) -> dict[str, np.ndarray]:
        if not self._file(name).exists():
            raise UserError(
                f"{self._file(name)} is missing, and a regulariser of this run needs it; put it back, or choose another "
                "--workdir"
            )
        return {path: np.array(tensor.read()) for path, tensor in open_safetensors(self._file(name)).items()}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _trained(plan: PhasePlan) -> dict[str, Any]:
    """The mask's leaves of the parameters that train."""
    return {path: trains for path, trains in leaves_of(plan.mask).items() if trains}


def chosen_rows(plan: PhasePlan, references: Any) -> dict[str, np.ndarray]:
    """{source: the places of its examples that a phase reads}, of sources with pseudo-labels.

    Args:
        plan: The phase.
        references: The result of for_phase().
    """
    chosen: dict[str, np.ndarray] = {}
    for regulariser in _self_trained(plan):
        places = pseudo_rows.chosen_rows(references[pseudo_rows.reference_of(regulariser, plan.phase.name)])
        chosen[regulariser.source] = np.union1d(chosen.get(regulariser.source, places), places)
    return chosen


def restricted_sources(plan: PhasePlan) -> set[str]:
    """The sources of which a phase reads only the rows that chosen_rows() names."""
    return {regulariser.source for regulariser in _self_trained(plan)}


def _self_trained(plan: PhasePlan) -> list[SelfTraining]:
    """The rounds of self-training that begin with a phase."""
    return [regulariser for regulariser in plan.regularisers if isinstance(regulariser, SelfTraining)]
