"""A finished or running workdir as a model: texts in, predictions out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mtl_jax import trunks
from mtl_jax.data.examples import Examples, tokenize
from mtl_jax.errors import UserError, unknown
from mtl_jax.experiment import Experiment, from_json, select
from mtl_jax.tasks import Task
from mtl_jax.training import evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint import Store
from mtl_jax.training.prepare import with_labels
from mtl_jax.training.step import encode_tokens
from mtl_jax.trunks import Trunk


class Run(NamedTuple):
    """A run as a model.

    Attributes:
        experiment: Its configuration, tasks selected.
        tasks: Its tasks with their label sets.
        trunk: The trunk; its parameters are in params.
        params: {"trunk": ..., "heads": {task: ...}} of the best checkpoint, on the first device.
    """

    experiment: Experiment
    tasks: tuple[Task, ...]
    trunk: Trunk
    params: Any

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            UserError: There is none.
        """
        found = {task.name: task for task in self.tasks}
        if name not in found:
            raise unknown("task", name, found)
        return found[name]


def is_workdir(folder: Path) -> bool:
    """Whether a directory was written by a run."""
    return (folder / "data.json").exists() and (folder / "config.json").exists()


def open_run(folder: Path) -> Run:
    """The best checkpoint of a run.

    Raises:
        UserError: The directory is no workdir, or has no checkpoint yet.
    """
    config, data = workdirs.read_json(folder / "config.json"), workdirs.read_json(folder / "data.json")
    if config is None or data is None:
        raise UserError(f"{folder}: no workdir of a run (config.json or data.json is missing)")
    experiment = select(from_json(config))
    tasks = with_labels(experiment, data["labels"])
    trunk = trunks.reopen(experiment.trunk, folder / "trunk", meshes.compute_dtype(experiment.dtype))
    return Run(experiment, tasks, trunk, _best_params(folder, experiment))


def predict(workdir: str | Path, task: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Predictions of the best checkpoint of a run.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint.
        task: A task of that run.
        texts: Any number of texts; an empty one gets {"error": ...}.

    Returns:
        One JSON object for each text, in order: label and probability, or value. "truncated": true is added where a text
        was longer than the model's rows.

    Raises:
        UserError: The directory is no workdir, has no checkpoint yet, or the task is unknown.
    """
    run = open_run(Path(workdir))
    one, batch = (run.task(task),), run.experiment.batch
    tokens, too_long = tokenize(run.trunk.tokenizer, texts, batch.row_length)
    cut = set(too_long)
    known = [i for i, text in enumerate(texts) if text.strip() and len(tokens[i])]
    results: list[dict[str, Any]] = [{"error": "empty text"} for _ in texts]
    if not known:
        return results
    mesh = meshes.make(batch.rows, 1)
    apply = evaluation.make_outputs(encode_tokens(run.trunk.module), one, mesh)
    examples = Examples("input", 0, [tokens[i] for i in known], {})
    outputs = evaluation.run(apply, run.params, [examples], batch, mesh)[task]
    for i, outputs_O in zip(known, outputs, strict=True):
        results[i] = one[0].describe(outputs_O)
        if i in cut:
            results[i]["truncated"] = True
    return results


def _best_params(folder: Path, experiment: Experiment) -> Any:
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: there is no checkpoint yet")
    store = Store(folder, experiment.checkpoints, read_only=True)
    try:
        best = store.best(store.restore_params)
        if best is None:
            raise UserError(f"{folder}: there is no readable checkpoint that has been evaluated on dev")
        return jax.device_put(best.value, jax.devices()[0])
    finally:
        store.close()
