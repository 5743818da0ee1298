"""Merges trained models, runs or checkpoints, by a method of transfer.merge_methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_jax.core import locks, log_lines
from mtl_jax.core.errors import UserError
from mtl_jax.core.json_shapes import anything
from mtl_jax.inference.predict import is_workdir
from mtl_jax.merging.checkpoints import merge_checkpoints
from mtl_jax.merging.method import Method as Method
from mtl_jax.merging.method import checked
from mtl_jax.merging.runs import merge_runs
from mtl_jax.training import workdir as workdirs


def merge(
    target: str | Path,
    sources: Sequence[str | Path],
    method: str | Method,
    *,
    base: str | Path = "",
    weights: Sequence[float] = (),
    alpha: float | None = None,
    scale: float | Sequence[float] | None = None,
    keep: float | None = None,
    drop: float | None = None,
    seed: int | None = None,
    trunk_only: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Merges finished runs into a workdir, or checkpoints of one family into a directory that transformers opens.

    The target has a merge.json with the method, its numbers, the sources with step or SHA-256, and how each part was merged. It
    is written whole or not at all.

    Args:
        target: The directory to write.
        sources: Either workdirs of finished runs, whose best checkpoints are merged, or checkpoints: directories,
            pip:ASSET/MEMBER or hub ids.
        method: soup, average, greedy, wise, arithmetic, ties, dare or dare_ties; or a Method, which has the numbers below.
        base: The model that the sources started from: a checkpoint, or for runs also a workdir.
        weights: For average: one for each source.
        alpha: For wise: from 0, the base, to 1, the source.
        scale: For arithmetic, ties and dare: the factor of the differences; for arithmetic and dare also one for each source.
        keep: For ties: the share of each source's changes that is kept.
        drop: For dare: the share of each source's changes that is dropped.
        seed: For dare: the seed of what is dropped.
        trunk_only: For checkpoints with different heads: merge and write the bare models.
        overwrite: Whether the result of an earlier merge may be replaced.

    Returns:
        The contents of results.json; None for checkpoints, and for runs whose data is not available.

    Raises:
        UserError: An option is refused, a source cannot be read, the sources do not fit together, the target is not
            free, or another process writes it.

    Examples:
        >>> results = mtl_jax.merge("runs/soup", ["runs/tiny", "runs/seed_1"], "soup")
        >>> sorted(results["tasks"])
        ['coarse', 'fine']
    """
    log_lines.show()
    folder, source_names, base_name = Path(target), [str(source) for source in sources], str(base)
    scales = (scale,) if isinstance(scale, int | float) else tuple(scale or ())
    given = (tuple(weights) or None, alpha, scales or None, keep, drop, seed)
    if isinstance(method, str):
        method = Method(method, *given)
    elif given != (None,) * len(given):
        raise UserError(f"{method.name}: the numbers of a Method are its fields; leave weights, alpha and the like out")
    method = checked(method, source_names, base_name)
    workdirs.check_writable(folder)
    with locks.target(folder):
        return _merge(folder, source_names, method, base_name, trunk_only, overwrite)


def _merge(
    folder: Path, sources: Sequence[str], method: Method, base: str, trunk_only: bool, overwrite: bool
) -> dict[str, Any] | None:
    _check_target(folder, [*sources, base], overwrite)
    _check_sources(sources, base)
    are_runs = [is_workdir(Path(source)) for source in sources]
    if any(are_runs) and not all(are_runs):
        workdir, other = sources[are_runs.index(True)], sources[are_runs.index(False)]
        raise UserError(
            f"{workdir} is a workdir of a run, and {other} is a checkpoint: sources must be of one kind; mtl-jax convert "
            "writes a run's trunk as a checkpoint"
        )
    if not are_runs[0]:
        merge_checkpoints(folder, sources, base, method, trunk_only=trunk_only)
        return None
    if trunk_only:
        raise UserError("--trunk-only is for checkpoints; runs with different tasks keep the heads of all")
    return merge_runs(folder, sources, base, method)


def _check_sources(sources: Sequence[str], base: str) -> None:
    """Raises UserError if a source is given twice, however it is spelt, or is neither a workdir nor a checkpoint."""
    names: dict[Path, str] = {}
    for path in filter(None, [*sources, base]):
        folder = Path(path)
        if not folder.is_dir():
            continue
        place = folder.resolve()
        if place in names:
            raise UserError(f"{path}: the same directory as {names[place]}; each source counts once")
        names[place] = path
        config = workdirs.read_json(folder / "config.json", anything)
        if config is None:
            raise UserError(f"{path}: neither a workdir of a run nor a checkpoint (config.json is missing)")
        if isinstance(config, dict) and "model_type" not in config and not is_workdir(folder):
            raise UserError(
                f"{path}: neither a workdir of a run (data.json is missing) nor a checkpoint (config.json has no model_type)"
            )


def _check_target(folder: Path, inputs: Sequence[str], overwrite: bool) -> None:
    """Raises UserError if the target holds anything but the result of an earlier merge."""
    for path in filter(None, inputs):
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder}: the source {path} is in it; choose another directory")
    if not folder.exists() or not any(folder.iterdir()):
        return
    record = workdirs.read_json(folder / workdirs.MERGED)
    if not isinstance(record, dict):
        raise UserError(f"{folder}: not empty, and not written by a merge; choose another directory")
    if not overwrite:
        raise UserError(f"{folder}: it holds a merged model already; choose another directory, or give --overwrite")
    others = sorted({path.name for path in folder.iterdir()} - set(record.get("written", ())))
    if others:
        raise UserError(
            f"{folder}: not written by a merge: {', '.join(others[:3])}; move that away, or choose another directory"
        )
