"""Merges the runs of several workdirs into a workdir."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import pretrained, trunk_compatibility
from mtl_jax.core import staging
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import writing
from mtl_jax.core.row_texts import hiding_if
from mtl_jax.data import corpus as corpora
from mtl_jax.data import made_rows
from mtl_jax.data.corpus import Corpus
from mtl_jax.experiment import Checkpoints
from mtl_jax.inference.predict import is_workdir, open_run
from mtl_jax.merging import checkpoints, inputs
from mtl_jax.merging.inputs import TRUNK, Model, Parts
from mtl_jax.merging.method import Method
from mtl_jax.merging.union import Member, Union, check_adapters, unite
from mtl_jax.sharing.base import Hard
from mtl_jax.training import evaluation, results, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.experiment_json import check_metrics, to_json
from mtl_jax.training.forward import encode_tokens, needed_fields
from mtl_jax.training.train_state import create
from mtl_jax.transfer.adapters import Lora
from mtl_jax.trunks import Trunk

log = logging.getLogger(__name__)


def merge_runs(target: Path, sources: Sequence[str], base: str, method: Method) -> dict[str, Any] | None:
    """Merges the best checkpoints of finished runs into a workdir that predict, evaluate and convert open.

    Args:
        target: The workdir to write, free or to be replaced.
        sources: Workdirs.
        base: A workdir, or a checkpoint that pretrained.load opens; "" for methods without one.
        method: The checked method.

    Returns:
        The contents of its results.json; None where the runs' data is not available to measure on.

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
    inputs.check(start, models)
    lora = [adapter.name for adapter in union.experiment.adapters if isinstance(adapter, Lora)]
    if lora:
        log.warning(
            "%s: the two matrices are merged separately, so their product is not that of merged kernels; to merge "
            "kernels, run mtl-jax convert on the runs and merge the checkpoints",
            ", ".join(lora),
        )
    measure, reason, signatures = None, "", {}
    try:
        corpus = corpus_of(union, members)
        measure = measurer(union, members[0].run.trunk, corpus)
        signatures = {task.name: task.signatures(corpus.splits["test"][task.source].data) for task in union.tasks}
    except UserError as error:
        if method.name == "greedy":
            raise UserError(f"method greedy needs the runs' dev rows: {error}") from error
        reason = str(error)
        log.warning("not measured on dev and test: %s", reason)

    def on_dev(parts: Parts) -> float:
        assert measure is not None
        return criterion(union, measure(params_of(parts), "dev"))

    merged = inputs.merge_models(method, start, models, on_dev)
    params = params_of(merged.parts)
    for part, origin in merged.record["parts"].items():
        log.info("%s: %s", part, origin)
    scores = {split: measure(params, split) for split in ("dev", "test")} if measure else None
    dev = criterion(union, scores["dev"]) if scores else None
    with staging.staged(target) as folder:
        _write(folder, members, union, params, dev)
        written = None
        if scores is not None:
            facts: dict[str, Any] = {"steps": 0, "best_step": 0, "best_criterion": dev}
            facts |= {"seconds": round(time.monotonic() - started, 1)}
            facts |= {"merged": {"method": method.name, "sources": len(members)}}
            written = results.write(folder, union.experiment, union.tasks, scores, signatures, facts)
        inputs.write_record(folder, merged.record | ({"not_measured": reason} if reason else {}))
    return written


def open_member(name: str) -> Member:
    """Opens a finished run, with its parameters on the host.

    Raises:
        UserError: It is not a workdir, or the run is not finished.
    """
    folder = Path(name)
    if not (folder / "results.json").exists() and not (folder / workdirs.MERGED).exists():
        raise UserError(f"{name}: the run is not finished (results.json is missing); the command that started it resumes it")
    run = open_run(folder)
    check_metrics(folder, [run.task(task) for task in run.params["heads"]])  # the result is measured, too
    run = run._replace(params=jax.tree.map(np.asarray, jax.device_get(run.params)))
    return Member(name, run, workdirs.read_json(folder / "data.json"))


def params_of(parts: Parts) -> dict[str, Any]:
    """The parts as parameters {"trunk": ..., "heads": {task: ...}}."""
    return {TRUNK: parts[TRUNK], "heads": {part.removeprefix("heads/"): parts[part] for part in parts if part != TRUNK}}


def _model(member: Member) -> Model:
    run = member.run
    heads = {f"heads/{task}": params for task, params in run.params["heads"].items()}
    facts = {"path": member.name, "step": run.step, "dev": run.dev, "criterion": run.experiment.evaluation.criterion}
    facts |= {"experiment": run.experiment.name, "seed": run.experiment.seed}
    return Model(member.name, {TRUNK: run.params[TRUNK], **heads}, trunk_compatibility.of_trunk(run.trunk), facts)


def _base(name: str, members: Sequence[Member], union: Union) -> Model:
    """The base: the trunk of a checkpoint, or the trunk of a run with its heads for tasks of the merged runs."""
    if is_workdir(Path(name)):
        member = open_member(name)
        check_adapters(members[0], member)
        model = _model(member)
        heads = {f"heads/{task.name}" for task in union.tasks if task in member.run.tasks}
        return model._replace(parts={part: params for part, params in model.parts.items() if part in (TRUNK, *heads)})
    declared = {getattr(member.run.experiment.trunk, "path", "none, it is from scratch") for member in members}
    if declared != {name}:
        log.warning("the sources started from the trunk %s; the base, %s, must be the same", ", ".join(declared), name)
    adapters = [adapter.name for adapter in union.experiment.adapters]
    if adapters:
        raise UserError(
            f"{name} is a checkpoint without adapters, but {members[0].name} has {listed(adapters)}: mtl-jax convert merges "
            "Lora and IA3 into the kernels, and such checkpoints can be merged; or give a run as --base"
        )
    sharing = union.experiment.sharing
    if not isinstance(sharing, Hard):
        raise UserError(
            f"{name} is a checkpoint, but the tasks of {members[0].name} share its trunk by {type(sharing).__name__}; give a "
            "run as --base"
        )
    checkpoint = pretrained.load(name, head=None)
    model = checkpoints.model(name, checkpoint)
    return model._replace(parts={TRUNK: model.parts[TRUNK]})


def _write(folder: Path, members: Sequence[Member], union: Union, params: Mapping[str, Any], dev: float | None) -> None:
    """Writes the files that opening the workdir needs, and the baselines of the runs."""
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
        store.save(0, state, {"step": 0}, 0.0 if dev is None else dev)  # the only checkpoint is the best one, measured or not
        store.wait()


# (params, split) -> {task: {metric: value}}
Measure = Callable[[Mapping[str, Any], str], dict[str, dict[str, float]]]


@hiding_if(lambda union, members: union.experiment.private)
def corpus_of(union: Union, members: Sequence[Member]) -> Corpus:
    """Reads the runs' data again.

    Raises:
        UserError: It is not available any more, or has changed.
    """
    experiment, tokenizer = union.experiment, members[0].run.trunk.tokenizer
    data = corpora.read_sources(experiment.sources, union.tasks)
    data = made_rows.add(experiment.sources, union.tasks, data, experiment.augment).data
    corpus = corpora.make_corpus(experiment.sources, union.tasks, data, tokenizer, experiment.batch.row_length)
    for name, current in corpus.describe()["sources"].items():
        recorded = union.data["sources"][name]
        for split in ("dev", "test"):
            # The hash includes labels, and so depends on the tasks that were trained together.
            changed = current[split] != recorded[split]
            if changed if union.same else current[split]["examples"] != recorded[split]["examples"]:
                raise UserError(f"source {name!r} has other {split} rows than when {members[0].name} was trained")
        # Reading all sources together drops training rows that occur in dev or test of another source.
        leaked = recorded["train"]["examples"] - current["train"]["examples"]
        if leaked > 0 and not union.same:
            log.warning(
                "source %s: %d of its training rows occur in dev or test of another source, and a run has trained on them: "
                "scores on that source may be too high",
                name,
                leaked,
            )
    return corpus


def measurer(union: Union, trunk: Trunk, corpus: Corpus) -> Measure:
    """A function that measures parameters as at the end of training, on one device."""
    batching, tasks = union.experiment.batch, union.tasks
    mesh = meshes.make(batching.rows, 1)
    apply = evaluation.make_outputs(encode_tokens(trunk.module, needed_fields(tasks)), tasks, mesh)

    def measure(params: Mapping[str, Any], split: str) -> dict[str, dict[str, float]]:
        data = corpus.splits[split]
        placed = meshes.place(params, meshes.replicated(mesh))
        outputs = evaluation.predict(apply, placed, tasks, list(data.values()), batching, mesh)
        texts = text_evaluation.text_scores(tasks, trunk, placed, data, lambda task: task.beams)
        return evaluation.score(tasks, data, outputs, texts)

    return measure


def criterion(union: Union, scores: dict[str, dict[str, float]]) -> float:
    """The criterion of the merged experiment for dev scores."""
    return evaluation.criterion(union.experiment.evaluation.criterion, union.tasks, scores)
