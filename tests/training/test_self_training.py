"""Learning from rows without labels: the choices as functions; rounds of a run, stopped by a signal; consistency."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from mtl_jax import (
    Consistency,
    Embedding,
    Hooks,
    Interrupted,
    MaskedLM,
    Regression,
    SelfTraining,
    Source,
    evaluate,
    pseudo_label,
    train,
)
from mtl_jax.cli import main
from mtl_jax.core.errors import UserError
from mtl_jax.data.stream import stream
from mtl_jax.experiment_checks import check
from mtl_jax.inference import pseudo_label as pseudo_labelling
from mtl_jax.inference.predict import open_run
from mtl_jax.tasks import Classification
from mtl_jax.training.regularisation import output_losses, pseudo_rows
from mtl_jax.training.regularisation.transforms import hidden_tokens
from mtl_jax.training.setup import mixture_phases, prepare
from mtl_jax.transfer import choose, self_training
from mtl_jax.transfer.pseudo_labels import predicted_from


def test_choices():
    """Two passes over five rows; rows 0 and 1 have the same mean, and the passes agree on the first only."""
    first = np.array([0.9, 1.0, 0.8, 0.3, 0.45])
    second = np.array([0.9, 0.8, 0.8, 0.3, 0.45])
    passes = np.stack([np.stack([p, 1 - p], axis=-1) for p in (first, second)])
    predicted = predicted_from(passes, "softmax")
    np.testing.assert_array_equal(predicted.classes, [0, 0, 0, 1, 1])
    np.testing.assert_allclose(predicted.gain[[0, 2, 3, 4]], 0, atol=1e-12)
    assert predicted.gain[1] == pytest.approx(
        -(0.9 * np.log(0.9) + 0.1 * np.log(0.1)) + (0.8 * np.log(0.8) + 0.2 * np.log(0.2)) / 2
    )
    assert predicted.variance[1] == pytest.approx(0.01)

    def chosen(choice, **options):
        return np.flatnonzero(choose(passes, "softmax", choice, **options).weights).tolist()

    assert chosen("confidence", threshold=0.7) == [0, 1, 2, 3]
    assert chosen("confidence", threshold=0.5, per_class=1) == [0, 3]
    assert chosen("balanced", threshold=0.6) == [0, 3]
    assert chosen("uncertainty", threshold=0.5) == [0, 2, 3, 4]
    hard, soft = (choose(passes, "softmax", "confidence", threshold=0.7, soft=soft) for soft in (False, True))
    np.testing.assert_allclose(hard.targets[[0, 3]], [[1, 0], [0, 1]])
    np.testing.assert_allclose(soft.targets[0], [0.9, 0.1], rtol=1e-6)
    assert soft.weights.tolist() == [1, 1, 1, 1, 0]
    yes = choose(np.array([[[0.9, 0.2], [0.6, 0.99]]]), "sigmoid", "confidence", threshold=0.7)
    assert (yes.weights.tolist(), yes.targets[0].tolist()) == ([1, 0], [1, 0])
    with pytest.raises(UserError, match="choice of pseudo-labels"):
        choose(passes, "softmax", "luck", threshold=0.5)


def texts(count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choice(["who", "where", *tiny.OTHER]) for _ in range(rng.randint(4, 9))) for _ in range(count)]


def declared(folder):
    """A classifier on a word embedding with dropout in its head, and two rounds on rows without labels."""
    tiny.write_data(folder / "data", rows=60)
    labelled = tiny.experiment("", folder / "data").sources[1]
    return tiny.experiment(
        "",
        "",
        trunk=Embedding(vocabulary=40, dimension=8),
        sources=(labelled, Source(name="more", rows=[{"text": text} for text in texts(40, 1)])),
        tasks=(Classification(name="coarse", source="questions", column="coarse", dropout=0.2),),
        phases=self_training("questions", "more", 3, 3, rounds=2),
        regularisers=(SelfTraining(source="more", phase="round_1", choose="uncertainty", threshold=0.0, passes=2),),
    )


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """A run of two rounds, and the same run stopped by SIGTERM in its second round and started again."""
    folder = tmp_path_factory.mktemp("rounds")
    experiment = declared(folder)
    held_out = prepare(experiment).corpus.splits["test"]["questions"].data
    copies = [{"text": row.columns["text"].upper()} for row in held_out[:2]]
    more = dataclasses.replace(experiment.sources[1], rows=[*experiment.sources[1].rows.values, *copies])
    experiment = dataclasses.replace(experiment, sources=(experiment.sources[0], more))
    train(experiment, folder / "whole")

    def stop(step, record):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(experiment, folder / "stopped", hooks=Hooks(after_metrics=stop))
    train(experiment, folder / "stopped")
    return experiment, folder, held_out


def test_rounds_resume_with_the_same_bits(rounds):
    _, folder, _ = rounds
    whole, stopped = (open_run(folder / name, "last") for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, stopped.params)
    for name in ("round_1", "round_2"):
        labels = [load_file(folder / run / "reference" / f"self_training-{name}.safetensors") for run in ("whole", "stopped")]
        for key in labels[0]:
            np.testing.assert_array_equal(labels[0][key], labels[1][key])
    chosen = (labels[0]["coarse/weights"] > 0).sum()
    records = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [("loss/self_training" in record) for record in trained] == [False] * 3 + [True] * 6
    assert 0 < chosen < 42
    assert trained[2]["seen/more/rows"] == 0
    assert trained[-1]["seen/more/rows"] > 0


def test_the_stream_of_a_phase_after_a_round_is_the_same_if_it_was_stopped_between_them(tmp_path):
    """A stream of a new process does not know of which source the round read some rows only."""
    prepared = prepare(declared(tmp_path))
    batching, phases = prepared.experiment.batch, mixture_phases(prepared.experiment)

    def opened():
        return stream(prepared.corpus, batching, 0, phases)

    whole, later = opened(), opened()
    with contextlib.closing(whole), contextlib.closing(later):
        for _ in range(3):
            next(whole)
        whole.keep({"more": np.arange(5)}, before=())
        for _ in range(3):
            next(whole)
        later.set_state(whole.get_state())
        for of_stream in (whole, later):
            of_stream.keep({}, before={"more"})
        one, other = next(whole), next(later)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert whole.get_state() == later.get_state()


def test_rows_of_test_are_left_out(rounds):
    _, folder, _ = rounds
    data = json.loads((folder / "whole" / "data.json").read_text())
    assert data["sources"]["more"]["train"]["examples"] == len({" ".join(t.split()) for t in texts(40, 1)})
    assert "dev" not in data["sources"]["more"]


def test_a_changed_file_is_noticed(rounds):
    experiment, folder, _ = rounds
    file = folder / "stopped" / "reference" / "self_training-round_2.safetensors"
    tiny.cut(folder / "stopped", folder / "changed", 8)
    other = folder / "changed" / "reference" / file.name
    other.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\x40")
    with pytest.raises(UserError, match="has changed since this run began"):
        train(experiment, folder / "changed")


def test_a_file_of_labels(rounds, monkeypatch, capsys):
    _, folder, held_out = rounds
    rows = [{"text": text} for text in texts(12, 3)] + [{"text": held_out[0].columns["text"]}]
    output = folder / "labels.jsonl"
    summary = pseudo_label(folder / "whole", rows, output, threshold=0.0)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert summary["copies"] >= 1
    assert summary["rows"] == 13
    assert sum(summary["labels"].values()) == len(lines) == 13 - summary["copies"]
    assert lines[0].keys() == {"text", "coarse", "probability", "from"}
    assert evaluate(folder / "whole", "coarse", lines)["accuracy"] == 1
    command = ["mtl-jax", "pseudo-label", str(folder / "whole"), str(output), "--output", str(folder / "more.jsonl")]
    monkeypatch.setattr(sys, "argv", [*command, "--threshold", "1", "--choice", "balanced"])
    with pytest.raises(SystemExit):
        main.console()
    assert "a label of task 'coarse' with a probability of 1; the highest is" in capsys.readouterr().err
    assert not (folder / "more.jsonl").exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_work(rounds, tmp_path, monkeypatch):
    _, folder, _ = rounds
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n')
    monkeypatch.setattr(pseudo_labelling, "open_run", None)
    for output, message in (
        (tmp_path / "in.jsonl", "the output is the input; give another file"),
        (tmp_path, "it is a directory; the output must be a file"),
        (tmp_path / "no" / "out.jsonl", "there is no directory"),
    ):
        with pytest.raises(UserError, match=message):
            pseudo_label(folder / "whole", tmp_path / "in.jsonl", output)
    for name in ("per_class", "seed"):
        with pytest.raises(UserError, match=f"{name} is -1; it must be at least 0"):
            pseudo_label(folder / "whole", tmp_path / "in.jsonl", tmp_path / "out.jsonl", **{name: -1})
    source = Source("mails", rows=[{"from": "good"}], text="from")
    with pytest.raises(UserError, match="column 'from' of source 'mails' has the name of one that is added to the rows"):
        pseudo_labelling._check_columns(source, rounds[0].tasks[0])


def test_bad_input(rounds):
    experiment, folder, _ = rounds

    def changed(**fields):
        return dataclasses.replace(
            experiment, regularisers=tuple(dataclasses.replace(part, **fields) for part in experiment.regularisers)
        )

    for change, message in (
        (changed(source=""), "needs a source"),
        (changed(source="moer"), "unknown source of self_training"),
        (changed(choose="luck"), "choose of self_training"),
        (changed(passes=1), "passes of self_training is 1"),
        (changed(threshold=2.0), "must be a probability"),
        (dataclasses.replace(experiment, regularisers=(Consistency(drop=0.0),)), "drop of consistency"),
        (dataclasses.replace(experiment, regularisers=(Consistency(temperature=2.0),)), "temperature of consistency"),
    ):
        with pytest.raises(UserError, match=message):
            check(change)
    twice = (Consistency(source="more"), Consistency(name="two", source="more"))
    pairs = Source(name="more", rows=[{"text": "good", "pair": "bad"}], pair="pair")
    for change, message in (
        (changed(phase=""), "where the model has learned nothing yet"),
        (dataclasses.replace(experiment, sources=(experiment.sources[0], pairs)), "only 'more' has pairs of texts"),
        (dataclasses.replace(experiment, regularisers=twice), "leave all but one out"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(change)
    task, (regulariser,) = experiment.tasks[0], experiment.regularisers
    for tasks, of_source, message in (
        ([task], [task], "has labels of task 'coarse'"),
        ([], [], "no task of this run gives probabilities"),
        ([Regression(name="r", source="s")], [], "a Regression, gives no probability of a text's label"),
        ([task], [MaskedLM(name="m", source="more")], "task 'm' changes how source 'more' is read"),
    ):
        with pytest.raises(UserError, match=message):
            pseudo_rows.check(regulariser, tasks, of_source)
    with pytest.raises(UserError, match="no row of 'more' has a label of task 'coarse' with a probability of 1"):
        train(changed(threshold=1.0, choose="confidence"), folder / "none")


def test_consistency_against_numpy():
    task = Classification(name="c", source="s", labels=("a", "b"))
    context = output_losses.LossContext(places={"s": 0, "t": 1}, first_ids={}, teachers={}, phase="")
    loss = output_losses.of_consistency(Consistency(threshold=0.7, temperature=0.5, source="t"), [task], context)
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(4, 2, 2)).astype(np.float32) * 2
    batch = dataclasses.make_dataclass("B", ["index", "source"])(np.zeros((4, 2), np.int32), np.array([1, 0, 1, 0]))
    value = loss.loss({}, None, {"c": jnp.array(outputs)}, batch, loss.count(batch), None)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    expected = 0.0
    for s in range(2):
        if softmax(outputs[0, s]).max() >= 0.7:
            p, q = softmax(outputs[0, s] / 0.5), softmax(outputs[2, s])
            expected += (p * np.log(p / q)).sum() / 2
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_hidden_tokens_leave_special_ones():
    tokenizer = dataclasses.make_dataclass("T", ["mask_token_id", "unk_token_id", "all_special_ids"])(None, 1, [0, 1, 2, 3])
    tokens = np.array([[2, *range(4, 200), 3, 0]], np.int32)
    changed = np.array(hidden_tokens(tokenizer, 0.3)(jax.random.key(0), tokens))
    assert 0.2 < (changed == 1).mean() < 0.4
    np.testing.assert_array_equal(changed[0, [0, -2, -1]], [2, 3, 0])
