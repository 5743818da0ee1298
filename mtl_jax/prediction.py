"""A finished or running workdir as a model: texts in, predictions out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mtl_jax import trunks
from mtl_jax.data.examples import Examples, tokenize
from mtl_jax.errors import UserError, unknown
from mtl_jax.experiment import from_json, select
from mtl_jax.training import evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint import Store
from mtl_jax.training.prepare import with_labels
from mtl_jax.training.step import encode_tokens


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
    folder = Path(workdir)
    config, data = workdirs.read_json(folder / "config.json"), workdirs.read_json(folder / "data.json")
    if config is None or data is None:
        raise UserError(f"{folder}: no workdir of a run (config.json or data.json is missing)")
    experiment = select(from_json(config))
    names = [t.name for t in experiment.tasks]
    if task not in names:
        raise unknown("task", task, names)
    one = (with_labels(experiment, data["labels"])[names.index(task)],)
    trunk = trunks.reopen(experiment.trunk, folder / "trunk", meshes.compute_dtype(experiment.dtype))
    params = _best_params(folder, experiment)
    tokens, too_long = tokenize(trunk.tokenizer, texts, experiment.batch.row_length)
    cut = set(too_long)
    known = [i for i, text in enumerate(texts) if text.strip() and len(tokens[i])]
    results: list[dict[str, Any]] = [{"error": "empty text"} for _ in texts]
    if not known:
        return results
    mesh = meshes.make(experiment.batch.rows, 1)
    apply = evaluation.make_outputs(encode_tokens(trunk.module), one, mesh)
    examples = Examples("input", 0, [tokens[i] for i in known], {})
    outputs = evaluation.run(apply, params, [examples], experiment.batch, mesh)[task]
    for i, outputs_O in zip(known, outputs, strict=True):
        results[i] = one[0].describe(outputs_O)
        if i in cut:
            results[i]["truncated"] = True
    return results


def _best_params(folder: Path, experiment: Any) -> Any:
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
