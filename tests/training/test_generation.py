"""Runs with a task that decodes, through the whole program."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_translation
from sacrebleu.metrics import BLEU, CHRF

from mtl_jax import Checkpoints, Evaluation, Optimizer, Phase, train
from mtl_jax.errors import Interrupted
from mtl_jax.prediction import evaluate, open_run, predict
from mtl_jax.training import generation
from mtl_jax.training.checkpoint import Store
from mtl_jax.training.logs import read_metrics
from mtl_jax.training.signals import Stop


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tiny_translation.write_data(folder, rows=400)
    return folder


@pytest.fixture(scope="module")
def learned(pairs, tmp_path_factory):
    """A run that has learned the language well enough to translate most of its sentences."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    experiment = tiny_translation.experiment(
        pairs,
        trunk=dataclasses.replace(tiny_translation.TRUNK, width=32, heads=4, feed_forward=64),
        phases=(Phase("everything", steps=250),),
        optimizer=Optimizer(learning_rate=1e-2, schedule="inverse_sqrt", b2=0.98),
        batch=dataclasses.replace(tiny_translation.experiment(pairs).batch, rows=16),
        evaluation=Evaluation(every=125, criterion="translation"),
        checkpoints=Checkpoints(every=250),
    )
    return folder, train(experiment, folder)


def test_the_metrics_are_those_of_sacrebleu_on_the_predictions(learned, pairs):
    folder, results = learned
    test = open_run(folder)
    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    found = evaluate(folder, "translation", f"{pairs}/pairs.jsonl")
    answers = predict(folder, "translation", [row["text"] for row in rows])
    known = [(answer["text"], row["translation"]) for answer, row in zip(answers, rows, strict=True) if row["translation"]]
    texts, right = map(list, zip(*known, strict=True))
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(texts, [right]).score / 100)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(texts, [right]).score / 100)
    assert found["bleu"] > 0.6
    assert found["rows"] == 400
    assert test.task("translation").beams == 2
    task = results["tasks"]["translation"]
    assert task["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert task["signatures"]["chrf"].startswith("nrefs:1|")
    assert task["dev"].keys() == {"loss", "token_accuracy", "perplexity", "bleu", "chrf"}
    assert "signatures" not in results["tasks"]["long"]


def test_dev_is_decoded_greedily_while_training(learned):
    folder, results = learned
    run = open_run(folder)
    task = run.task("translation")
    assert generation.config_of(task, run.trunk, task.dev_beams).num_beams == 1
    logged = [record for record in read_metrics(folder) if record["kind"] == "dev"]
    assert [record["step"] for record in logged] == [125, 250]
    assert max(record["translation/bleu"] for record in logged) == results["best_criterion"]


def test_texts_that_are_empty_long_or_do_not_end(learned):
    folder, _ = learned
    found = predict(folder, "translation", ["", "the dog sees the cat", " ".join(["small"] * 60)])
    assert found[0] == {"error": "empty text"}
    assert set(found[1]) == {"text", "score"}
    assert found[2]["truncated"] is True


def test_the_class_beside_it_is_predicted_as_ever(learned):
    folder, results = learned
    (answer,) = predict(folder, "long", ["the small red fish eats the dog"])
    assert answer["label"] == "yes"
    assert results["tasks"]["long"]["test"]["accuracy"] > 0.8


@pytest.mark.parametrize("changes", [{"weighting": "pcgrad"}, {"weighting": "uncertainty"}, {"batch_accumulate": 2}])
def test_every_way_of_weighting(pairs, tmp_path, changes):
    experiment = tiny_translation.experiment(pairs, phases=(Phase("everything", steps=2),))
    if "batch_accumulate" in changes:
        changes = {"batch": dataclasses.replace(experiment.batch, accumulate=changes["batch_accumulate"])}
    results = train(dataclasses.replace(experiment, **changes), tmp_path / "run")
    assert np.isfinite(results["tasks"]["translation"]["test"]["loss"])


def test_devices_change_nothing(pairs, tmp_path):
    """One device and four: the same losses, and the same texts."""
    short = (Phase("everything", steps=3),)
    runs = [
        train(tiny_translation.experiment(pairs, devices=devices, phases=short), tmp_path / str(devices)) for devices in (1, 4)
    ]
    for split in ("dev", "test"):
        one, four = (run["tasks"]["translation"][split] for run in runs)
        assert one.keys() == four.keys()
        for name in one:
            assert one[name] == pytest.approx(four[name], abs=1e-3)


def test_a_run_that_is_stopped_goes_on_to_the_same_numbers(pairs, tmp_path, monkeypatch):
    experiment = tiny_translation.experiment(pairs, trunk=dataclasses.replace(tiny_translation.TRUNK, dropout=0.1))
    whole = train(experiment, tmp_path / "whole")
    monkeypatch.setattr(Stop, "requested", lambda self, step: step == 4)
    with pytest.raises(Interrupted):
        train(experiment, tmp_path / "stopped")
    monkeypatch.undo()
    again = train(experiment, tmp_path / "stopped")
    assert whole["tasks"] == again["tasks"]

    def params(folder):
        store = Store(folder, experiment.checkpoints, read_only=True)
        try:
            return store.best(store.restore_params).value
        finally:
            store.close()

    a, b = params(tmp_path / "whole"), params(tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, a, b)
