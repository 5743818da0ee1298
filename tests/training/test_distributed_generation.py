"""Two real processes over loopback, two virtual devices each: each generates a part of the texts, and both know all scores."""

import dataclasses
import json
import socket

import pytest
import tiny_translation
from processes import Process

from mtl_jax import Evaluation
from mtl_jax.inference.predict import open_run
from mtl_jax.training import text_evaluation
from mtl_jax.training.setup import prepare

FLAGS = ["--devices", "0", "--evaluation.every", "6", "--evaluation.baseline", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_translation.write_data(folder, rows=150)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [tiny_translation.__file__, "--workdir", folder / "run", *FLAGS, "--distributed"]
    pair = [Process(*command, f"{address},{index},2", devices=2, TINY=str(folder)) for index in range(2)]
    outputs = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(outputs)
    return folder


def test_the_scores_of_two_processes_are_those_of_one(folder):
    results = json.loads((folder / "run" / "results.json").read_text())
    run = open_run(folder / "run")
    whole = tiny_translation.experiment(folder)
    corpus = prepare(dataclasses.replace(whole, evaluation=Evaluation(every=6, baseline="none"))).corpus
    for split in ("dev", "test"):
        assert len(corpus.splits[split]["pairs"].tokens) > 3
        texts = text_evaluation.text_scores(run.tasks, run.trunk, run.params, corpus.splits[split], lambda task: task.beams)
        found = results["tasks"]["translation"][split]
        assert found["chrf"] > 0
        for name, value in texts["translation"].items():
            assert found[name] == pytest.approx(value, abs=1e-6), name
