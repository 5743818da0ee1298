"""Checkpoints by orbax: state and data position in one step directory, written in the background."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mtl_jax.errors import UserError
from mtl_jax.experiment import Checkpoints
from mtl_jax.training import left_out
from mtl_jax.training import mesh as meshes
from mtl_jax.training.state import TrainState
from mtl_jax.transfer import freezing
from mtl_jax.transfer.freezing import path_name

log = logging.getLogger(__name__)


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


Template = Callable[[dict[str, Any]], TrainState]


class Damaged(UserError):
    """A checkpoint that cannot be used."""


class Store:
    """The checkpoints of a workdir. A thin layer over orbax's CheckpointManager.

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
        base: left_out.Base | None = None,
    ):
        self.criterion = criterion
        self.base = base
        self.left_out: dict[str, str] = {}
        self.folder = workdir.resolve() / "checkpoints"
        keep = AnyPreservationPolicy(
            [LatestN(config.keep), BestN(get_metric_fn=self._dev, n=1, keep_checkpoints_without_metrics=False)]
        )
        options = ocp.CheckpointManagerOptions(
            # best_fn has the numbers written, too: without it the best would be forgotten, and deleted, after a restart.
            best_fn=None if read_only else self._dev,
            preservation_policy=None if read_only else keep,
            enable_async_checkpointing=True,
            read_only=read_only,
        )
        if not read_only:
            self._set_aside_unreadable_numbers()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: TrainState, record: dict[str, Any], dev: float | None) -> None:
        """Starts writing; returns once the arrays are copied off the devices.

        Args:
            step: Steps done; names the directory.
            state: The train state.
            record: JSON-able facts that belong to this state: phase, data position.
            dev: The dev criterion at this step, if it was measured.
        """
        if step in self.steps():
            return
        state = state._replace(params=left_out.without(state.params, self.left_out))
        record = {**record, "dev": None if dev is None else {self.criterion: dev}, "arrays": _describe(state._asdict())}
        record["left_out"] = self.left_out
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_fields(state)), record=ocp.args.JsonSave(record)),
            metrics=record["dev"] or {},
        )

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
                log.warning("%s; set aside in damaged/, going back to the checkpoint before it", error)
                self._set_aside(step)
        return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best(self, read: Callable[[int], Any]) -> Best | None:
        """The checkpoint with the highest dev criterion that can be read, the later one where two are equal.

        Args:
            read: Step to whatever is wanted of the checkpoint; a damaged one is reported and passed over.
        """
        measured = []
        for step in self.steps():
            try:
                dev = (self._record(step)["dev"] or {}).get(self.criterion)
            except Damaged as error:
                log.warning("%s; passed over", error)
                continue
            if dev is not None:
                measured.append((dev, step))
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
        shapes = whole._replace(params=left_out.without(whole.params, gone))
        self._check_same_model(step, record["arrays"], shapes)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(_fields(shapes)))
            state = TrainState(**self._manager.restore(step, args=args).state)
        # Orbax and tensorstore raise many kinds for damaged files; whichever it is, the checkpoint cannot be used.
        except Exception as error:
            raise self._damaged(step, error) from error
        self._verify(step, state._asdict(), record["arrays"])

        def place(path: str, array: np.ndarray) -> jax.Array:
            return meshes.place(array, left_out.flat(whole.params)[path].sharding)

        return Restored(step, state._replace(params=left_out.put_back(state.params, gone, self.base, place)), record)

    def restore_params(self, step: int) -> Any:
        """The parameters that were measured, of one checkpoint, as host arrays, whatever devices and phase it was saved from.

        Raises:
            UserError: It is damaged, or leaves out parameters that are not where they were.
        """
        path = self.folder / str(step) / "state"
        record = self._record(step)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(path).item_metadata.tree
                shapes = {"params": tree["params"]}
                if "average" in tree:
                    shapes["average"] = {"mean": tree["average"]["mean"]}
                wanted = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
                args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
                found = reader.restore(path, args=args)
        except Exception as error:  # as in restore
            raise self._damaged(step, error) from error
        self._verify(step, found, record["arrays"])
        params = left_out.put_back(found["params"], record.get("left_out", {}), self.base, lambda _, array: array)
        return freezing.merge(found["average"]["mean"], params) if "average" in found else params

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads."""
        self._manager.close()

    def _dev(self, metrics: dict[str, float]) -> float:
        return metrics.get(self.criterion, -math.inf)

    def _record(self, step: int) -> dict[str, Any]:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
        except Exception as error:  # as in restore
            raise self._damaged(step, error) from error

    def _check_same_model(self, step: int, saved: dict[str, list[Any]], template: TrainState) -> None:
        wanted = {path: list(leaf.shape) for path, leaf in _leaves(template._asdict())}
        for path in sorted(wanted.keys() | saved.keys()):
            here, there = wanted.get(path), saved.get(path, [None])[0]
            if here != there:
                raise UserError(
                    f"checkpoint {self.folder / str(step)} is of another model: {path} is {_shape(there)} in it and "
                    f"{_shape(here)} here; choose another --workdir"
                )

    def _verify(self, step: int, tree: dict[str, Any], saved: dict[str, list[Any]]) -> None:
        if any(saved.get(path) != value for path, value in _describe(tree).items()):
            raise self._damaged(step, "its arrays are not those that were saved")

    def _damaged(self, step: int, why: Exception | str) -> Damaged:
        first_line = (str(why).strip().splitlines() or [type(why).__name__])[0]
        return Damaged(f"checkpoint {self.folder / str(step)} is damaged ({first_line[:200]})")

    def _set_aside_unreadable_numbers(self) -> None:
        """Orbax reads all checkpoints' dev numbers when it is opened, and one that it cannot read would be the end of it."""
        for path in sorted(self.folder.glob("*/metrics/metrics")) if jax.process_index() == 0 else ():
            try:
                json.loads(path.read_bytes())
            except ValueError:
                log.warning("%s: no JSON; its checkpoint is set aside in damaged/", path)
                self._move_aside(int(path.parts[-3]))
        _wait_for_host_0()

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            self._move_aside(step)
        _wait_for_host_0()
        self._manager.reload()

    def _move_aside(self, step: int) -> None:
        aside = self.folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        free = next(name for n in itertools.count() if not (name := aside / f"{step}-{n}").exists())
        (self.folder / str(step)).rename(free)


def _wait_for_host_0() -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("set aside")  # no host looks before the directory is gone


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else f"of shape {tuple(shape)}"


def _fields(state: TrainState) -> dict[str, Any]:
    """What is on disk of a state: a run without an average has the files that it had before there were averages."""
    return {name: value for name, value in state._asdict().items() if name != "average" or value is not None}


def _leaves(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """u32[L]: the sum of each leaf's bits, modulo 2^32. Any single changed word changes it."""

    def bits(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == bool:  # has no bits of its own to reinterpret
            leaf = leaf.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([bits(leaf) for leaf in leaves])


def _describe(tree: dict[str, Any]) -> dict[str, list[Any]]:
    """{path: [shape, sum of bits]}. The sum catches damage that decompresses without an error."""
    leaves = _leaves(tree)
    sums = np.asarray(_sums([leaf for _, leaf in leaves])).tolist()
    return {path: [list(leaf.shape), total] for (path, leaf), total in zip(leaves, sums, strict=True)}
