"""The metrics of many runs on a split: one pass over the data for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mtl_jax.ablation import together
from mtl_jax.ablation.machine import Machine
from mtl_jax.tasks import Seq2Seq
from mtl_jax.training import evaluation, generation

Scores = dict[str, dict[str, float]]


def scores_of(
    machine: Machine,
    apply: evaluation.Apply,
    params: Any,
    split: str,
    which: Sequence[bool],
    own: Any,
    beams: Callable[[Seq2Seq], int],
    table: Any = None,
) -> list[Scores | None]:
    """{task: {metric: value}} of those runs that are asked for; where a loss is not finite, losses only.

    Args:
        machine: The runs' program.
        apply: machine.outputs(...).
        params: Parameters of all runs.
        split: dev or test.
        which: For each run whether it is asked for.
        own: Tree of bools: which leaves of the parameters are own.
        beams: Of a task that decodes.
        table: Features, where apply looks them up.
    """
    prepared = machine.prepared
    data, tasks, batching = prepared.corpus.splits[split], prepared.corpus.tasks, prepared.experiment.batch
    parts = list(data.values())
    found = evaluation.run_each(apply, params, tasks, parts, batching, machine.mesh, machine.size, table=table)
    scores: list[Scores | None] = []
    for number, asked in enumerate(which):
        losses = found[number].losses
        if not asked:
            scores.append(None)
        elif not all(math.isfinite(loss) for loss in losses.values()):
            scores.append({task: {"loss": loss} for task, loss in losses.items()})
        else:
            texts: Scores = {}
            if any(task.decodes for task in tasks):
                alone = jax.device_put(together.take(params, own, number), jax.devices()[0])
                devices = list(machine.mesh.devices.flat)
                texts = generation.text_scores(tasks, prepared.trunk, alone, data, beams, devices=devices)
            scores.append(evaluation.score(tasks, data, found[number], texts))
    return scores
