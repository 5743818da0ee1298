"""Checkpoints by orbax: state and data position in one step directory, written in the background."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mtl_jax.errors import UserError
from mtl_jax.experiment import Checkpoints
from mtl_jax.training.state import TrainState
from mtl_jax.transfer.freezing import path_name

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint that was read: its step, the state, and the record saved beside it."""

    step: int
    state: Any
    record: dict[str, Any]


class Store:
    """The checkpoints of a workdir. A thin layer over orbax's CheckpointManager.

    Args:
        workdir: The workdir; checkpoints/ in it is made.
        config: Which are kept.
        read_only: Never write or delete: for looking into a run, which may be under way.
    """

    def __init__(self, workdir: Path, config: Checkpoints, read_only: bool = False):
        self.folder = workdir.resolve() / "checkpoints"
        keep = AnyPreservationPolicy(
            [LatestN(config.keep), BestN(get_metric_fn=_dev, n=1, keep_checkpoints_without_metrics=False)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else keep, enable_async_checkpointing=True, read_only=read_only
        )
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
        record = {**record, "dev": dev, "fingerprint": _fingerprint(state._asdict())}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
            metrics=None if dev is None else {"dev": dev},
        )

    def latest(self, template: Any) -> Restored | None:
        """The newest checkpoint that can be read whole; damaged ones after it are reported and removed.

        Args:
            template: A function of the record that gives the state's shapes and shardings: phases differ in structure.
        """
        for step in reversed(self.steps()):
            try:
                return self.restore(step, template)
            except UserError as error:
                log.warning("%s; going back to the checkpoint before it", error)
                self._remove(step)
        return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best(self) -> tuple[int, float] | None:
        """Step and dev criterion of the best checkpoint, the later one where two are equal."""
        found = [(self._record(step)["dev"], step) for step in self.steps()]
        measured = [(dev, step) for dev, step in found if dev is not None]
        return (max(measured)[1], max(measured)[0]) if measured else None

    def restore(self, step: int, template: Any) -> Restored:
        """Reads one checkpoint.

        Raises:
            UserError: It is damaged.
        """
        try:
            record = self._record(step)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(template(record)))
            state = self._manager.restore(step, args=args).state
        # Orbax, tensorstore and json raise many kinds for damaged files; whichever it is, the checkpoint cannot be used.
        except Exception as error:
            raise UserError(f"checkpoint {self.folder / str(step)} is damaged ({_first_line(error)})") from error
        self._verify(step, state._asdict(), record["fingerprint"])
        return Restored(step, state, record)

    def restore_params(self, step: int) -> Any:
        """The parameters of one checkpoint as host arrays, whatever devices and phase it was saved from.

        Raises:
            UserError: It is damaged.
        """
        path = self.folder / str(step) / "state"
        try:
            with ocp.PyTreeCheckpointer() as reader:
                shapes = reader.metadata(path).item_metadata.tree["params"]
                wanted = {"params": jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)}
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
                args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
                found = reader.restore(path, args=args)
            saved = self._record(step)["fingerprint"]
        except Exception as error:  # as in restore
            raise UserError(f"checkpoint {path.parent} is damaged ({_first_line(error)})") from error
        self._verify(step, found, saved)
        return found["params"]

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads."""
        self._manager.close()

    def _verify(self, step: int, tree: dict[str, Any], saved: dict[str, int]) -> None:
        if any(saved.get(path) != value for path, value in _fingerprint(tree).items()):
            raise UserError(f"checkpoint {self.folder / str(step)} is damaged (its arrays are not those that were saved)")

    def _record(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record

    def _remove(self, step: int) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / str(step))
        self._manager.reload()


def _dev(metrics: dict[str, float]) -> float:
    return metrics["dev"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """u32[L]: the sum of each leaf's bits, modulo 2^32. Any single changed word changes it."""

    def bits(leaf: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([bits(leaf) for leaf in leaves])


def _fingerprint(tree: dict[str, Any]) -> dict[str, int]:
    """{path: sum of bits}. Catches damage that decompresses without an error."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = np.asarray(_sums([leaf for _, leaf in paths_and_leaves])).tolist()
    return {path_name(path): value for (path, _), value in zip(paths_and_leaves, sums, strict=True)}
