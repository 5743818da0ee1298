"""The files of a workdir: configuration, versions, label sets, results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from mtl_jax.counting import count
from mtl_jax.errors import UserError

MERGED = "merge.json"  # a workdir that holds it was not trained, but put together
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "numpy", "mtl_jax")


def read_json(path: Path) -> Any:
    """The parsed file, or None where there is none.

    Raises:
        UserError: The file is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all; on host 0 only."""
    if jax.process_index() != 0:
        return
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def check_writable(workdir: Path) -> None:
    """Finds out, without writing anything, whether the workdir can be made and written.

    Raises:
        UserError: It cannot.
    """
    try:
        at = workdir.resolve()
        while not at.exists():
            at = at.parent
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror}); choose another --workdir") from error
    if not at.is_dir():
        raise UserError(f"{workdir}: cannot be a workdir, {at} is a file")
    if not os.access(at, os.W_OK | os.X_OK):
        raise UserError(f"{workdir}: cannot be written (no permission for {at}); choose another --workdir")


def changed(
    workdir: Path, config: dict[str, Any], allow_change: bool, complete: Callable[[Any], Any] = lambda values: values
) -> bool:
    """Whether the workdir was begun with another configuration.

    Args:
        workdir: The workdir.
        config: The configuration now.
        allow_change: Whether it may be.
        complete: Gives a configuration of before the fields that did not exist then, as they were in effect.

    Raises:
        UserError: It was, and allow_change is not set. The message shows each field, before and now.
    """
    before = read_json(workdir / "config.json")
    if before is None:
        return False
    now = json.loads(json.dumps(config))
    changes = [f"{name} was {old}, is {new}" for name, old, new in differences(complete(before), now)]
    if changes and not allow_change:
        raise UserError(
            f"{workdir} was begun with another configuration: {'; '.join(changes)}. "
            "Choose another --workdir, or go on with the new one by --allow-config-change"
        )
    return bool(changes)


def forget_results(workdir: Path) -> None:
    """Removes what an earlier configuration concluded: results and baselines."""
    if jax.process_index() == 0:
        for name in ("results.json", "baselines.json", "curves.png"):
            (workdir / name).unlink(missing_ok=True)


def check_data(workdir: Path, data: dict[str, Any]) -> None:
    """Compares the data with that which the workdir was begun with.

    Raises:
        UserError: Examples or label sets are not the same: a file has changed since.
    """
    before = read_json(workdir / "data.json")
    if before is None:
        return
    changed = [path for path, _, _ in differences(before, json.loads(json.dumps(data)))]
    if changed:
        raise UserError(
            f"{workdir} was begun with other data: {', '.join(changed[:5])} changed. Put the files back, choose another "
            "--workdir, or go on with the new data by removing data.json there"
        )


def has_checkpoints(workdir: Path) -> bool:
    """Whether there is any, good or damaged."""
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


def create(workdir: Path) -> None:
    """Makes the directory.

    Raises:
        UserError: It cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror}); choose another --workdir") from error


def versions() -> dict[str, str]:
    """Python, the packages that numbers depend on, and the devices."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    devices = jax.devices()
    # Of the cores those that this process may use, where the system says it.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["devices"] = f"{len(devices)} x {devices[0].device_kind}, {count(cores or 0, 'CPU core')}"
    return found


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(field, value before, value now) where two parsed JSON files differ: fields as flags write them, values as JSON."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key, "absent"), now.get(key, "absent"), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            yield from differences(a, b, f"{path}.{i}")
    elif before != now:
        yield path, json.dumps(before), json.dumps(now)
