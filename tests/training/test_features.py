"""Features are computed once: kept on disk by content, and read by whoever would compute the same bits."""

import dataclasses
import json
import logging
import shutil
import socket
import subprocess
import sys

import compiling
import jax
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import Lora, Phase, Pretrained
from mtl_jax.training import evaluation, features
from mtl_jax.training import mesh as meshes
from mtl_jax.training.features import Features
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.preemption import Stop
from mtl_jax.training.setup import prepare


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, in which the little that is computed here is kept, too."""
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "WORTH", 0)
    return tmp_path / "cache" / "features"


@pytest.fixture
def computed(monkeypatch):
    """How often vectors were really computed."""
    calls, compute = [], evaluation.features
    monkeypatch.setattr(evaluation, "features", lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs))
    return calls


@pytest.fixture(scope="module")
def prepared(bert, data):
    return prepare(tiny.experiment(bert, data))


def table(prepared, params=None):
    placed = meshes.place(prepared.params if params is None else params, meshes.replicated(prepared.mesh))
    return np.asarray(Features(prepared, Stop()).table(placed, "features"))


def test_what_is_read_is_what_was_computed(prepared, cache, computed, caplog):
    caplog.set_level(logging.INFO)
    first, again = table(prepared), table(prepared)
    assert len(computed) == 1
    assert first.tobytes() == again.tobytes()
    assert first.shape == (prepared.corpus.size, tiny.HIDDEN)
    assert caplog.messages == [f"features of {prepared.corpus.size} texts from the cache"]
    (entry,) = cache.iterdir()
    assert json.loads((entry / "manifest.json").read_text())["texts"] == prepared.corpus.size


def test_an_ablation_reads_the_features_of_a_run(bert, data, tmp_path, computed):
    """Its mesh has an axis more, for the runs."""
    heads = tiny.experiment(bert, data, phases=(Phase("heads", steps=2, rules=tiny.HEADS_ONLY),))
    mtl_jax.train(heads, tmp_path / "run")
    mtl_jax.ablate(heads, tmp_path / "ablation", ["phases.heads.learning-rate=1e-3,1e-2"])
    assert len(computed) == 1


def one_bit(prepared):
    """The run with the lowest bit of one of the trunk's numbers turned."""
    params = jax.tree.map(np.array, prepared.params)
    leaf = jax.tree.leaves(params["trunk"])[0]
    leaf.reshape(-1).view(np.uint32)[0] ^= 1
    return prepared._replace(params=params)


def one_token(prepared):
    """The run with another token in its last text."""
    splits = {split: dict(parts) for split, parts in prepared.corpus.splits.items()}
    part = splits["test"]["questions"]
    tokens = [np.array(ids) for ids in part.tokens]
    tokens[-1][1] += 1
    splits["test"]["questions"] = part._replace(tokens=tokens)
    return prepared._replace(corpus=prepared.corpus._replace(splits=splits))


def changed(prepared, **fields):
    batch = dataclasses.replace(prepared.experiment.batch, **fields)
    return prepared._replace(experiment=dataclasses.replace(prepared.experiment, batch=batch))


OTHERS = {
    "a bit of the trunk": one_bit,
    "a token": one_token,
    "the number of rows": lambda prepared: changed(prepared, rows=4),
    "what shares a row": lambda prepared: changed(prepared, examples_per_row=5),
    "padding": lambda prepared: changed(prepared, packed=False),
    "the devices": lambda prepared: prepared._replace(mesh=meshes.make(8, 2)),
}


@pytest.fixture(scope="module")
def kept(prepared, tmp_path_factory):
    """A cache with the features of the run, and these."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_JAX_CACHE", str(folder))
        patch.setattr(features, "WORTH", 0)
        return folder, table(prepared)


@pytest.mark.parametrize("change", OTHERS)
def test_what_changes_the_bits_is_computed_anew(change, prepared, kept, computed, monkeypatch):
    folder, before = kept
    monkeypatch.setenv("MTL_JAX_CACHE", str(folder))
    found = table(OTHERS[change](prepared))
    assert len(computed) == 1
    far = np.abs(found - before).max(axis=1) > 1e-5
    assert far.sum() == (change == "a token")


def test_another_trunk_of_the_same_parameters(bert, data, kept, computed, monkeypatch):
    """Not one number differs, but what is done with them."""
    folder, before = kept
    monkeypatch.setenv("MTL_JAX_CACHE", str(folder))
    config = json.loads((bert / "config.json").read_text())
    other = bert.with_name("relu")
    shutil.copytree(bert, other)
    (other / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert (table(prepare(tiny.experiment(other, data))) != before).any()
    assert len(computed) == 1


def test_what_does_not_change_the_bits_is_read(bert, data, kept, computed, monkeypatch):
    """Heads, seed and phases, dropout of a trunk that stands still; adapters are part of the trunk."""
    folder, before = kept
    monkeypatch.setenv("MTL_JAX_CACHE", str(folder))
    other = tiny.experiment(bert, data, seed=5, phases=(Phase("heads", 2, tiny.HEADS_ONLY),), trunk=Pretrained(str(bert), 0.3))
    assert table(prepare(dataclasses.replace(other, tasks=other.tasks[:2]))).tobytes() == before.tobytes()
    assert not computed
    table(prepare(dataclasses.replace(other, adapters=(Lora(name="lora"),))))
    assert len(computed) == 1


def test_little_is_not_kept(prepared, cache, monkeypatch, computed):
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(prepared.params["trunk"]))]
    sizes += [sum(len(ids) for split in prepared.corpus.splits.values() for part in split.values() for ids in part.tokens)]
    monkeypatch.setattr(features, "WORTH", sizes[0] * sizes[1] + 1)
    table(prepared)
    table(prepared)
    assert len(computed) == 2
    assert not cache.exists()


def test_a_damaged_file_is_reported_and_computed_anew(prepared, cache, computed, caplog):
    expected = table(prepared)
    (entry,) = cache.iterdir()
    with (entry / "features.npy").open("r+b") as file:
        file.truncate(1000)
    np.testing.assert_array_equal(table(prepared), expected)
    assert "features.npy has 1000 bytes instead of" in caplog.text
    assert len(computed) == 2
    np.testing.assert_array_equal(table(prepared), expected)
    assert len(computed) == 2


def test_a_run_that_goes_on_does_not_compute_again(bert, data, tmp_path, computed):
    """Stopped in a phase of heads, with the baselines written; it ends with the same numbers."""
    experiment = tiny.experiment(bert, data, phases=(Phase("heads", steps=6, rules=tiny.HEADS_ONLY),))
    whole = mtl_jax.train(experiment, tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    again = mtl_jax.train(experiment, tmp_path / "run")
    assert len(computed) == 1
    assert again["tasks"] == whole["tasks"]
    assert read_metrics(tmp_path / "run") == records


HOST = """
import os, sys
from pathlib import Path
import tiny
from mtl_jax.training import features, mesh as meshes
from mtl_jax.training.setup import prepare
from mtl_jax.training.preemption import Stop
folder, address, index, apart = sys.argv[1:]
os.environ["MTL_JAX_CACHE"] = f"{folder}/cache{index if apart == 'apart' else ''}"
features.WORTH = 0
meshes.connect(f"{address},{index},2")
prepared = prepare(tiny.experiment(f"{folder}/bert", f"{folder}/data", devices=0))
calls, compute = [], features.evaluation.features
features.evaluation.features = lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs)
params = meshes.place(prepared.params, meshes.replicated(prepared.mesh))
for _ in range(2):
    table = features.Features(prepared, Stop()).table(params, "features")
print(len(calls), len(list(Path(os.environ["MTL_JAX_CACHE"]).glob("features/*"))))
"""


@pytest.mark.long
@pytest.mark.parametrize("apart", ["together", "apart"])
def test_two_hosts(apart, bert, data, tmp_path):
    """They compute together and read together, with one cache or with one each."""
    for name, folder in (("bert", bert), ("data", data)):
        (tmp_path / name).symlink_to(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", HOST, str(tmp_path), address]
    environment = compiling.environment(devices=2)
    environment["PYTHONPATH"] = ":".join(sys.path)
    pair = [
        subprocess.Popen(
            [*command, str(index), apart], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [output.splitlines()[-1] for output, _ in outputs] == ["1 1"] * 2, outputs
