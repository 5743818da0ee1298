"""A hundred tasks in one run."""

import json

import numpy as np
import pytest

import mtl_jax
from mtl_jax import Batching, Classification, Embedding, Evaluation, Experiment, Phase, Source

TASKS = 100


@pytest.mark.long
@pytest.mark.parametrize("rule", ["equal", "upgrad"])
def test_a_hundred_tasks_train_and_are_evaluated(tmp_path, rule):
    random, names = np.random.default_rng(0), [f"t{number}" for number in range(TASKS)]
    rows = [
        {
            "text": " ".join(random.choice(["red", "blue", "cat", "dog", "sun"], 4)),
            **{name: str(random.integers(2)) for name in names},
        }
        for _ in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    experiment = Experiment(
        "many",
        trunk=Embedding(vocabulary=280, dimension=8),
        sources=(Source("rows", path=str(tmp_path / "rows.jsonl"), format="jsonl", cut_dev=0.2, cut_test=0.2),),
        tasks=tuple(Classification(name=name, source="rows", column=name) for name in names),
        phases=(Phase("all", steps=2),),
        weighting=rule,
        batch=Batching(rows=4, row_length=48, examples_per_row=4),
        evaluation=Evaluation(every=2, baseline="none"),
        devices=1,
    )
    results = mtl_jax.train(experiment, tmp_path / "run")
    assert len(results["tasks"]) == TASKS
    assert all(np.isfinite(scores["test"]["loss"]) for scores in results["tasks"].values())
