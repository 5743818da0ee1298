"""The files of a workdir: configuration, versions, label sets, results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from mtl_jax.core import files
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.files import check_regular, number_of, parse_json, shown, to_json, writing
from mtl_jax.core.json_shapes import Shape, anything, list_of, mapping, number, object_of, text, whole
from mtl_jax.core.versions import installed
from mtl_jax.training import checkpoint_files

_SCORES = mapping(number)


def _task(value: Any) -> str:
    """A task of results.json."""
    problem = object_of({"metric": text, "dev": _SCORES, "test": _SCORES, "baselines": mapping(_SCORES)})(value)
    if problem:
        return problem
    every = {"dev": value["dev"], "test": value["test"], **value["baselines"]}
    lacking = [name for name, scores in every.items() if value["metric"] not in scores]
    return f"{lacking[0]} lacks {value['metric']}" if lacking else ""


def _facts(value: Any) -> str:
    """The rest of results.json, of a run that was trained or merged."""
    merged = "merged" in value
    trained = {"seed": whole, "weighting": text, "best_step": whole, "steps": whole}
    made = {"merged": object_of({"sources": whole, "method": text})}
    common = {"experiment": text, "best_criterion": number, "seconds": number, "versions": object_of({"devices": text})}
    return object_of({"tasks": mapping(_task), **common, **(made if merged else trained)})(value)


_AGAIN = "the command that began the run, given once more, then writes it anew from the checkpoints"
_TWO = f"delete it, and results.json if there is one: {_AGAIN}"
# What a file of a workdir looks like, and what to do where it does not.
FILES: dict[str, tuple[Shape, str]] = {
    "config.json": (
        object_of(
            {},
            name=text,
            tasks=list_of(object_of({"name": text})),
            phases=list_of(object_of({"name": text, "steps": whole})),
            weighting=text,
            weights=mapping(anything),
            seed=whole,
            evaluation=object_of({}, criterion=text),
        ),
        _TWO,
    ),
    "data.json": (object_of({"sources": mapping(mapping(anything)), "tasks": mapping(object_of({"name": text}))}), _TWO),
    "versions.json": (mapping(anything), _TWO),
    "baselines.json": (mapping(mapping(_SCORES)), f"delete it: {_AGAIN}"),
    "results.json": (lambda value: mapping(anything)(value) or _facts(value), f"delete it: {_AGAIN}"),
    "merge.json": (object_of({}, written=list_of(text)), "merge once more into another directory"),
    "ablation.json": (
        object_of(
            {
                "name": text,
                "runs": list_of(object_of({"run": text, "values": mapping(anything), "program": whole, "status": text})),
                "axes": list_of(object_of({"fields": list_of(text), "values": list_of(list_of(anything))})),
                "programs": list_of(mapping(anything)),
            },
            command=text,
            devices=text,
        ),
        "delete it: the same ablation, started again, goes on from its checkpoints",
    ),
}

MERGED = "merge.json"  # a workdir that holds it was not trained, but put together
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "numpy", "mtl_jax")


def read_json(path: Path, shape: Shape | None = None) -> Any:
    """The parsed file, or None where there is none.

    Args:
        path: The file.
        shape: What it must look like; default: what a file of this name does, see FILES.

    Raises:
        UserError: The file cannot be read, or is not what mtl_jax wrote.
    """
    if not os.path.lexists(path):
        return None
    check_regular(path)
    known, advice = FILES.get(path.name, (anything, ""))
    try:
        value = parse_json(path.read_bytes())
        problem = (shape or known)(value)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {error}"
    if problem:
        raise damaged(path, f"it{problem}" if problem.startswith(" ") else problem, "" if shape else advice)
    return value


def read_results(folder: Path) -> Any:
    """results.json of a workdir, or None; a metric that is not defined is None there, an infinite one a float.

    Raises:
        UserError: It is not what mtl_jax wrote.
    """
    found = read_json(folder / "results.json")
    if found is None:
        return None
    tasks = {
        name: {**task, "baselines": numbers(task["baselines"]), **{split: numbers(task[split]) for split in ("dev", "test")}}
        for name, task in found["tasks"].items()
    }
    return {**found, "tasks": tasks, **{name: numbers(found[name]) for name in ("best_criterion", "seconds")}}


def numbers(scores: Any) -> Any:
    """Scores of a file, in dicts: floats, and None for a metric that is not defined."""
    if isinstance(scores, dict):
        return {name: numbers(each) for name, each in scores.items()}
    return None if scores is None else number_of(scores)


def damaged(path: Path, problem: str, advice: str = "") -> UserError:
    """The error for a file of a workdir that cannot have been written so.

    Args:
        path: The file.
        problem: What is wrong with it.
        advice: What to do; default: what FILES says of a file of this name.
    """
    advice = advice or FILES.get(path.name, (anything, ""))[1]
    return UserError(f"{shown(path)}: not what mtl_jax wrote ({problem[:300]}){'; ' + advice if advice else ''}")


def write_json(path: Path, value: Any) -> None:
    """Writes a file of strict JSON whole or not at all; on host 0 only.

    Raises:
        UserError: It cannot be written.
    """
    if jax.process_index() == 0:
        files.write_json(path, value)


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
    now = json.loads(to_json(config))
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
            with writing(workdir / name):
                (workdir / name).unlink(missing_ok=True)


def check_data(workdir: Path, data: dict[str, Any]) -> None:
    """Compares the data with that which the workdir was begun with.

    Raises:
        UserError: Examples or label sets are not the same: a file has changed since.
    """
    before = read_json(workdir / "data.json")
    if before is None:
        return
    changed = [path for path, _, _ in differences(before, json.loads(to_json(data)))]
    if changed:
        raise UserError(
            f"{workdir} was begun with other data: {', '.join(changed[:5])} changed. Put the files back, choose another "
            "--workdir, or go on with the new data by removing data.json there"
        )


def has_checkpoints(workdir: Path) -> bool:
    """Whether there is any, good or damaged."""
    return bool(checkpoint_files.steps(workdir / "checkpoints"))


def create(workdir: Path) -> None:
    """Makes the directory.

    Raises:
        UserError: It cannot be written.
    """
    with writing(workdir, "choose another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)


def versions() -> dict[str, str]:
    """Python, the packages that numbers depend on, and the devices."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {package: installed(package) for package in PACKAGES}
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
