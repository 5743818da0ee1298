"""Merged parameters measured on the dev and test rows of the runs that they are of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtl_jax.data import corpus as corpora
from mtl_jax.data.corpus import Corpus
from mtl_jax.errors import UserError
from mtl_jax.merge.union import Member, Union
from mtl_jax.training import evaluation, generation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.step import encode_tokens, needs
from mtl_jax.trunks import Trunk

log = logging.getLogger(__name__)

# (params, split) -> {task: {metric: value}}
Measure = Callable[[Mapping[str, Any], str], dict[str, dict[str, float]]]


def corpus_of(union: Union, members: Sequence[Member]) -> Corpus:
    """The runs' data, read again.

    Raises:
        UserError: It is not there any more, or not the same.
    """
    experiment, tokenizer = union.experiment, members[0].run.trunk.tokenizer
    data = corpora.read_sources(experiment.sources, union.tasks)
    corpus = corpora.make_corpus(experiment.sources, union.tasks, data, tokenizer, experiment.batch.row_length)
    for name, now in corpus.describe()["sources"].items():
        before = union.data["sources"][name]
        for split in ("dev", "test"):
            # The hash is also of the labels, and so of the tasks that were trained together.
            if now[split] != before[split] if union.same else now[split]["examples"] != before[split]["examples"]:
                raise UserError(f"source {name!r} has other {split} rows now than when {members[0].name} was trained")
        # Reading all sources together drops training rows that stand in dev or test of another one.
        learned = before["train"]["examples"] - now["train"]["examples"]
        if learned > 0 and not union.same:
            log.warning(
                "source %s: %d of its training rows stand in dev or test of another source, and a run has learned from them: "
                "scores on that may be too high",
                name,
                learned,
            )
    return corpus


def measurer(union: Union, trunk: Trunk, corpus: Corpus) -> Measure:
    """How parameters are measured: as after training, on one device."""
    batching, tasks = union.experiment.batch, union.tasks
    mesh = meshes.make(batching.rows, 1)
    apply = evaluation.make_outputs(encode_tokens(trunk.module, needs(tasks)), tasks, mesh)

    def measure(params: Mapping[str, Any], split: str) -> dict[str, dict[str, float]]:
        data = corpus.splits[split]
        placed = meshes.place(params, meshes.replicated(mesh))
        found = evaluation.run(apply, placed, tasks, list(data.values()), batching, mesh)
        texts = generation.text_scores(tasks, trunk, placed, data, lambda task: task.beams)
        return evaluation.score(tasks, data, found, texts)

    return measure


def criterion(union: Union, scores: dict[str, dict[str, float]]) -> float:
    """The merged experiment's criterion of dev scores."""
    return evaluation.criterion(union.experiment.evaluation.criterion, union.tasks, scores)
