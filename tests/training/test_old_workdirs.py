"""A workdir of an earlier version opens, predicts, converts and resumes; fixtures/make_workdir.py made it."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mtl_jax import pretrained, train
from mtl_jax.core import trees
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import evaluate, predict
from mtl_jax.training.experiment_json import from_json
from mtl_jax.training.restore import open_run

STORED = Path(__file__).parent / "fixtures" / "workdir.tar.xz"
# What the version that wrote it said of the text and the file below.
ANSWER = {"label": "LOC:city", "probability": 0.684687}
SCORES = {
    "rows": 150,
    "loss": 0.6597325897216797,
    "pearson": 0.2283656476971737,
    "spearman": 0.22675755080632284,
    "mean_absolute_error": 1.2885230934364962,
}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The workdir, finished, with checkpoints of steps 2 and 4; the paths in its config.json are relative."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_it_predicts_and_evaluates_as_it_did(old):
    (answer,) = predict(old, "fine", ["who is the man ?"])
    assert answer == ANSWER | {"probability": pytest.approx(ANSWER["probability"], abs=1e-4)}
    scores = evaluate(old, "rating", "data/ratings.tsv")
    assert scores == {name: pytest.approx(value, abs=1e-4) for name, value in SCORES.items()}


def test_it_converts(old):
    convert(str(old), "converted")
    checkpoint, run = pretrained.load("converted"), open_run(old)
    stored, written = trees.flat(run.params["trunk"]), trees.flat(checkpoint.params["trunk"])
    assert stored.keys() == written.keys()
    for path, leaf in written.items():
        np.testing.assert_array_equal(leaf, stored[path], err_msg=path)


def test_it_resumes_to_where_it_ended(old):
    """From step 2: the last checkpoint and the results are taken away."""
    experiment = from_json(json.loads((old / "config.json").read_text(encoding="utf-8")))
    before, ended = json.loads((old / "results.json").read_text(encoding="utf-8")), open_run(old, "4").params
    (old / "results.json").unlink()
    shutil.rmtree(old / "checkpoints" / "4")
    after = train(experiment, old)
    resumed = open_run(old, "4").params
    for path, leaf in trees.flat(ended).items():
        np.testing.assert_allclose(trees.flat(resumed)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    assert after["steps"] == before["steps"] == 4
    assert after["tasks"]["rating"]["test"] == pytest.approx(before["tasks"]["rating"]["test"], rel=1e-3)
