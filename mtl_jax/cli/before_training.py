"""Commands that look at a script's experiment before it trains: which tasks help which, and what leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from mtl_jax.cli import scripts
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import write_json
from mtl_jax.core.text_lines import print_lines


def affinity(
    script: Annotated[str, tyro.conf.Positional],
    /,
    target: str = "",
    estimators: tuple[str, ...] = (),
    rows: int = 512,
    layer: int = 0,
    runs: tuple[str, ...] = (),
    resamples: int = 20,
    seed: int = 0,
    json: str = "",
) -> None:
    """Ranks the tasks of an experiment as sources for each other, by estimates that need no training of the trunk.

    Prints for every target a table of estimators and their first sources, with 90% intervals over the target's rows, the flags
    that train the advice, and the seconds of each estimator. Estimators that do not apply to a kind of task are listed with the
    reason.

    Args:
        script: A script that calls mtl_jax.main; its own flags come after --.
        target: The task to be helped. Default: each task in turn.
        estimators: Names of estimators, such as logme leep text_similarity. Default: all, and those of --import FILE.
        rows: The most training rows of a task that are used, chosen at random.
        layer: The layer of the trunk whose features are read, from 1; 0: its output.
        runs: Workdirs of finished runs of some of the tasks. Estimators of a source's features need them; for leep and nce they
            replace heads that are fitted on the trunk before training.
        resamples: Half-samples of the target's rows for the intervals; 0: no intervals.
        seed: Of the rows, half-samples and heads.
        json: A file to write everything to, as JSON.
    """
    from mtl_jax.affinity.experiment_affinity import of_experiment, table

    _check_json(json)
    experiment = scripts.read(script, "rank")
    options = {"rows": rows, "layer": layer, "resamples": resamples, "seed": seed}
    result = of_experiment(experiment, target, estimators, runs=runs, **options)
    print(table(result))
    if json:
        write_json(Path(json), result.as_json())
        print(f"everything is in {json}")


def audit(
    script: Annotated[str, tyro.conf.Positional],
    /,
    near: float = 0.7,
    json: str = "",
    texts: bool = False,
) -> None:
    """Copies of held-out rows in the training rows of all sources of an experiment, and copies under another label in train.

    Prints tables of counts, and ten examples of each by file and line. Nothing is trained or written.

    Args:
        script: A script that calls mtl_jax.main; its own flags come after --.
        near: The least similarity of near copies, above 0 and at most 1: one word in ten may differ at 0.7.
        json: A file to write with the same as JSON.
        texts: Also show the texts of the examples.
    """
    from mtl_jax import audit as audits
    from mtl_jax.audit.copies import check

    check(near, "--near")
    _check_json(json)
    result = audits.of_experiment(scripts.read(script, "audit"), near)
    if json:
        write_json(Path(json), result.to_json(texts))
    print_lines([result.table(texts)])


def _check_json(path: str) -> None:
    """Raises UserError, before any work, where a file cannot be written."""
    if path and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
        raise UserError(f"--json {path}: name a file in a directory that exists")
