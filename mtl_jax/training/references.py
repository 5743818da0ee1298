"""What regularisers hold on to: earlier parameters, Fisher information, teachers. Written once, not with every checkpoint.

reference/NAME.safetensors in the workdir is made when its phase begins; checkpoints carry its SHA-256, so that a run that is
gone on with holds on to the same bits. Teachers stay where they are, and are compared by their SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import writing
from mtl_jax.core.trees import leaves_of, matching
from mtl_jax.pretrained.saving import Saved, write_safetensors
from mtl_jax.pretrained.tensor_files import open_safetensors
from mtl_jax.training import mesh as meshes
from mtl_jax.training.regularisation import fisher
from mtl_jax.training.regularisation.transforms import anchor_of, fisher_of, start_of, teacher_of
from mtl_jax.training.setup import PhasePlan, Prepared
from mtl_jax.training.train_state import TrainState
from mtl_jax.transfer.regularisers import EWC, L2SP, AnyRegulariser, Distillation

log = logging.getLogger(__name__)


class References:
    """The references of a run.

    Args:
        prepared: The run.
        folder: Its workdir.

    Attributes:
        digests: {name: SHA-256} of those that there are; part of every checkpoint.
    """

    def __init__(self, prepared: Prepared, folder: Path):
        self.prepared, self.folder = prepared, folder / "reference"
        self.digests: dict[str, str] = {}
        self._placed: dict[str, Any] = {}

    def enter(self, plan: PhasePlan, state: TrainState, begins: bool) -> Any:
        """{name: tree} of what the regularisers of a phase hold on to, on the devices; None: nothing.

        Args:
            plan: The phase.
            state: The state in it.
            begins: Whether it begins now; else it is gone on with.

        Raises:
            UserError: A file is missing, or not what it was; or a teacher is not.
        """
        if begins:
            self._make(plan, state)
        names = self._needed(plan)
        found = {name: self._placed[name] if name in self._placed else self._place(name) for name in sorted(names)}
        self._placed = found
        return found or None

    def _needed(self, plan: PhasePlan) -> set[str]:
        names = {name for each in plan.regularisers for name in self._names(each)}
        return names | ({start_of(self._first)} if plan.mixout_paths else set())

    def _names(self, each: AnyRegulariser) -> list[str]:
        phase = each.phase or self._first
        if isinstance(each, L2SP):
            return [start_of(phase)]
        if isinstance(each, EWC):
            return [anchor_of(each, phase), fisher_of(each)]
        return [teacher_of(each)] if isinstance(each, Distillation) else []

    @property
    def _first(self) -> str:
        return self.prepared.plans[0].phase.name

    def _make(self, plan: PhasePlan, state: TrainState) -> None:
        """Writes what is to be kept of the moment in which a phase begins."""
        if any(start_of(plan.phase.name) in self._needed(later) for later in self.prepared.plans):
            leaves, start = leaves_of(state.params), self._at_the_start(plan)
            self._keep(start_of(plan.phase.name), lambda: {path: leaves[path] for path in sorted(start)})
        for each in self._used():
            begins = plan.number == 0 if isinstance(each, EWC) and each.run else plan.phase.name == (each.phase or self._first)
            if isinstance(each, EWC) and begins:
                self._learned(each, plan, state)

    def _used(self) -> list[AnyRegulariser]:
        """The regularisers that count in some phase."""
        held = [each for plan in self.prepared.plans for each in plan.regularisers]
        return [each for each in self.prepared.experiment.regularisers if each in held]

    def _at_the_start(self, plan: PhasePlan) -> set[str]:
        """The paths that are held on to from the start of this phase, and train in it or later."""
        found: set[str] = set()
        for later in self.prepared.plans[plan.number :]:
            trained = _trained(later)
            for each in later.regularisers:
                if (each.phase or self._first) == plan.phase.name:
                    if isinstance(each, L2SP):
                        found.update(matching(each.shared, trained))
                    elif isinstance(each, EWC) and not each.run:
                        found.update(matching(each.parameters, trained))
            if plan.number == 0:
                found.update(later.mixout_paths)
        return found

    def _learned(self, each: EWC, plan: PhasePlan, state: TrainState) -> None:
        """Writes the Fisher information of a source, and the anchor where that is another run's."""
        prepared, batching = self.prepared, self.prepared.experiment.batch
        paths = sorted({path for later in prepared.plans for path in matching(each.parameters, _trained(later))})

        def make() -> dict[str, np.ndarray]:
            log.info("%s: Fisher information of %s", each.name, each.source)
            seed = prepared.experiment.seed
            if each.run:
                run = prepared.learned[each.name]
                tasks, examples = fisher.of_run(run, each)
                return fisher.diagonal(each, run.trunk.module, run.params, tasks, examples, run.experiment.batch, paths, seed)
            train = prepared.corpus.splits["train"]
            tasks = [task for task in prepared.corpus.tasks if task.source == each.source]
            params = jax.device_get(state.params)
            place = list(train).index(each.source)
            module, examples = prepared.trunk.module, train[each.source]
            return fisher.diagonal(each, module, params, tasks, examples, batching, paths, seed, place)

        self._keep(fisher_of(each), make)
        if each.run:
            leaves = leaves_of(prepared.learned[each.name].params)
            self._keep(anchor_of(each, ""), lambda: {path: leaves[path] for path in paths})

    def _keep(self, name: str, make: Any) -> None:
        """Writes a reference whole, on the first host; all hosts then read the same file."""
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
        """A reference on the devices; its digest is noted, or compared with what was noted."""
        teachers = {teacher_of(each): each for each in self.prepared.experiment.regularisers if isinstance(each, Distillation)}
        if name in teachers:
            tree, what = self.prepared.teachers[teachers[name].name].params, f"the teacher {teachers[name].teacher}"
        else:
            tree, what = self._read(name), str(self._file(name))
        digest = digest_of(tree)
        if self.digests.setdefault(name, digest) != digest:
            raise UserError(f"{what} is not what this run began with; put it back, or choose another --workdir")
        return meshes.place(jax.tree.map(np.array, tree), meshes.replicated(self.prepared.mesh))

    def _read(self, name: str) -> dict[str, np.ndarray]:
        if not self._file(name).exists():
            raise UserError(
                f"{self._file(name)} is missing, and this run holds on to it; put it back, or choose another --workdir"
            )
        return {path: np.array(tensor.read()) for path, tensor in open_safetensors(self._file(name)).items()}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _trained(plan: PhasePlan) -> dict[str, Any]:
    return {path: trains for path, trains in leaves_of(plan.mask).items() if trains}


def digest_of(tree: Any) -> str:
    """SHA-256 of the paths, shapes and bits of a tree's leaves."""
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves_of(tree).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
