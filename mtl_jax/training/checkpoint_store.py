"""Checkpoints by orbax: state and data position in one step directory, written in the background."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
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
from mtl_jax.core.files import check_room, parse_json, reason, refusal, shown, to_json, write_json, writing
from mtl_jax.core.trees import path_name
from mtl_jax.experiment import Checkpoints
from mtl_jax.training import checkpoint_files, frozen_params
from mtl_jax.training import mesh as meshes

log = logging.getLogger(__name__)

ORBAX = f"{os.sep}orbax{os.sep}"  # in the paths of its code
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written


class Restored(NamedTuple):
    """A checkpoint that was read: its step, the state, and the record saved beside it."""

    step: int
    state: Any
    record: dict[str, Any]


class Best(NamedTuple):
    """A checkpoint: its step, its dev criterion where it was chosen by that, and what was read of it."""

    step: int
    dev: float | None
    value: Any


Template = Callable[[dict[str, Any]], Any]


class Damaged(UserError):
    """A checkpoint that cannot be used."""


class Store:
    """The checkpoints of a workdir. A thin layer over orbax's CheckpointManager.

    A state is a TrainState, or another named tuple with params: its fields that are not None are what is saved.

    Args:
        workdir: The workdir; checkpoints/ in it is made.
        config: Which are kept.
        read_only: Never write or delete: for looking into a run, which may be under way.
        criterion: What dev numbers are of. Those of another one, from before a change of the configuration, don't count.
        base: Where the parameters are that checkpoints may leave out.

    Attributes:
        left_out: {path: SHA-256} of the parameters that the checkpoints from now on leave out.
    """

    def __init__(
        self,
        workdir: Path,
        config: Checkpoints,
        read_only: bool = False,
        criterion: str = "mean",
        base: frozen_params.Base | None = None,
    ):
        self.criterion = criterion
        self.base = base
        self.left_out: dict[str, str] = {}
        self.folder = workdir.resolve() / "checkpoints"
        self._manager: ocp.CheckpointManager | None = None
        if read_only:
            return
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_orbax)
        with writing(self.folder):
            self._tidy()
            self._manager = ocp.CheckpointManager(self.folder, options=self._options(config))

    def _options(self, config: Checkpoints) -> ocp.CheckpointManagerOptions:
        keep = AnyPreservationPolicy(
            [LatestN(config.keep), BestN(get_metric_fn=self._dev, n=1, keep_checkpoints_without_metrics=False)]
        )
        # best_fn has the numbers written, too: without it the best would be forgotten, and deleted, after a restart.
        return ocp.CheckpointManagerOptions(best_fn=self._dev, preservation_policy=keep, enable_async_checkpointing=True)

    def save(self, step: int, state: Any, record: dict[str, Any], dev: float | None) -> None:
        """Starts writing; returns once the arrays are copied off the devices.

        Args:
            step: Steps done; names the directory.
            state: The train state.
            record: JSON-able facts that belong to this state: phase, data position.
            dev: The dev criterion at this step, if it was measured.
        """
        if step in self.steps():
            return
        assert self._manager is not None, "opened to read only"
        state = state._replace(params=frozen_params.without(state.params, self.left_out))
        record = {**record, "dev": None if dev is None else {self.criterion: dev}, "left_out": self.left_out}
        record = checkpoint_files.signed({**record, "arrays": checkpoint_files.describe(state._asdict())})
        items = ocp.args.Composite(state=ocp.args.StandardSave(_fields(state)), record=ocp.args.JsonSave(record))
        metrics = {} if dev is None or not math.isfinite(dev) else {self.criterion: dev}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + len(to_json(record))
        with self._writing():
            self._manager.wait_until_finished()
            if jax.process_index() == 0:  # orbax's threads, once begun, tell of a full disk on hundreds of lines of their own
                check_room(self.folder, size)
            self._manager.save(step, args=items, metrics=metrics)

    def latest(self, template: Template) -> Restored | None:
        """The newest checkpoint that can be read whole. Damaged ones after it are reported and set aside in damaged/.

        Args:
            template: See restore.

        Raises:
            UserError: A checkpoint is whole but of another model.
        """
        for step in reversed(self.steps()):
            try:
                return self.restore(step, template)
            except Damaged as error:
                aside = "set aside in damaged/, " if self._manager is not None else ""
                log.warning("%s; %sgoing back to the checkpoint before it", error, aside)
                self._set_aside(step)
        return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return checkpoint_files.steps(self.folder) if self._manager is None else sorted(self._manager.all_steps())

    def best(self, read: Callable[[int], Any]) -> Best | None:
        """The checkpoint with the highest dev criterion that can be read, the later one where two are equal.

        Args:
            read: Step to whatever is wanted of the checkpoint; a damaged one is reported and passed over.
        """
        measured = []
        for step in self.steps():
            try:
                dev = self._record(step)["dev"] or {}
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
            step: Which.
            template: The record to the state's shapes and shardings: phases differ in structure.

        Raises:
            Damaged: It cannot be read, or its arrays are not those that were saved.
            UserError: It is whole but of another model: parameters are missing, new, or of another shape; or it leaves out
                parameters, and those are not where they were.
        """
        record = self._record(step)
        whole = template(record)
        gone = record.get("left_out", {})
        shapes = whole._replace(params=frozen_params.without(whole.params, gone))
        self._check_same_model(step, record["arrays"], shapes)
        arrays = dict(self._arrays(step, record))

        def put(path: tuple[Any, ...], leaf: Any) -> jax.Array:
            name = path_name(path)
            array = arrays.pop(name)
            if array.dtype != leaf.dtype:
                raise self._another(step, f"{name} is {array.dtype} in it and {leaf.dtype} here")
            return meshes.place(array, leaf.sharding)

        def place(path: str, array: np.ndarray) -> jax.Array:
            return meshes.place(array, trees.flat(whole.params)[path].sharding)

        state = jax.tree_util.tree_map_with_path(put, shapes._asdict())
        params = frozen_params.put_back(state["params"], gone, self.base, place)
        return Restored(step, type(whole)(**{**state, "params": params}), record)

    def restore_params(self, step: int) -> Any:
        """The parameters that were measured, of one checkpoint, as host arrays, whatever devices and phase it was saved from.

        All of it is read and compared, as restore() does: a checkpoint that a run cannot resume from is not predicted with.

        Raises:
            UserError: It is damaged, or leaves out parameters that are not where they were.
        """
        record = self._record(step)
        found: dict[str, dict[str, np.ndarray]] = {"params": {}, "average/mean": {}}
        for path, array in self._arrays(step, record):
            for part, leaves in found.items():
                if path.startswith(f"{part}/"):
                    leaves[path.removeprefix(f"{part}/")] = array
        params = trees.nested(found["params"])
        params = frozen_params.put_back(params, record.get("left_out", {}), self.base, lambda _, array: array)
        mean = found["average/mean"]
        return trees.merge(_like(params, mean), params) if mean else params

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
            UserError: What was saved last cannot be written.
        """
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with self._writing():
                manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax writes in threads of its own, and what went wrong there is raised by whatever is called next, once or twice."""
        try:
            yield
        except Exception as error:
            refused = refusal(error)
            if refused is None:
                raise
            with contextlib.suppress(Exception):  # what it says is that which was just raised
                if self._manager is not None:
                    manager, self._manager = self._manager, None
                    manager.close()
            for thread in threading.enumerate():  # which go on writing
                if type(thread).__module__.startswith("orbax."):
                    thread.join()
            self._remove_unfinished()
            raise UserError(
                f"{shown(self.folder)}: a checkpoint cannot be written ({reason(refused)}); when it can be, the same command "
                f"{'resumes from step ' + str(steps[-1]) if (steps := checkpoint_files.steps(self.folder)) else 'begins anew'}"
            ) from error

    def _dev(self, metrics: dict[str, float]) -> float:
        return metrics.get(self.criterion, -math.inf)

    def _record(self, step: int) -> dict[str, Any]:
        try:
            return checkpoint_files.read_record(self.folder / str(step))
        except checkpoint_files.Unreadable as error:
            raise self._damaged(step, error) from error

    def _arrays(self, step: int, record: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        try:
            yield from checkpoint_files.read_arrays(self.folder / str(step), record["arrays"])
        except checkpoint_files.Unreadable as error:
            raise self._damaged(step, error) from error

    def _check_same_model(self, step: int, saved: dict[str, list[Any]], template: Any) -> None:
        wanted = {path: list(leaf.shape) for path, leaf in _leaves(template._asdict())}
        for path in sorted(wanted.keys() | saved.keys()):
            here, there = wanted.get(path), saved.get(path, [None])[0]
            if here != there:
                raise self._another(step, f"{path} is {_shape(there)} in it and {_shape(here)} here")

    def _another(self, step: int, difference: str) -> UserError:
        return UserError(f"checkpoint {self.folder / str(step)} is of another model: {difference}; choose another --workdir")

    def _damaged(self, step: int, why: Exception) -> Damaged:
        return Damaged(f"checkpoint {self.folder / str(step)} is damaged ({reason(why)})")

    def _tidy(self) -> None:
        """Leaves in the directory what orbax can read; anything else there would be the end of it."""
        if jax.process_index() == 0 and self.folder.is_dir():
            self._remove_unfinished()
            for path in sorted(self.folder.iterdir()):
                if path.is_dir() != checkpoint_files.is_step(path.name):
                    log.warning("%s: not a checkpoint; set aside in damaged/", path)
                    self._move_aside(path.name)
            for step in checkpoint_files.steps(self.folder):
                self._repair(step)
        _wait_for_host_0()

    def _remove_unfinished(self) -> None:
        """Removes what a process left that was killed, or had no room, while it wrote."""
        if jax.process_index() != 0 or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if UNFINISHED in path.name and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif UNFINISHED in path.name:
                path.unlink(missing_ok=True)

    def _repair(self, step: int) -> None:
        """Gives a checkpoint the two files that orbax reads of all of them when it is opened, where they are damaged."""
        folder = self.folder / str(step)
        try:
            dev = self._record(step).get("dev") or {}
        except Damaged as error:
            log.warning("%s; set aside in damaged/", error)
            self._move_aside(str(step))
            return
        numbers = {name: value for name, value in dev.items() if isinstance(value, (int, float))}
        if _parsed(folder / "metrics" / "metrics") != numbers:
            (folder / "metrics").mkdir(exist_ok=True)
            write_json(folder / "metrics" / "metrics", numbers)
        if checkpoint_files.TIMES(_parsed(folder / "_CHECKPOINT_METADATA")):
            (folder / "_CHECKPOINT_METADATA").unlink(missing_ok=True)

    def _set_aside(self, step: int) -> None:
        if self._manager is None:  # opened to read only
            return
        if jax.process_index() == 0:
            self._move_aside(str(step))
        _wait_for_host_0()
        self._manager.reload()

    def _move_aside(self, name: str) -> None:
        aside = self.folder.parent / "damaged"
        with writing(aside):
            aside.mkdir(exist_ok=True)
            free = next(path for n in itertools.count() if not (path := aside / f"{name}-{n}").exists())
            (self.folder / name).rename(free)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Whether a record is somebody else's.

    What goes wrong in orbax's threads is raised by its next call and told once, from there. Its logs, and asyncio's of tasks
    that it gave up, say the same on hundreds of lines; or tell of files that nothing here reads.
    """
    if record.name == "absl":
        return ORBAX not in record.pathname
    if "exception was never retrieved" not in record.getMessage():
        return True
    trace = record.exc_info[2] if record.exc_info else None
    frames = traceback.extract_tb(trace) if trace else []
    return UNFINISHED not in record.getMessage() and not any(ORBAX in frame.filename for frame in frames)


def _wait_for_host_0() -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("set aside")  # no host looks before the directory is gone


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else f"of shape {tuple(shape)}"


def _fields(state: Any) -> dict[str, Any]:
    """What is on disk of a state: what it has."""
    return {name: value for name, value in state._asdict().items() if value is not None}


def _leaves(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _parsed(file: Path) -> Any:
    """What is in a JSON file; None where nothing can be read."""
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _ranked(dev: float | str | None) -> float:
    """A dev number as checkpoints are ranked by it; what is not a number comes last."""
    value = -math.inf if dev is None else float(dev)
    return -math.inf if math.isnan(value) else value


def _like(params: Any, leaves: dict[str, np.ndarray]) -> Any:
    """Leaves by path as a tree with the structure of the parameters; None where there is none."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves.get(path_name(path)), params)
