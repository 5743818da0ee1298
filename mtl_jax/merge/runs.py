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

from mtl_jax import kin, pretrained, staging
from mtl_jax.errors import UserError, listed
from mtl_jax.experiment import Checkpoints, to_json
from mtl_jax.files import writing
from mtl_jax.merge import checkpoints, measuring, parts
from mtl_jax.merge.method import Method
from mtl_jax.merge.parts import TRUNK, Model, Parts
from mtl_jax.merge.union import Member, Union, check_adapters, unite
from mtl_jax.prediction import is_workdir, open_run
from mtl_jax.training import results
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint import Store
from mtl_jax.training.state import create
from mtl_jax.transfer.adapters import Lora

log = logging.getLogger(__name__)


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
    members = [open_member(name) for name in sources]
    union = unite(members, method.name)
    if method.name == "greedy" and not union.same:
        raise UserError("method greedy measures every source on dev, so all must have the same tasks; use soup")
    models = [_model(member) for member in members]
    start = _base(base, members, union) if base else None
    parts.check(start, models)
    lora = [adapter.name for adapter in union.experiment.adapters if isinstance(adapter, Lora)]
    if lora:
        log.warning(
            "%s: each of the two matrices is merged by itself, and their product is not what the kernels merged would be: for "
            "that, mtl-jax convert the runs and merge the checkpoints",
            ", ".join(lora),
        )
    measure, reason, signatures = None, "", {}
    try:
        corpus = measuring.corpus_of(union, members)
        measure = measuring.measurer(union, members[0].run.trunk, corpus)
        signatures = {task.name: task.signatures(corpus.splits["test"][task.source].data) for task in union.tasks}
    except UserError as error:
        if method.name == "greedy":
            raise UserError(f"method greedy needs the runs' dev rows: {error}") from error
        reason = str(error)
        log.warning("not measured on dev and test: %s", reason)

    def on_dev(found: Parts) -> float:
        assert measure is not None
        return measuring.criterion(union, measure(params_of(found), "dev"))

    merged = parts.put_together(method, start, models, on_dev)
    params = params_of(merged.parts)
    for part, how in merged.record["parts"].items():
        log.info("%s: %s", part, how)
    scores = {split: measure(params, split) for split in ("dev", "test")} if measure else None
    dev = measuring.criterion(union, scores["dev"]) if scores else None
    with staging.staged(target) as folder:
        _write(folder, members, union, params, dev)
        found = None
        if scores is not None:
            facts: dict[str, Any] = {"steps": 0, "best_step": 0, "best_criterion": dev}
            facts |= {"seconds": round(time.monotonic() - started, 1)}
            facts |= {"merged": {"method": method.name, "sources": len(members)}}
            found = results.write(folder, union.experiment, union.tasks, scores, signatures, facts)
        parts.write_record(folder, merged.record | ({"not_measured": reason} if reason else {}))
    return found


def open_member(name: str) -> Member:
    """A finished run, its parameters on the host.

    Raises:
        UserError: It is no workdir, or not finished.
    """
    folder = Path(name)
    if not (folder / "results.json").exists() and not (folder / workdirs.MERGED).exists():
        raise UserError(f"{name}: the run is not finished (results.json is missing); the command that began it goes on with it")
    run = open_run(folder)
    run = run._replace(params=jax.tree.map(np.asarray, jax.device_get(run.params)))
    return Member(name, run, workdirs.read_json(folder / "data.json"))


def params_of(found: Parts) -> dict[str, Any]:
    """{"trunk": ..., "heads": {task: ...}} of the parts."""
    return {TRUNK: found[TRUNK], "heads": {part.removeprefix("heads/"): found[part] for part in found if part != TRUNK}}


def _model(member: Member) -> Model:
    run = member.run
    heads = {f"heads/{task}": params for task, params in run.params["heads"].items()}
    facts = {"path": member.name, "step": run.step, "dev": run.dev, "criterion": run.experiment.evaluation.criterion}
    facts |= {"experiment": run.experiment.name, "seed": run.experiment.seed}
    return Model(member.name, {TRUNK: run.params[TRUNK], **heads}, kin.of_trunk(run.trunk), facts)


def _base(name: str, members: Sequence[Member], union: Union) -> Model:
    """The base: the trunk of a checkpoint; or a run, with its heads for those of the tasks that it has, too."""
    if is_workdir(Path(name)):
        member = open_member(name)
        check_adapters(members[0], member)
        model = _model(member)
        known = {f"heads/{task.name}" for task in union.tasks if task in member.run.tasks}
        return model._replace(parts={part: params for part, params in model.parts.items() if part in (TRUNK, *known)})
    declared = {getattr(member.run.experiment.trunk, "path", "none, it began from scratch") for member in members}
    if declared != {name}:
        log.warning(
            "the sources name as their trunk %s: the base, %s, must be what they started from", ", ".join(declared), name
        )
    adapters = [adapter.name for adapter in union.experiment.adapters]
    if adapters:
        raise UserError(
            f"{name} is a checkpoint without adapters, and {members[0].name} has {listed(adapters)}: mtl-jax convert puts "
            "Lora and IA3 into the kernels, and such checkpoints can be merged; or let --base be a run"
        )
    checkpoint = pretrained.load(name, head=None)
    model = checkpoints.model(name, checkpoint)
    return model._replace(parts={TRUNK: model.parts[TRUNK]})


def _write(folder: Path, members: Sequence[Member], union: Union, params: Mapping[str, Any], dev: float | None) -> None:
    """What opening the workdir needs, and the baselines that the runs were compared with."""
    with writing(folder):
        shutil.copytree(Path(members[0].name) / "trunk", folder / "trunk")
    baselines: dict[str, Any] = {}
    for member in reversed(members):
        baselines |= workdirs.read_json(Path(member.name) / "baselines.json") or {}
    files = {"config": to_json(union.experiment), "data": union.data, "versions": workdirs.versions(), "baselines": baselines}
    for name, value in files.items():
        workdirs.write_json(folder / f"{name}.json", value)
    state = jax.tree.map(jnp.asarray, create(params, (), (), union.experiment.seed))
    store = Store(folder, Checkpoints(keep=1), criterion=union.experiment.evaluation.criterion)
    with contextlib.closing(store):
        store.save(0, state, {"step": 0}, 0.0 if dev is None else dev)  # the only one is the best one, measured or not
        store.wait()
