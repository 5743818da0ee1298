"""Merged parameters measured on the dev and test rows of the runs that they are of."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax.data import examples
from mtl_jax.data.examples import Corpus
from mtl_jax.errors import UserError
from mtl_jax.merge.union import Member, Union
from mtl_jax.training import evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.step import encode_tokens, needs
from mtl_jax.trunks import Trunk

log = logging.getLogger(__name__)

Scores = dict[str, dict[str, dict[str, float]]]


def corpus_of(union: Union, members: tuple[Member, ...]) -> Corpus:
    """The runs' data, read again.

    Raises:
        UserError: It is not there any more, or not the same.
    """
    experiment, tokenizer = union.experiment, members[0].run.trunk.tokenizer
    data = examples.read_sources(experiment.sources, union.tasks)
    corpus = examples.make_corpus(experiment.sources, union.tasks, data, tokenizer, experiment.batch.row_length)
    found = corpus.describe()["sources"]
    for name, parts in found.items():
        for split in ("dev", "test"):
            before = union.data["sources"][name][split]
            # The hash is also of the labels, and so of the tasks that were trained together.
            if parts[split] != before if union.same else parts[split]["examples"] != before["examples"]:
                raise UserError(f"source {name!r} has other {split} rows now than when {members[0].name} was trained")
    learned = {name: splits.elsewhere for name, splits in data.items() if splits.elsewhere}
    if learned and not union.same:
        log.warning(
            "%s: training rows that stand in dev or test of another source; a run that did not have that source has learned "
            "from them, so scores on it may be too high",
            ", ".join(f"{name} {count}" for name, count in learned.items()),
        )
    return corpus


def measurer(union: Union, trunk: Trunk, corpus: Corpus) -> Callable[[Mapping[str, Any], str], Any]:
    """(params, split) -> {task: {metric: value}}, as after training."""
    batching, tasks = union.experiment.batch, union.tasks
    mesh = meshes.make(batching.rows, 1)
    apply = evaluation.make_outputs(encode_tokens(trunk.module, needs(tasks)), tasks, mesh)

    def measure(params: Mapping[str, Any], split: str) -> dict[str, dict[str, float]]:
        data = corpus.splits[split]
        placed = meshes.place(params, meshes.replicated(mesh))
        return evaluation.score(tasks, data, evaluation.run(apply, placed, tasks, list(data.values()), batching, mesh))

    return measure


def criterion(union: Union, scores: dict[str, dict[str, float]]) -> float:
    """The dev criterion of the merged experiment.

    Raises:
        UserError: It is not a number.
    """
    found = evaluation.criterion(union.experiment.evaluation.criterion, union.tasks, scores)
    if math.isnan(found):
        log.warning("the dev criterion is not a number")
    return found
