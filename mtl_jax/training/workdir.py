"""The JSON files of a workdir: their shapes, how they are read, checked against the current run, and written."""

from __future__ import annotations

import json
import os
import platform
import re
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

ANY_VALUE = ("sharding", "remat")  # fields of config.json that a run may change when it resumes: they change no number
# Fields of config.json that name a place: of what is there, the hash counts.
PLACES = re.compile(r"parts\..*\.file|sources\.\d+\.(dev_|test_)?rows\.rows")
MERGED = "merge.json"  # in a workdir that was not trained, but merged from others
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "numpy", "mtl_jax")

_SCORES = mapping(number)
_REWRITTEN = "the command that began the run then writes it anew from the checkpoints"
_WITH_RESULTS = f"delete it, and results.json if there is one: {_REWRITTEN}"


def _task(value: Any) -> str:
    """A task of results.json."""
    fields = {"metric": text, "dev": _SCORES, "test": _SCORES, "baselines": mapping(_SCORES)}
    problem = object_of(fields, test_without_copies=_SCORES, test_copies=mapping(whole))(value)
    if problem:
        return problem
    scores_of = {"dev": value["dev"], "test": value["test"], **value["baselines"]}
    incomplete = [name for name, scores in scores_of.items() if value["metric"] not in scores]
    return f"{incomplete[0]} lacks {value['metric']}" if incomplete else ""


def _facts(value: Any) -> str:
    """The fields of results.json beside its tasks, of a run that was trained or merged."""
    if "merged" in value:
        fields = {"merged": object_of({"sources": whole, "method": text})}
    else:
        fields = {"seed": whole, "weighting": text, "best_step": whole, "steps": whole}
    common = {"experiment": text, "best_criterion": number, "seconds": number, "versions": object_of({"devices": text})}
    return object_of({"tasks": mapping(_task), **common, **fields})(value)


# {file: (its shape, the advice where it has another)}
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
        _WITH_RESULTS,
    ),
    "data.json": (
        object_of({"sources": mapping(mapping(anything)), "tasks": mapping(object_of({"name": text}))}),
        _WITH_RESULTS,
    ),
    "versions.json": (mapping(anything), _WITH_RESULTS),
    "baselines.json": (mapping(mapping(_SCORES)), f"delete it: {_REWRITTEN}"),
    "results.json": (lambda value: mapping(anything)(value) or _facts(value), f"delete it: {_REWRITTEN}"),
    "loggers.json": (mapping(mapping(anything)), "delete it: loggers then begin a new record of the run"),
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
        "delete it: the same ablation, started again, resumes from its checkpoints",
    ),
}


def read_json(path: Path, shape: Shape | None = None) -> Any:
    """The parsed file; None where there is none.

    Args:
        path: The file.
        shape: The shape that it must have; default: that of a file of this name, see FILES.

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
    """results.json of a workdir; None where there is none. A metric that is not defined is None, an infinite one a float.

    Raises:
        UserError: It is not what mtl_jax wrote.
    """
    results = read_json(folder / "results.json")
    if results is None:
        return None
    measured = ("dev", "test", "baselines", "test_without_copies")
    tasks = {
        name: {**task, **{part: numbers(task[part]) for part in measured if part in task}}
        for name, task in results["tasks"].items()
    }
    return {**results, "tasks": tasks, **{name: numbers(results[name]) for name in ("best_criterion", "seconds")}}


def numbers(scores: Any) -> Any:
    """Scores of a JSON file, in nested dicts, as floats; None for a metric that is not defined."""
    if isinstance(scores, dict):
        return {name: numbers(score) for name, score in scores.items()}
    return None if scores is None else number_of(scores)


def damaged(path: Path, problem: str, advice: str = "") -> UserError:
    """The error for a file of a workdir that mtl_jax did not write in this form.

    Args:
        path: The file.
        problem: Its first fault.
        advice: What to do; default: that of FILES for a file of this name.
    """
    advice = advice or FILES.get(path.name, (anything, ""))[1]
    return UserError(f"{shown(path)}: not what mtl_jax wrote ({problem[:300]}){'; ' + advice if advice else ''}")


def write_json(path: Path, value: Any) -> None:
    """Writes a file of strict JSON, whole or not at all; on host 0 only.

    Raises:
        UserError: It cannot be written.
    """
    if jax.process_index() == 0:
        files.write_json(path, value)


def check_writable(workdir: Path) -> None:
    """Checks, without writing anything, that the workdir can be made and written.

    Raises:
        UserError: It cannot.
    """
    try:
        existing = workdir.resolve()
        while not existing.exists():
            existing = existing.parent
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror}); choose another --workdir") from error
    if not existing.is_dir():
        raise UserError(f"{workdir}: cannot be a workdir, {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{workdir}: cannot be written (no permission for {existing}); choose another --workdir")


def config_changed(
    workdir: Path, config: dict[str, Any], allow_change: bool, complete: Callable[[Any], Any] = lambda values: values
) -> bool:
    """Whether the workdir was begun with another configuration.

    Args:
        workdir: The workdir.
        config: The current configuration.
        allow_change: Whether it may differ.
        complete: Adds to an earlier configuration the fields that did not exist then, with the values then in effect.

    Raises:
        UserError: It was, and allow_change is not set. The message shows the old and new value of each field.
    """
    first_config = read_json(workdir / "config.json")
    if first_config is None:
        return False
    current = json.loads(to_json(config))
    changes = [
        f"{name} was {old}, is {new}"
        for name, old, new in differences(complete(first_config), current)
        if name not in ANY_VALUE and not PLACES.fullmatch(name)
    ]
    changes = [_rows_changed(change, current) for change in changes]
    if changes and not allow_change:
        raise UserError(
            f"{workdir} was begun with another configuration: {'; '.join(changes)}. "
            "Choose another --workdir, or continue with the new one by --allow-config-change"
        )
    return bool(changes)


def _rows_changed(change: str, config: dict[str, Any]) -> str:
    """The line on a changed field; where it is the hash of rows that a script gives, it names their source."""
    place = re.match(r"sources\.(\d+)\.((?:dev_|test_)?rows)\.sha256 (.*)", change)
    if place is None:
        return change
    return f"source {config['sources'][int(place[1])]['name']}: {place[2]} changed (their SHA-256 {place[3]})"


def remove_results(workdir: Path) -> None:
    """Removes the results, baselines and figure of an earlier configuration."""
    if jax.process_index() == 0:
        for name in ("results.json", "baselines.json", "curves.png"):
            with writing(workdir / name):
                (workdir / name).unlink(missing_ok=True)


def check_data(workdir: Path, data: dict[str, Any], with_defaults: Callable[[Any], Any]) -> None:
    """Checks that the data are the same as when the workdir was begun.

    Args:
        workdir: The workdir.
        data: The contents of data.json for the present data.
        with_defaults: Completes what an earlier version wrote into data.json by the fields that are newer.

    Raises:
        UserError: Examples or label sets are not the same: a file has changed since.
    """
    first_data = read_json(workdir / "data.json")
    if first_data is None:
        return
    # The numbers of copies follow from the rows, and earlier versions did not count them.
    stored, current = (
        {name: value for name, value in values.items() if name != "copies"} for values in (with_defaults(first_data), data)
    )
    changed = [path for path, _, _ in differences(stored, json.loads(to_json(current)))]
    if changed:
        raise UserError(
            f"{workdir} was begun with other data: {', '.join(changed[:5])} changed. Put the files back, choose another "
            "--workdir, or continue with the new data by removing data.json there"
        )


def has_checkpoints(workdir: Path) -> bool:
    """Whether the workdir has a checkpoint, damaged or not."""
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
    version_of = {"python": platform.python_version(), "platform": platform.platform()}
    version_of |= {package: installed(package) for package in PACKAGES}
    devices = jax.devices()
    # The cores that this process may use, where the system has such a limit.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    version_of["devices"] = f"{len(devices)} x {devices[0].device_kind}, {count(cores or 0, 'CPU core')}"
    return version_of


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(field, old value, new value) where two parsed JSON files differ: fields as flags write them, values as JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key, "absent"), new.get(key, "absent"), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}.{i}")
    elif old != new:
        yield path, json.dumps(old), json.dumps(new)
