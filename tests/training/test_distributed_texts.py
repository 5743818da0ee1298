"""A task that decodes, trained and measured by two real processes over loopback, two virtual devices each."""

import dataclasses
import json
import socket

import pytest
import tiny_translation
from processes import Process
from test_distributed import Together

import mtl_jax
from mtl_jax import Evaluation, Phase
from mtl_jax.training import loop
from mtl_jax.training.metrics_log import read_metrics

pytestmark = pytest.mark.long
FLAGS = ["--devices", "0", "--phases.0.steps", "4", "--evaluation.every", "4", "--tasks.0.dev-beams", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tiny_translation.write_data(folder, rows=120)
    return folder


def start_pair(folder, workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [tiny_translation.__file__, "--workdir", workdir, *FLAGS, "--distributed"]
    return [Process(*command, f"{address},{index},2", devices=2, TINY=str(folder)) for index in range(2)]


def experiment(folder):
    """What FLAGS make of it, for one process with four devices."""
    plain = tiny_translation.experiment(folder, devices=4)
    return dataclasses.replace(
        plain,
        phases=(Phase("everything", steps=4),),
        evaluation=Evaluation(every=4),
        tasks=(dataclasses.replace(plain.tasks[0], dev_beams=2), *plain.tasks[1:]),
    )


def test_two_processes_measure_what_one_does_that_is_given_the_same_batches(folder, monkeypatch):
    pair = start_pair(folder, folder / "two")
    outputs = [process.communicate(timeout=900)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(outputs)
    assert "texts of translation" in outputs[0]
    assert "texts of translation" not in outputs[1]  # host 0 speaks
    monkeypatch.setattr(loop, "stream", Together)
    expected = mtl_jax.train(experiment(folder), folder / "one")
    found = json.loads((folder / "two" / "results.json").read_text())
    two, one = ([r for r in read_metrics(path) if r["kind"] == "train"] for path in (folder / "two", folder / "one"))
    assert [r["examples/translation"] for r in two] == [r["examples/translation"] for r in one]  # target tokens of both
    assert [r["loss/translation"] for r in two] == pytest.approx([r["loss/translation"] for r in one], rel=1e-4)
    for split in ("dev", "test"):
        theirs, own = (results["tasks"]["translation"][split] for results in (found, expected))
        assert theirs.keys() == own.keys() >= {"bleu", "chrf", "perplexity"}
        assert theirs == pytest.approx(own, abs=1e-3)
    assert found["tasks"]["translation"]["signatures"] == expected["tasks"]["translation"]["signatures"]
