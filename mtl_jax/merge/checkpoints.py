"""Hugging Face checkpoints merged into one."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from mtl_jax import pretrained
from mtl_jax.errors import UserError
from mtl_jax.merge import alike, parts
from mtl_jax.merge.method import Method
from mtl_jax.merge.parts import Model
from mtl_jax.merge.runs import RECORD, record_of
from mtl_jax.prediction import is_workdir
from mtl_jax.pretrained import Checkpoint, saving
from mtl_jax.pretrained.family import LABELLED

log = logging.getLogger(__name__)


def merge_checkpoints(target: Path, sources: Sequence[str], base: str, method: Method, *, trunk_only: bool = False) -> None:
    """Merges checkpoints of one family into a directory that transformers opens.

    Args:
        target: The directory to write, free or to be replaced.
        sources: Checkpoints that pretrained.load opens.
        base: One more; "" for methods without one. Its head counts where it is of the sources' kind.
        method: How, checked; not greedy.
        trunk_only: Leave the heads out, and write the bare model.

    Raises:
        UserError: A checkpoint cannot be read, or they do not fit together.
    """
    if method.name == "greedy":
        raise UserError("method greedy measures on dev: its sources are workdirs of runs")
    if base and is_workdir(Path(base)):
        raise UserError(f"--base {base} is a workdir, and the sources are checkpoints; mtl-jax convert writes its trunk as one")
    loaded = [_load(source, trunk_only) for source in sources]
    start = _load(base, trunk_only) if base else None
    names = [*([base] if start else []), *sources]
    trunks = [
        (name, alike.of_checkpoint(found)) for name, found in zip(names, [*([start] if start else []), *loaded], strict=True)
    ]
    alike.check_family(trunks)
    _check_heads(sources, loaded)
    models = [_model(name, checkpoint) for name, checkpoint in zip(sources, loaded, strict=True)]
    origin = None
    if start is not None:
        origin = _model(base, start, with_head=_head(start) == _head(loaded[0]))
    parts.check(origin, models)
    alike.check_constants(trunks)
    merged = parts.put_together(method, origin, models)
    for part, how in merged.how.items():
        log.info("%s: %s", part, how)
    record = record_of(method, models, origin, merged)
    params = dict(loaded[0].params) | dict(merged.parts)

    def add_record(folder: Path) -> None:
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    saving.save(target, dataclasses.replace(loaded[0], params=params), overwrite=True, finish=add_record)


def _load(path: str, trunk_only: bool) -> Checkpoint:
    """A checkpoint with its parameters on the host."""
    found = pretrained.load(path, head=None) if trunk_only else pretrained.load(path)
    return dataclasses.replace(found, params=jax.tree.map(np.asarray, jax.device_get(found.params)))


def _model(name: str, checkpoint: Checkpoint, with_head: bool = True) -> Model:
    """Its parts; what the file does not have, such as the pooler of a tagger, is none."""
    fresh = {path.split("/")[0] for path in checkpoint.initialized}
    left_out = fresh if with_head else fresh | {"head"}
    found = {part: tree for part, tree in checkpoint.params.items() if part not in left_out}
    return Model(name, found, {"path": name, "files": alike.digests(checkpoint.location)})


def _head(checkpoint: Checkpoint) -> tuple[str | None, tuple[str, ...]]:
    return checkpoint.head, checkpoint.labels if checkpoint.head in LABELLED else ()


def _check_heads(names: Sequence[str], checkpoints: Sequence[Checkpoint]) -> None:
    """Raises UserError where heads are of different kinds or have other labels: their mean would mean nothing."""
    for name, checkpoint in zip(names[1:], checkpoints[1:], strict=True):
        if _head(checkpoint) != _head(checkpoints[0]):
            raise UserError(
                f"{name}: its head is {_named(checkpoint)}, and that of {names[0]} is {_named(checkpoints[0])}; --trunk-only "
                "merges the trunks alone"
            )


def _named(checkpoint: Checkpoint) -> str:
    kind, labels = _head(checkpoint)
    return f"{kind} ({', '.join(labels)})" if labels else str(kind or "none")
