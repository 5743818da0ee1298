"""Test scores with and without the test rows that are copies of training rows, from the same outputs."""

import json

import numpy as np
import pytest

import mtl_jax
from mtl_jax import Classification, Embedding, Experiment, Phase, Seq2Seq, Source, Tagging, UserError
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.ragged import Ragged
from mtl_jax.training import copy_scores, evaluation
from mtl_jax.training.results_table import tables

LONG = "an old dog sleeps under that red house by our river"


def rows(*texts, **columns):
    return [{"text": text, "label": "ab"[index % 2], **columns} for index, text in enumerate(texts)]


def experiment():
    """Two sources, one of which has copies of its own test rows and of the other's."""
    train = [LONG.replace("red", "blue"), "A moore 's film", *(f"number {i}" for i in range(30))]
    test = [LONG, "a Moore's film", *(f"none of {i}" for i in range(8))]
    films = Source("films", rows=rows(*train), dev_rows=rows("to", "by"), test_rows=rows(*test))
    books = Source(
        "books", rows=rows("old books", "others"), dev_rows=rows("to read", "by me"), test_rows=rows("none", "no one")
    )
    tasks = tuple(Classification(name=source.name, source=source.name) for source in (films, books))
    return Experiment("copied", Embedding(), (films, books), tasks, (Phase("all", 2),))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of the experiment."""
    workdir = tmp_path_factory.mktemp("copied") / "run"
    mtl_jax.train(experiment(), workdir)
    return workdir


def test_results_have_both_scores_where_there_are_copies(run):
    results = json.loads((run / "results.json").read_text())["tasks"]
    assert results["films"]["test_copies"] == {"letters": 1, "near": 1, "rows": 10}
    model = mtl_jax.load_model(run)
    others = rows(*(f"none of {i}" for i in range(8)))
    expected = model.evaluate("films", others)
    assert results["films"]["test_without_copies"]["accuracy"] == pytest.approx(expected["accuracy"])
    assert not {"test_copies", "test_without_copies"} & set(results["books"])


def test_runs_of_an_ablation_have_both_scores(run, tmp_path):
    """Those of the run that is trained alone, for the same numbers."""
    given = experiment()
    rate = given.optimizer.learning_rate
    mtl_jax.ablate(given, tmp_path / "rates", [f"optimizer.learning_rate={rate},{rate / 10}"])
    alone = json.loads((run / "results.json").read_text())["tasks"]
    first, second = (json.loads(path.read_text())["tasks"] for path in sorted((tmp_path / "rates").glob("runs/*/results.json")))
    for tasks in (first, second):
        assert tasks["films"]["test_copies"] == alone["films"]["test_copies"]
        assert "test_copies" not in tasks["books"]
    assert first["films"]["test_without_copies"] == pytest.approx(alone["films"]["test_without_copies"], rel=1e-4)


def test_tables_and_the_report_say_so(run, tmp_path):
    (results,) = mtl_jax.results(run)
    without = results["tasks"]["films"]["test_without_copies"]["accuracy"]
    text = "films: accuracy {} without the 2 of 10 test rows that are copies of training rows (1 letters, 1 near)"
    assert text.format(f"{without:.4f}") in str(mtl_jax.results(run))
    again = json.loads(json.dumps(results))
    again["tasks"]["films"]["test_without_copies"]["accuracy"] = without + 0.2
    assert text.format(f"{without + 0.1:.4f}") in tables([results, again])
    mtl_jax.report(run, output=tmp_path / "report")
    assert 'id="copies"' in (tmp_path / "report" / "report.html").read_text()


def test_a_damaged_entry_is_one_line(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    results["tasks"]["films"]["test_without_copies"] = 3
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="test_without_copies is a number, not an object"):
        mtl_jax.results(tmp_path)


def test_windows_of_words_and_generated_texts():
    data = [Row({"text": ["a", "b", "c"], "tags": ["X", "Y", "X"], "y": "u v"}, f"f:{number}") for number in range(3)]
    words = [np.array([0, 1]), np.array([2]), np.array([0, 1, 2]), np.array([0, 1, 2])]
    tagging = Tagging(name="t", source="s", labels=("X", "Y"), metric="token_accuracy")
    labels = Ragged.of([tagging.parse(data[0])[part] for part in words], np.int32)
    examples = Examples("s", 0, words, {"t": labels}, words=words, rows=np.array([0, 0, 1, 2], np.int32), data=data)
    right = np.eye(2, dtype=np.float32)
    outputs = [right[[0, 1]], right[[0]], right[[1, 1, 1]], right[[0, 1, 0]]]
    predictions = evaluation.Predictions({"t": outputs, "w": [np.zeros((1, 3), np.float32)] * 4}, {})
    seq2seq = Seq2Seq(name="w", source="s", column="y", metric="rouge1")
    texts = {"w": [(data[0], "u"), (data[1], "u v"), (data[2], "u v")]}

    def without(*places):
        kinds = dict.fromkeys(places, "near")
        return copy_scores.without_copies((tagging, seq2seq), {"s": examples}, predictions, texts, {"s": kinds})

    assert without() == {}
    assert without("f:1")["t"] == {"test_without_copies": {"token_accuracy": 1.0}, "test_copies": {"near": 1, "rows": 3}}
    assert without("f:0")["t"]["test_without_copies"] == {"token_accuracy": pytest.approx(4 / 6)}
    assert without("f:0")["w"]["test_without_copies"]["rouge1"] == 1.0
    assert without("f:2")["w"]["test_without_copies"]["rouge1"] == pytest.approx((2 / 3 + 1) / 2)
    assert without("f:0", "f:1", "f:2")["t"]["test_without_copies"] == {}
