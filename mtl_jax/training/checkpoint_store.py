"""The checkpoints of a run by orbax: state and data position in one directory a step, written in the background."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_room, reason, refusal, shown, to_json, writing
from mtl_jax.core.trees import path_name
from mtl_jax.experiment import Checkpoints
from mtl_jax.training import checkpoint_files, checkpoint_repair, frozen_params
from mtl_jax.training import mesh as meshes
from mtl_jax.training.checkpoint_files import Damaged as Damaged

log = logging.getLogger(__name__)

ORBAX = f"{os.sep}orbax{os.sep}"  # in the paths of its code

# A checkpoint's record -> the shapes and shardings of its state; phases differ in structure.
Template = Callable[[dict[str, Any]], Any]


class Restored(NamedTuple):
    """A checkpoint that was read: its step, the state, and the record saved beside it."""

    step: int
    state: Any
    record: dict[str, Any]


class Best(NamedTuple):
    """The best checkpoint: its step, its dev criterion where it was chosen by that, and the value that was read from it."""

    step: int
    dev: float | None
    value: Any


class Store:
    """The checkpoints of a workdir: a thin layer over orbax's CheckpointManager.

    A state is a TrainState, or another named tuple with params; its fields that are not None are saved.

    Args:
        workdir: The workdir; checkpoints/ in it is made.
        config: Which checkpoints are kept.
        read_only: Never write or delete: to read the checkpoints of a run, which may be under way.
        criterion: The dev criterion. Dev numbers of another one, from before a change of the configuration, do not count.
        trunk_source: Where the parameters are that checkpoints may omit.

    Attributes:
        omitted: {path: SHA-256} of the parameters that checkpoints omit from now on.
    """

    def __init__(
        self,
        workdir: Path,
        config: Checkpoints,
        read_only: bool = False,
        criterion: str = "mean",
        trunk_source: frozen_params.TrunkSource | None = None,
    ):
        self.criterion = criterion
        self.trunk_source = trunk_source
        self.omitted: dict[str, str] = {}
        self.folder = workdir.resolve() / "checkpoints"
        self._manager: ocp.CheckpointManager | None = None
        if read_only:
            return
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_orbax)
        with writing(self.folder):
            checkpoint_repair.repair(self.folder)
            self._manager = ocp.CheckpointManager(self.folder, options=self._options(config))

    def _options(self, config: Checkpoints) -> ocp.CheckpointManagerOptions:
        keep = AnyPreservationPolicy(
            [LatestN(config.keep), BestN(get_metric_fn=self._dev, n=1, keep_checkpoints_without_metrics=False)]
        )
        # With best_fn orbax also writes the numbers; without it the best would be forgotten, and deleted, after a restart.
        return ocp.CheckpointManagerOptions(best_fn=self._dev, preservation_policy=keep, enable_async_checkpointing=True)

    def save(self, step: int, state: Any, record: dict[str, Any], dev: float | None) -> None:
        """Starts writing; returns once the arrays are copied off the devices.

        Args:
            step: Steps done; names the directory.
            state: The train state.
            record: JSON-able facts that belong to this state: phase, data position.
            dev: The dev criterion at this step, if it was measured.

        Raises:
            UserError: It, or the checkpoint before it, cannot be written.
        """
        if step in self.steps():
            return
        assert self._manager is not None, "opened to read only"
        state = state._replace(params=frozen_params.omit(state.params, self.omitted))
        record = {**record, "dev": None if dev is None else {self.criterion: dev}, "left_out": self.omitted}
        record = checkpoint_files.signed({**record, "arrays": checkpoint_files.describe(state._asdict())})
        items = ocp.args.Composite(state=ocp.args.StandardSave(_saved_fields(state)), record=ocp.args.JsonSave(record))
        metrics = {} if dev is None or not math.isfinite(dev) else {self.criterion: dev}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + len(to_json(record))
        with self._writing():
            self._manager.wait_until_finished()
            if jax.process_index() == 0:  # orbax's threads, once started, report a full disk on hundreds of lines
                check_room(self.folder, size)
            self._manager.save(step, args=items, metrics=metrics)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return checkpoint_files.steps(self.folder) if self._manager is None else sorted(self._manager.all_steps())

    def latest(self, template: Template) -> Restored | None:
        """The newest checkpoint that can be read whole. Newer damaged ones are reported and moved to damaged/.

        Args:
            template: As for restore.

        Raises:
            UserError: A checkpoint is whole but of another model.
        """
        for step in reversed(self.steps()):
            try:
                return self.restore(step, template)
            except Damaged as error:
                moved = "set aside in damaged/, " if self._manager is not None else ""
                log.warning("%s; %sgoing back to the checkpoint before it", error, moved)
                if self._manager is not None:
                    checkpoint_repair.set_aside(self.folder, step)
                    self._manager.reload()
        return None

    def best(self, read: Callable[[int], Any]) -> Best | None:
        """The checkpoint with the highest dev criterion that can be read, the later one where two are equal.

        Args:
            read: Step to the value that is wanted from the checkpoint; a damaged one is reported and passed over.
        """
        measured = []
        for step in self.steps():
            try:
                dev = checkpoint_files.read_record(self._checkpoint(step))["dev"] or {}
            except Damaged as error:
                log.warning("%s; passed over", error)
                continue
            if self.criterion in dev:
                measured.append((_ranked(dev[self.criterion]), step))
        for dev, step in sorted(measured, reverse=True):
            try:
                return Best(step, dev, read(step))
            except Damaged as error:
                log.warning("%s; taking the next best", error)
        return None

    def restore(self, step: int, template: Template) -> Restored:
        """Reads one checkpoint.

        Args:
            step: Its step.
            template: From its record to the state's shapes and shardings.

        Raises:
            Damaged: It cannot be read, or its arrays are not those that were saved.
            UserError: It is whole but of another model: parameters are missing, new, or of another shape; or it omits
                parameters that are missing or changed in the trunk's checkpoint.
        """
        record = checkpoint_files.read_record(self._checkpoint(step))
        shapes = template(record)
        omitted = record.get("left_out", {})
        saved_shapes = shapes._replace(params=frozen_params.omit(shapes.params, omitted))
        self._check_same_model(step, record["arrays"], saved_shapes)
        arrays = dict(checkpoint_files.read_arrays(self._checkpoint(step), record["arrays"]))

        def put(path: tuple[Any, ...], shape: Any) -> jax.Array:
            name = path_name(path)
            array = arrays.pop(name)
            if array.dtype != shape.dtype:
                raise self._another_model(step, f"{name} is {array.dtype} in it and {shape.dtype} here")
            return meshes.place(array, shape.sharding)

        def place(path: str, array: np.ndarray) -> jax.Array:
            return meshes.place(array, trees.flat(shapes.params)[path].sharding)

        state = jax.tree_util.tree_map_with_path(put, saved_shapes._asdict())
        params = frozen_params.restore(state["params"], omitted, self.trunk_source, place)
        return Restored(step, type(shapes)(**{**state, "params": params}), record)

    def restore_params(self, step: int) -> Any:
        """The parameters that were evaluated at a checkpoint, as host arrays, whatever devices and phase it was saved from.

        The whole checkpoint is read and compared, as by restore(): a run cannot resume from a damaged one, so nothing is
        predicted with it either.

        Raises:
            Damaged: It cannot be read.
            UserError: It omits parameters that are missing or changed in the trunk's checkpoint.
        """
        record = checkpoint_files.read_record(self._checkpoint(step))
        trained: dict[str, np.ndarray] = {}
        averaged: dict[str, np.ndarray] = {}
        for path, array in checkpoint_files.read_arrays(self._checkpoint(step), record["arrays"]):
            for prefix, leaves in (("params/", trained), ("average/mean/", averaged)):
                if path.startswith(prefix):
                    leaves[path.removeprefix(prefix)] = array
        omitted = record.get("left_out", {})
        params = frozen_params.restore(trees.nested(trained), omitted, self.trunk_source, lambda _, array: array)
        return trees.merge(_like(params, averaged), params) if averaged else params

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            UserError: It cannot be written.
        """
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads.

        Raises:
            UserError: The checkpoint that was saved last cannot be written.
        """
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with self._writing():
                manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax writes in its own threads; their errors are raised by whichever function is called next, once or twice."""
        try:
            yield
        except Exception as error:
            refused = refusal(error)
            if refused is None:
                raise
            with contextlib.suppress(Exception):  # it raises the same error again
                if self._manager is not None:
                    manager, self._manager = self._manager, None
                    manager.close()
            for thread in threading.enumerate():  # they still write
                if type(thread).__module__.startswith("orbax."):
                    thread.join()
            checkpoint_repair.remove_unfinished(self.folder)
            raise UserError(
                f"{shown(self.folder)}: a checkpoint cannot be written ({reason(refused)}); when it can be, the same command "
                f"{'resumes from step ' + str(steps[-1]) if (steps := checkpoint_files.steps(self.folder)) else 'begins anew'}"
            ) from error

    def _checkpoint(self, step: int) -> Path:
        return self.folder / str(step)

    def _dev(self, metrics: dict[str, float]) -> float:
        return metrics.get(self.criterion, -math.inf)

    def _check_same_model(self, step: int, saved: dict[str, list[Any]], template: Any) -> None:
        leaves, _ = jax.tree_util.tree_flatten_with_path(template._asdict())
        expected = {path_name(path): list(leaf.shape) for path, leaf in leaves}
        for path in sorted(expected.keys() | saved.keys()):
            shape, saved_shape = expected.get(path), saved.get(path, [None])[0]
            if shape != saved_shape:
                raise self._another_model(step, f"{path} is {_shape(saved_shape)} in it and {_shape(shape)} here")

    def _another_model(self, step: int, difference: str) -> UserError:
        return UserError(f"checkpoint {self._checkpoint(step)} is of another model: {difference}; choose another --workdir")


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Whether a log record does not come from orbax.

    Errors of orbax's threads are raised by its next call and reported once, by the caller. Its logs, and asyncio's of tasks
    that it abandoned, repeat them on hundreds of lines, or report files that nothing here reads.
    """
    if record.name == "absl":
        return ORBAX not in record.pathname
    if "exception was never retrieved" not in record.getMessage():
        return True
    trace = record.exc_info[2] if record.exc_info else None
    frames = traceback.extract_tb(trace) if trace else []
    from_orbax = any(ORBAX in frame.filename for frame in frames)
    return checkpoint_repair.UNFINISHED not in record.getMessage() and not from_orbax


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else f"of shape {tuple(shape)}"


def _saved_fields(state: Any) -> dict[str, Any]:
    """The fields of a state that are saved: those that are not None, and one copy of what all devices of a host have."""
    return {name: jax.tree.map(_one_copy, value) for name, value in state._asdict().items() if value is not None}


def _one_copy(leaf: Any) -> Any:
    # Orbax would cut each copy to a part of the whole, by a program that is compiled for each shape and device.
    whole = isinstance(leaf, jax.Array) and leaf.is_fully_addressable and leaf.is_fully_replicated
    return leaf.addressable_data(0) if whole else leaf


def _ranked(dev: float | str | None) -> float:
    """A dev number as checkpoints are ranked by it; NaN and infinite losses come last."""
    value = -math.inf if dev is None else float(dev)
    return -math.inf if math.isnan(value) else value


def _like(params: Any, leaves: dict[str, np.ndarray]) -> Any:
    """Leaves by path as a tree with the structure of the parameters; None where there is none."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves.get(path_name(path)), params)
