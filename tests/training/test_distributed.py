"""Two real processes over loopback, two virtual devices each, each with a part of the data."""

import dataclasses
import json
import signal
import socket
import time

import jax
import numpy as np
import pytest
import tiny
from processes import Process

import mtl_jax
from mtl_jax import Checkpoints
from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch
from mtl_jax.data.stream import stream
from mtl_jax.training import loop
from mtl_jax.training import mesh as meshes
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.setup import mixture_phases, prepare

STEPS = 46
FLAGS = ["--devices", "0", "--checkpoints.every", "5", "--evaluation.every", "20"]
FLAGS += ["--phases.1.steps", "40", "--batch.mixture", "proportional"]


def start(folder, workdir, address, index, *more):
    flags = ["--workdir", workdir, *FLAGS, *more, "--distributed", f"{address},{index},2"]
    return Process(tiny.__file__, *flags, devices=2, TINY=str(folder))


def start_pair(folder, workdir, *more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(folder, workdir, address, index, *more) for index in range(2)]


def finish(pair):
    outputs = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data without a checkpoint: of which trunk is all the same here."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """A run of two processes that was never stopped; what each of them said."""
    return folder / "two", finish(start_pair(folder, folder / "two"))


def experiment(folder):
    """What FLAGS make of the tiny experiment, for one process with four devices."""
    plain = tiny.experiment(tiny.MATRIX, folder / "data")
    return dataclasses.replace(
        plain,
        phases=(plain.phases[0], dataclasses.replace(plain.phases[1], steps=40)),
        batch=dataclasses.replace(plain.batch, mixture="proportional"),
        evaluation=dataclasses.replace(plain.evaluation, every=20),
        checkpoints=Checkpoints(every=20),
        devices=4,
    )


class Together:
    """The batches of two hosts, one above the other: what a global batch is."""

    def __init__(self, corpus, batching, seed, stretches, *_):
        self.hosts = [stream(corpus, batching, seed, stretches, host, 2) for host in range(2)]

    def __next__(self):
        first, second = (next(host) for host in self.hosts)
        labels = {task: np.concatenate([first.labels[task], second.labels[task]]) for task in first.labels}
        arrays = [
            np.concatenate([getattr(first, field), getattr(second, field)])
            for field in ("tokens", "segments", "positions", "index", "source")
        ]
        return Batch(*arrays, labels)

    def keep(self, rows, anew):
        assert not rows  # of sources whose rows a phase chooses

    def get_state(self):
        return {}

    def close(self):
        for host in self.hosts:
            host.close()


def test_two_processes_train_as_one_that_is_given_the_same_batches(folder, pair, monkeypatch):
    workdir, outputs = pair
    assert "| coarse" in outputs[0]
    assert "| coarse" not in outputs[1]  # host 0 speaks
    monkeypatch.setattr(loop, "stream", Together)
    expected = mtl_jax.train(experiment(folder), folder / "one")
    two, one = ([r for r in read_metrics(path) if r["kind"] == "train"] for path in (workdir, folder / "one"))
    assert len(two) == STEPS
    for name in ("total", "loss/rating", "gradient_norm"):
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=1e-4, atol=1e-6)
    # Counts are over both processes.
    for name in ("tokens", "examples/fine", "seen/ratings/rows", "seen/questions/examples", "seen/ratings/passes"):
        assert [r[name] for r in two] == [r[name] for r in one]
    found = json.loads((workdir / "results.json").read_text())
    for name in ("seen", "padding", "training_tokens"):
        assert found[name] == expected[name]


def test_the_processes_see_different_examples_and_all_of_them(folder):
    prepared = prepare(experiment(folder))
    seen = []
    for host in range(2):
        batches = stream(prepared.corpus, prepared.experiment.batch, 0, mixture_phases(prepared.experiment), host, 2)
        seen.append({int(i) for _ in range(STEPS) for i in next(batches).index.ravel() if i >= 0})
        batches.close()
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == sum(len(part.tokens) for part in prepared.corpus.splits["train"].values())


def assert_they_go_on(workdir, whole):
    """To the numbers and the bits of the run that was never stopped."""
    outputs = finish(start_pair(whole.parent, workdir))
    assert all("resuming from step" in output for output in outputs[:1])
    assert read_metrics(workdir) == read_metrics(whole)
    ends = []
    for path in (workdir, whole):
        found = json.loads((path / "results.json").read_text())
        store = Store(path, Checkpoints(), read_only=True)
        params = store.restore_params(store.steps()[-1])
        store.close()
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
        ends.append((leaves, {name: found[name] for name in ("tasks", "steps", "best_step", "seen", "padding")}))
    assert ends[0] == ends[1]


def test_two_processes_go_on_from_a_checkpoint_as_if_never_stopped(folder, pair):
    whole, _ = pair
    tiny.cut(whole, folder / "cut", 40)
    assert_they_go_on(folder / "cut", whole)


@pytest.mark.long
def test_two_processes_that_were_killed_go_on_as_if_never_stopped(folder, pair):
    whole, _ = pair
    workdir = folder / "killed"
    processes = start_pair(folder, workdir)
    deadline = time.monotonic() + 240
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 13):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "\n".join(p.communicate()[0] for p in processes)
        time.sleep(0.001)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    assert not (workdir / "results.json").exists()
    assert_they_go_on(workdir, whole)


def test_another_number_of_processes_cannot_go_on(folder, pair):
    workdir, _ = pair
    results = workdir / "results.json"
    done = results.read_text()
    results.unlink()
    # As the two processes were started, but for the number of devices.
    alone = dataclasses.replace(experiment(folder), checkpoints=Checkpoints(every=5, keep=3))
    with pytest.raises(UserError, match="written by 2 processes, and this run has 1"):
        mtl_jax.train(alone, workdir, allow_config_change=True)
    results.write_text(done)


@pytest.mark.parametrize("cluster", ["yes", "localhost,0,2", "localhost:1,0", "localhost:1,a,b"])
def test_bad_addresses(cluster):
    with pytest.raises(UserError, match="give auto, or HOST:PORT,INDEX,COUNT"):
        meshes.connect(cluster)
