"""Why a loss or gradient is not finite, as far as the parameters tell, and what there is to resume from."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mtl_jax.core.trees import path_name
from mtl_jax.experiment import Experiment
from mtl_jax.training.checkpoint_store import Damaged, Store


def not_finite(params: Any) -> str:
    """The path of the first parameter with a number that is not finite; "" where all are."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.asarray(jax.device_get(leaf))
        if not np.isfinite(array.astype(np.float32)).all():
            return path_name(path)
    return ""


def of(step: int, experiment: Experiment, start: Any, store: Store) -> str:
    """What to do about it, in one or two sentences.

    Args:
        step: The step whose loss or gradient is not finite, from 1 on.
        experiment: The run's.
        start: Its parameters before the first step.
        store: Its checkpoints, all of them on disk.
    """
    spoilt, intact = _checkpoints(store)
    if step == 1 and (path := not_finite(start)):
        into_trunk = path.startswith("trunk/")
        place = f"init_from.path {experiment.init_from.path}" if experiment.init_from.path else "its initialisation"
        if into_trunk and not experiment.init_from.path and (trunk := getattr(experiment.trunk, "path", "")):
            place = f"trunk.path {trunk}"
        return f"The parameter {path} has numbers that are not finite before the first step: they come from {place}"
    if spoilt:
        cause = f"The parameter {next(iter(spoilt.values()))} is not finite in the checkpoint of step {max(spoilt)} already"
        advice = "try a lower learning rate in another --workdir"
        if intact:
            steps = ", ".join(map(str, sorted(spoilt)))
            advice += f", or delete the checkpoints of steps {steps} to resume from step {intact}"
        return f"{cause}; {advice}"
    if step == 1:
        return (
            "No parameter had changed by then and all are finite, so it is not the learning rate: look for labels and weights "
            "that are too large, and try --dtype float32 if it is another"
        )
    if intact is None:
        return "There is no checkpoint to resume from; try a lower learning rate in another --workdir"
    return f"The checkpoint of step {intact} is intact in {store.folder}; try a lower learning rate in another --workdir"


def _checkpoints(store: Store) -> tuple[dict[int, str], int | None]:
    """{step: a parameter that is not finite} of the newest checkpoints, and the step of the first before them that is whole."""
    spoilt: dict[int, str] = {}
    for step in reversed(store.steps()):
        try:
            path = not_finite(store.restore_params(step))
        except Damaged:
            continue
        if not path:
            return spoilt, step
        spoilt[step] = path
    return spoilt, None
