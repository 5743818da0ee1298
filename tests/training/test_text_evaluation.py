"""Runs with a task that decodes, through the whole program."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny_seq2seq
import tiny_translation
from sacrebleu.metrics import BLEU, CHRF

from mtl_jax import Batching, Checkpoints, Evaluation, Optimizer, Phase, Pretrained, Seq2Seq, decoding, pretrained, train
from mtl_jax.core.errors import Interrupted, UserError
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import evaluate, open_run, predict
from mtl_jax.training import sharding, text_evaluation
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.preemption import Stop
from mtl_jax.training.setup import prepare

AT_THE_END = Evaluation(every=100, baseline="none")


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
    assert found["signatures"].keys() == {"bleu", "chrf"}
    assert test.task("translation").beams == 2
    task = results["tasks"]["translation"]
    assert task["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert task["signatures"]["chrf"].startswith("nrefs:1|")
    assert task["dev"].keys() == {"loss", "token_accuracy", "perplexity", "bleu", "chrf"}
    assert "signatures" not in results["tasks"]["long"]


def test_the_last_search_is_left_when_asked_to_stop_and_made_again(pairs, tmp_path, monkeypatch):
    """Everything is trained and saved by then."""
    experiment = tiny_translation.experiment(pairs, phases=(Phase("everything", steps=2),))
    plain, stops = text_evaluation.generated_texts, []

    def stop_at_the_end(*arguments, **named):
        if arguments[-2](experiment.tasks[0]) == experiment.tasks[0].beams:
            stops.append(os.kill(os.getpid(), signal.SIGTERM))
        return plain(*arguments, **named)

    monkeypatch.setattr(text_evaluation, "generated_texts", stop_at_the_end)
    with pytest.raises(Interrupted, match="the same command resumes from the last one"):
        train(experiment, tmp_path / "run")
    assert len(stops) == 1
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.undo()
    assert train(experiment, tmp_path / "run")["steps"] == 2


def test_a_search_that_cannot_be_is_found_out_before_the_training(pairs, tmp_path):
    folder = tiny_seq2seq.write_marian(tmp_path / "marian")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"min_length": 20}))
    task = dataclasses.replace(tiny_translation.experiment(pairs).tasks[0], target_length=12)
    with pytest.raises(UserError, match=r"task 'translation': the least length, 20, is above the largest, 13 tokens \("):
        prepare(
            tiny_translation.experiment(
                pairs, trunk=Pretrained(str(folder)), tasks=(task,), batch=Batching(rows=4, row_length=24)
            )
        )


def test_dev_is_decoded_greedily_while_training(learned):
    folder, results = learned
    run = open_run(folder)
    task = run.task("translation")
    assert text_evaluation.generation_config(task, run.trunk, task.dev_beams).num_beams == 1
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
    experiment = tiny_translation.experiment(pairs, phases=(Phase("everything", steps=2),), evaluation=AT_THE_END)
    experiment = dataclasses.replace(experiment, tasks=(dataclasses.replace(experiment.tasks[0], beams=1), experiment.tasks[1]))
    if "batch_accumulate" in changes:
        changes = {"batch": dataclasses.replace(experiment.batch, accumulate=changes["batch_accumulate"])}
    results = train(dataclasses.replace(experiment, **changes), tmp_path / "run")
    assert np.isfinite(results["tasks"]["translation"]["test"]["loss"])


@pytest.mark.long
def test_devices_change_nothing(pairs, tmp_path, monkeypatch):
    """One device, and four over which the state is cut: the same losses, and the same texts."""
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    changes = {"phases": (Phase("everything", steps=3),), "evaluation": AT_THE_END, "sharding": "fsdp"}
    runs = [
        train(tiny_translation.experiment(pairs, devices=devices, **changes), tmp_path / str(devices)) for devices in (1, 4)
    ]
    for split in ("dev", "test"):
        one, four = (run["tasks"]["translation"][split] for run in runs)
        assert one.keys() == four.keys()
        for name in one:
            assert one[name] == pytest.approx(four[name], abs=1e-3)


@pytest.mark.long
def test_a_run_that_is_stopped_goes_on_to_the_same_numbers(pairs, tmp_path, monkeypatch):
    trunk = dataclasses.replace(tiny_translation.TRUNK, dropout=0.1)
    evaluation = dataclasses.replace(AT_THE_END, every=3)
    experiment = tiny_translation.experiment(pairs, trunk=trunk, evaluation=evaluation)
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


# Checkpoints in and out

ENGLISH = tiny_seq2seq.sentences(tiny_seq2seq.ENGLISH, 40, seed=1)


def still(pairs, path, **changes):
    """A run that starts from a checkpoint and changes nothing: its numbers are the checkpoint's."""
    values = {
        "trunk": Pretrained(str(path)),
        "phases": (Phase("still", steps=1),),
        "optimizer": Optimizer(name="sgd", learning_rate=0.0),
        "evaluation": AT_THE_END,
    }
    experiment = tiny_translation.experiment(pairs, **(values | changes))
    return dataclasses.replace(experiment, tasks=experiment.tasks[:1])


def test_what_is_converted_is_a_checkpoint_that_translates_as_well(learned, pairs, tmp_path):
    folder, results = learned
    convert(str(folder), tmp_path / "marian", task="translation")
    assert json.loads((tmp_path / "marian" / "config.json").read_text())["architectures"] == ["MarianMTModel"]
    found = pretrained.load(str(tmp_path / "marian"))
    assert (found.unused, found.initialized) == ((), ())
    again = train(still(pairs, tmp_path / "marian"), tmp_path / "run")
    for name, value in results["tasks"]["translation"]["test"].items():
        assert again["tasks"]["translation"]["test"][name] == pytest.approx(value, abs=1e-4)
    # And out once more, as the checkpoint that it began as.
    convert(str(tmp_path / "run"), tmp_path / "again", task="translation")
    back = pretrained.load(str(tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, back.params, found.params)
    files = [json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("marian", "again")]
    assert files[0] == files[1]
    assert files[0]["num_beams"] == 2


def test_what_is_converted_generates_the_same(learned, tmp_path):
    folder, _ = learned
    convert(str(folder), tmp_path / "marian", task="translation")
    found = pretrained.load(str(tmp_path / "marian"))
    texts = ["the dog sees the small red fish", "cat"]
    inputs = found.tokenizer(texts, padding=True, return_tensors="np")
    ids, _ = decoding.generate(found, inputs["input_ids"], inputs["attention_mask"])
    expected = [answer["text"] for answer in predict(folder, "translation", texts)]
    assert found.tokenizer.batch_decode(ids, skip_special_tokens=True) == expected


@pytest.mark.parametrize("family", ["marian", pytest.param("t5", marks=pytest.mark.long)])
def test_the_decoder_of_a_checkpoint_learns_on(pairs, tmp_path, family):
    """Also with tokenizers that are not fast, and one of them for each side."""
    folder = {"marian": tiny_seq2seq.write_marian, "t5": tiny_seq2seq.write_t5}[family](tmp_path / family)
    french = tiny_seq2seq.sentences(tiny_seq2seq.FRENCH, len(ENGLISH))
    lines = [{"text": text, "translation": right} for text, right in zip(ENGLISH, french, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    experiment = still(
        tmp_path,
        folder,
        optimizer=Optimizer(learning_rate=1e-3),
        phases=(Phase("on", steps=4),),
        batch=Batching(rows=4, row_length=24),
        evaluation=dataclasses.replace(AT_THE_END, criterion="translation/token_accuracy"),
    )
    prepared = prepare(experiment)
    before, task = pretrained.load(str(folder)), prepared.corpus.tasks[0]
    jax.tree.map(np.testing.assert_array_equal, prepared.params["heads"]["translation"], before.params["head"])
    tokenizer = before.tokenizer
    train_examples = prepared.corpus.splits["train"]["pairs"]
    for row, source, target in zip(
        train_examples.data, train_examples.tokens, train_examples.labels["translation"], strict=True
    ):
        for found, whole in (
            (source, tokenizer(row.columns["text"])["input_ids"]),
            (target, tokenizer(text_target=row.columns["translation"])["input_ids"]),
        ):
            assert found.tolist() == (whole if len(whole) <= 24 else [*whole[:23], whole[-1]])
    assert task.start == before.raw["decoder_start_token_id"]
    results = train(experiment, tmp_path / "run")
    assert np.isfinite(results["tasks"]["translation"]["test"]["loss"])
    convert(str(tmp_path / "run"), tmp_path / "out", task="translation")
    after = pretrained.load(str(tmp_path / "out"))
    assert after.raw["architectures"] == before.raw["architectures"]
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    text = min(ENGLISH, key=len)
    ids, _ = decoding.generate(after, *after.tokenizer([text], return_tensors="np").values(), max_new_tokens=24, num_beams=2)
    (answer,) = predict(tmp_path / "run", "translation", [text])
    assert after.tokenizer.decode(ids[0], skip_special_tokens=True) == answer["text"]


def test_sizes_of_a_checkpoint_cannot_be_chosen(pairs, tmp_path):
    experiment = still(pairs, tiny_seq2seq.write_marian(tmp_path / "marian"))
    for change, message in (
        ({"layers": 2}, "task 'translation': layers is that of the checkpoint's decoder; leave it out"),
        ({"target_length": 25}, "task 'translation': target_length is 25; the checkpoint has 24 positions"),
    ):
        tasks = (dataclasses.replace(experiment.tasks[0], **change),)
        batch = Batching(rows=4, row_length=24, target_length=30)
        with pytest.raises(UserError, match=message):
            prepare(dataclasses.replace(experiment, tasks=tasks, batch=batch))


@pytest.mark.long
def test_what_transformers_has_no_class_for(pairs, bert, tmp_path):
    fresh = tiny_translation.experiment(pairs, trunk=Pretrained(str(bert)), phases=(Phase("short", steps=1),))
    train(fresh, tmp_path / "fresh")
    told = "transformers has no class for an encoder checkpoint with a decoder from scratch; leave --task out"
    with pytest.raises(UserError, match=told):
        convert(str(tmp_path / "fresh"), tmp_path / "out", task="translation")
    convert(str(tmp_path / "fresh"), tmp_path / "out")
    trunk = dataclasses.replace(tiny_translation.TRUNK, pre_norm=True)
    before = tiny_translation.experiment(pairs, trunk=trunk, phases=(Phase("short", steps=1),))
    own = tuple(dataclasses.replace(task, table="own") if isinstance(task, Seq2Seq) else task for task in before.tasks)
    train(dataclasses.replace(before, tasks=own), tmp_path / "before")
    with pytest.raises(UserError, match=r"a class \(Pegasus\) only where trunk and decoder share their token table"):
        convert(str(tmp_path / "before"), tmp_path / "out2", task="translation")
    with pytest.raises(UserError, match="its trunk is from scratch, and transformers has a class for it only with"):
        convert(str(tmp_path / "before"), tmp_path / "out2")
