"""Merges Hugging Face checkpoints into one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax import pretrained, trunk_compatibility
from mtl_jax.core import digests
from mtl_jax.core.errors import UserError, listed
from mtl_jax.inference.predict import is_workdir
from mtl_jax.merging import inputs
from mtl_jax.merging.inputs import Model
from mtl_jax.merging.method import Method
from mtl_jax.pretrained import Checkpoint, saving
from mtl_jax.pretrained.family import LABELLED
from mtl_jax.pretrained.tensor_files import Location

log = logging.getLogger(__name__)


def merge_checkpoints(target: Path, sources: Sequence[str], base: str, method: Method, *, trunk_only: bool = False) -> None:
    """Merges checkpoints of one family into a directory that transformers opens.

    Args:
        target: The directory to write, free or to be replaced.
        sources: Checkpoints that pretrained.load opens.
        base: A further checkpoint; "" for methods without a base. Its head is used if it is of the same kind as the sources'.
        method: The checked method; not greedy.
        trunk_only: Whether heads are left out and the bare model is written.

    Raises:
        UserError: A checkpoint cannot be read, or the checkpoints do not fit together.
    """
    if method.name == "greedy":
        raise UserError("method greedy measures on dev, so its sources must be workdirs of runs")
    if base and is_workdir(Path(base)):
        raise UserError(f"{base} is a workdir, but the sources are checkpoints; mtl-jax convert makes one of it")
    first, *others = loaded = [_load(source, trunk_only) for source in sources]
    for name, other in zip(sources[1:], others, strict=True):
        if first.raw.get("model_type") == other.raw.get("model_type") and _head(other) != _head(first):
            raise UserError(
                f"{name}: its head is {_named(other)}, and that of {sources[0]} is {_named(first)}: their mean has no "
                "meaning; --trunk-only merges the trunks alone"
            )
    models = [model(name, checkpoint) for name, checkpoint in zip(sources, loaded, strict=True)]
    start = None
    if base:
        checkpoint = _load(base, trunk_only)
        start = model(base, checkpoint)
        if _head(checkpoint) != _head(first):
            start = start._replace(parts={part: params for part, params in start.parts.items() if part != "head"})
    inputs.check(start, models)
    merged = inputs.merge_models(method, start, models)
    for part, origin in merged.record["parts"].items():
        log.info("%s: %s", part, origin)

    written = dataclasses.replace(first, params={**first.params, **merged.parts})
    saving.save(target, written, overwrite=True, finish=lambda folder: inputs.write_record(folder, merged.record))


def model(name: str, checkpoint: Checkpoint) -> Model:
    """A checkpoint as a Model, without parts that its file lacks, such as the pooler of a tagger."""
    fresh = {path.split("/")[0] for path in checkpoint.initialized}
    parts = {part: jax.tree.map(np.asarray, params) for part, params in checkpoint.params.items() if part not in fresh}
    return Model(
        name, parts, trunk_compatibility.of_checkpoint(checkpoint), {"path": name, "files": _file_digests(checkpoint.location)}
    )


def _load(path: str, trunk_only: bool) -> Checkpoint:
    """A checkpoint with its parameters on the host."""
    checkpoint = pretrained.load(path, head=None) if trunk_only else pretrained.load(path)
    return dataclasses.replace(checkpoint, params=jax.tree.map(np.asarray, jax.device_get(checkpoint.params)))


def _file_digests(location: Location) -> dict[str, str]:
    """SHA-256 of each file with tensors in a checkpoint's directory, by name."""
    files: list[Any] = [file for file in location.iterdir() if file.name.endswith((".safetensors", ".bin"))]
    return {file.name: digests.of_file(file) for file in sorted(files, key=lambda file: file.name)}


def _head(checkpoint: Checkpoint) -> tuple[str | None, tuple[str, ...]]:
    return checkpoint.head, checkpoint.labels if checkpoint.head in LABELLED else ()


def _named(checkpoint: Checkpoint) -> str:
    kind, labels = _head(checkpoint)
    return f"{kind} ({listed(labels)})" if labels else str(kind or "none")
