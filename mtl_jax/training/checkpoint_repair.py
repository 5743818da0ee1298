"""Repair of the directory that holds all checkpoints, before orbax opens it and after it failed to write.

Orbax refuses the whole directory for one bad file in it. So a directory that is not a checkpoint, and a checkpoint whose record
is damaged, are moved to damaged/ beside it; small files that only orbax needs are written anew; unfinished checkpoints are
removed.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import jax

from mtl_jax.core.files import parse_json, write_json, writing
from mtl_jax.core.json_shapes import anything, mapping, number, object_of, text, whole
from mtl_jax.training import checkpoint_files
from mtl_jax.training.checkpoint_files import Damaged

log = logging.getLogger(__name__)

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that orbax is writing

# Orbax's own file of times and kinds beside a checkpoint; nothing else reads it.
ORBAX_METADATA = object_of(
    {"item_handlers": mapping(text)},
    init_timestamp_nsecs=whole,
    commit_timestamp_nsecs=whole,
    metrics=mapping(anything),
    performance_metrics=mapping(number),
    custom_metadata=mapping(anything),
)


def repair(folder: Path) -> None:
    """Leaves in the directory only what orbax can read. Host 0 does it; all hosts wait until it is done.

    Args:
        folder: The directory of all checkpoints.
    """
    if jax.process_index() == 0 and folder.is_dir():
        remove_unfinished(folder)
        for path in sorted(folder.iterdir()):
            if path.is_dir() != checkpoint_files.is_step(path.name):
                log.warning("%s: not a checkpoint; set aside in damaged/", path)
                _move_to_damaged(folder, path.name)
        for step in checkpoint_files.steps(folder):
            _repair_checkpoint(folder, step)
    _wait_for_host_0()


def remove_unfinished(folder: Path) -> None:
    """Removes checkpoints that were not written to their end: the process was killed, or the disk was full."""
    if jax.process_index() != 0 or not folder.is_dir():
        return
    for path in folder.iterdir():
        if UNFINISHED in path.name and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif UNFINISHED in path.name:
            path.unlink(missing_ok=True)


def set_aside(folder: Path, step: int) -> None:
    """Moves a checkpoint to damaged/. Host 0 does it; all hosts wait until it is done."""
    if jax.process_index() == 0:
        _move_to_damaged(folder, str(step))
    _wait_for_host_0()


def _repair_checkpoint(folder: Path, step: int) -> None:
    """Writes or removes the two files of a checkpoint that orbax reads when it opens the directory, where they are damaged."""
    checkpoint = folder / str(step)
    try:
        dev = checkpoint_files.read_record(checkpoint).get("dev") or {}
    except Damaged as error:
        log.warning("%s; set aside in damaged/", error)
        _move_to_damaged(folder, str(step))
        return
    metrics = {name: value for name, value in dev.items() if isinstance(value, (int, float))}
    if _parsed(checkpoint / "metrics" / "metrics") != metrics:
        (checkpoint / "metrics").mkdir(exist_ok=True)
        write_json(checkpoint / "metrics" / "metrics", metrics)
    if ORBAX_METADATA(_parsed(checkpoint / "_CHECKPOINT_METADATA")):
        (checkpoint / "_CHECKPOINT_METADATA").unlink(missing_ok=True)


def _move_to_damaged(folder: Path, name: str) -> None:
    damaged = folder.parent / "damaged"
    with writing(damaged):
        damaged.mkdir(exist_ok=True)
        free = next(path for n in itertools.count() if not (path := damaged / f"{name}-{n}").exists())
        (folder / name).rename(free)


def _parsed(file: Path) -> Any:
    """The value in a JSON file; None where it cannot be read."""
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _wait_for_host_0() -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("set aside")
