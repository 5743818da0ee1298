"""Workdirs merged into a workdir."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import pretrained, staging
from mtl_jax.errors import UserError
from mtl_jax.experiment import Checkpoints, to_json
from mtl_jax.merge import alike, measuring, parts
from mtl_jax.merge.method import WITHOUT_BASE, Method
from mtl_jax.merge.parts import TRUNK, Merged, Model
from mtl_jax.merge.union import Member, Union, unite
from mtl_jax.prediction import is_workdir, open_run
from mtl_jax.training import results
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint import Store
from mtl_jax.training.state import create

log = logging.getLogger(__name__)

RECORD = "merge.json"


def merge_runs(target: Path, sources: Sequence[str], base: str, method: Method) -> dict[str, Any] | None:
    """Merges the best checkpoints of finished runs into a workdir that predict, evaluate and convert open.

    Args:
        target: The workdir to write, free or to be replaced.
        sources: Workdirs.
        base: A workdir, or a checkpoint that pretrained.load opens; "" for methods without one.
        method: How, checked.

    Returns:
        The contents of its results.json; None where the data is not there to measure on.

    Raises:
        UserError: A workdir is not finished, the runs do not fit together, or greedy has no data to measure on.
    """
    started = time.monotonic()
    members = tuple(open_member(name) for name in sources)
    union = unite(members, method.name)
    if method.name == "greedy" and not union.same:
        raise UserError("method greedy measures every source on dev, so all must have the same tasks; use soup")
    models = [_model(member) for member in members]
    start = _base(base, members, union) if base else None
    trunks = [(member.name, alike.of_run(member.run)) for member in members]
    alike.check_family([*([(base, start[1])] if start else []), *trunks])
    parts.check(start and start[0], models)
    alike.check_constants([*([(base, start[1])] if start else []), *trunks])
    measure, reason = None, ""
    try:
        measure = measuring.measurer(union, members[0].run.trunk, measuring.corpus_of(union, members))
    except UserError as error:
        if method.name == "greedy":
            raise UserError(f"method greedy needs the runs' dev rows: {error}") from error
        reason = str(error)

    def on_dev(found: parts.Parts) -> float:
        assert measure is not None
        return measuring.criterion(union, measure(params_of(found), "dev"))

    merged = parts.put_together(method, start and start[0], models, on_dev)
    for part, how in merged.how.items():
        log.info("%s: %s", part, how)
    record = record_of(method, models, start and start[0], merged)
    params = params_of(merged.parts)
    scores = {split: measure(params, split) for split in ("dev", "test")} if measure else None
    with staging.staged(target) as folder:
        if scores is None:
            log.warning("not measured on dev and test: %s", reason)
        dev = measuring.criterion(union, scores["dev"]) if scores else None
        _write(folder, members, union, params, dev)
        workdirs.write_json(folder / RECORD, {**record, "measured": scores is not None, **({"why": reason} if reason else {})})
        if scores is None:
            return None
        facts = {
            "steps": 0,
            "best_step": 0,
            "best_criterion": dev,
            "seconds": round(time.monotonic() - started, 1),
            "merged": {"method": method.name, "sources": len(members)},
        }
        return results.write(folder, union.experiment, union.tasks, scores, facts)


def open_member(name: str) -> Member:
    """A finished run, parameters on the host.

    Raises:
        UserError: It is no workdir, or not finished.
    """
    folder = Path(name)
    if not is_workdir(folder):
        raise UserError(f"{name}: no workdir of a run (config.json or data.json is missing)")
    if not (folder / "results.json").exists() and not (folder / RECORD).exists():
        raise UserError(f"{name}: the run is not finished (results.json is missing); the command that began it goes on with it")
    run = open_run(folder)
    run = run._replace(params=jax.tree.map(np.asarray, jax.device_get(run.params)))
    return Member(name, run, workdirs.read_json(folder / "data.json"))


def params_of(found: parts.Parts) -> dict[str, Any]:
    """{"trunk": ..., "heads": {task: ...}} of the parts."""
    heads = {part.removeprefix("heads/"): tree for part, tree in found.items() if part != TRUNK}
    return {"trunk": found[TRUNK], "heads": heads}


def _model(member: Member, tasks: Sequence[str] | None = None) -> Model:
    heads = {f"heads/{name}": tree for name, tree in member.run.params["heads"].items() if tasks is None or name in tasks}
    facts = {"path": member.name, "step": member.run.step, "dev": member.run.dev}
    facts |= {"criterion": member.run.experiment.evaluation.criterion, "seed": member.run.experiment.seed}
    return Model(member.name, {TRUNK: member.run.params["trunk"], **heads}, facts)


def _base(name: str, members: Sequence[Member], union: Union) -> tuple[Model, alike.Trunk]:
    """The base: a run with its heads for those of the tasks that it has, too, or the trunk of a checkpoint."""
    if is_workdir(Path(name)):
        member = open_member(name)
        own = {task.name: task for task in member.run.tasks}
        known = [task.name for task in union.tasks if own.get(task.name) == task]
        return _model(member, known), alike.of_run(member.run)
    declared = {getattr(member.run.experiment.trunk, "path", "") for member in members}
    if declared != {name}:
        log.warning(
            "the sources name the trunk %s, and the base is %s: it must be what they started from", _listed(declared), name
        )
    checkpoint = pretrained.load(name, head=None)
    trunk = jax.tree.map(np.asarray, jax.device_get(checkpoint.params["trunk"]))
    facts = {"path": name, "files": alike.digests(checkpoint.location)}
    return Model(name, {TRUNK: trunk}, facts), alike.of_checkpoint(checkpoint)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(name or "from scratch" for name in names))


def record_of(method: Method, models: Sequence[Model], base: Model | None, merged: Merged) -> dict[str, Any]:
    """What merge.json holds."""
    return {
        "method": method.describe(),
        "sources": [model.facts for model in models],
        **({} if method.name in WITHOUT_BASE or base is None else {"base": base.facts}),
        "parts": merged.how,
        **merged.facts,
    }


def _write(folder: Path, members: Sequence[Member], union: Union, params: Mapping[str, Any], dev: float | None) -> None:
    """Everything that opening the workdir needs, and the baselines that the runs were compared with."""
    shutil.copytree(Path(members[0].name) / "trunk", folder / "trunk")
    baselines: dict[str, Any] = {}
    for member in reversed(members):
        baselines |= workdirs.read_json(Path(member.name) / "baselines.json") or {}
    files = {"config": to_json(union.experiment), "data": union.data, "versions": workdirs.versions(), "baselines": baselines}
    for name, value in files.items():
        workdirs.write_json(folder / f"{name}.json", value)
    store = Store(folder, Checkpoints(keep=1), criterion=union.experiment.evaluation.criterion)
    with contextlib.closing(store):
        state = create(params, (), (), union.experiment.seed)
        # The only checkpoint is the best one, measured or not.
        store.save(0, jax.tree.map(jnp.asarray, state), {"step": 0}, 0.0 if dev is None else dev)
        store.wait()
