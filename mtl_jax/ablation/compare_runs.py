"""mtl_jax.compare: as reporting.compare, also of runs of an ablation, whose checkpoints are in those of its programs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_jax.ablation.ablation_dir import RECORD
from mtl_jax.ablation.extract import take
from mtl_jax.data.source import Source
from mtl_jax.reporting import compare as comparing
from mtl_jax.reporting.compare import RESAMPLES, Paths
from mtl_jax.reporting.compared import Compared
from mtl_jax.training.restore import TrainedRun, open_run


def compare(
    joint: Paths | Mapping[str, Paths],
    alone: Paths,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    sources: Sequence[Source] = (),
) -> Compared:
    """For every task the joint runs minus the runs alone on its main test metric, with 95 % intervals over rows and seeds.

    The outputs of the best checkpoints on the test rows are computed again, without training, and what the metrics need of each
    row is kept in the cache directory; the workdirs stay as they are. Each resample draws the same rows for all runs, and each
    metric is computed anew on it.

    Args:
        joint: Workdirs of finished joint runs, patterns such as "runs/hard*", or an ablation. Runs that differ only in the seed
            are one setting, and every other setting has a column of its own; {name: paths} names the columns.
        alone: The same of runs that were trained on one task each. A run with several tasks is compared in each of them.
        resamples: Bootstrap samples.
        seed: Of these samples.
        sources: In place of those in config.json, where a script gave their rows.

    Raises:
        UserError: A path is not the workdir of a finished run, is given twice, or has no task in common with the other side; a
            task has another metric or other test rows there; or the runs alone of a task differ in more than the seed.

    References:
        Koehn, 2004, Statistical Significance Tests for Machine Translation Evaluation, https://aclanthology.org/W04-3250/

    Examples:
        >>> result = mtl_jax.compare("runs/tiny", "runs/seed_1", resamples=200)
        >>> result.columns["joint"].differences["fine"].verdict in ("helped", "unclear", "hurt")
        True
        >>> print(result)
        | task ...
    """
    return comparing.compare(joint, alone, resamples=resamples, seed=seed, sources=sources, opened=_opened)


def _opened(folder: Path) -> TrainedRun:
    """The best checkpoint of a run, also of one of an ablation."""
    ablation = folder.parent.parent
    if (folder / "checkpoints").is_dir() or not (ablation / RECORD).exists():
        return open_run(folder)
    with tempfile.TemporaryDirectory(prefix="mtl_jax_compare_") as copies:
        return open_run(take(ablation, folder.name, Path(copies) / folder.name))
