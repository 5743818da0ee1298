"""Kinds that compare examples, from end to end: one run with four of them on one trunk."""

import dataclasses
import json
import random

import numpy as np
import pytest
import tiny

from mtl_jax import (
    Contrastive,
    Evaluation,
    MultipleChoice,
    Ordinal,
    Phase,
    Ranking,
    Source,
    convert,
    evaluate,
    load_model,
    predict,
    train,
)
from mtl_jax.core.errors import UserError
from mtl_jax.experiment_checks import check
from mtl_jax.tasks.contrastive import unit_length


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """An experiment, the workdir of its run, its results."""
    folder = tmp_path_factory.mktemp("several")
    tiny.write_bert(folder / "bert", layers=1)
    rng = random.Random(0)

    def text(words, least=2):
        return " ".join(rng.choice(words) for _ in range(rng.randint(least, 4)))

    questions = [
        {
            "text": text(tiny.OTHER, 4),
            "a": text(tiny.GOOD),
            "b": text(tiny.BAD),
            "c": "" if n % 4 else "film",
            "label": str(n % 2),
        }
        for n in range(40)
    ]
    passages = [
        {"text": f"{text(tiny.GOOD)} {text(tiny.BAD + tiny.OTHER, 3)}", "query": f"q{n // 5}", "label": str(n % 3)}
        for n in range(60)
    ]
    pairs = [
        {"text": f"{text(topic)} {tiny.OTHER[n % 9]}", "pair": text(topic), "no": "" if n == 3 else "who is"}
        for n, topic in enumerate([tiny.GOOD, tiny.BAD] * 20)
    ]
    experiment = tiny.experiment(
        folder / "bert",
        "",
        sources=(
            Source(name="questions", rows=questions),
            Source(name="passages", rows=passages, group="query", cut_test=0.2),
            Source(name="pairs", rows=pairs, pair="pair"),
        ),
        tasks=(
            MultipleChoice(name="choice", source="questions", choices=("a", "b", "c")),
            Ranking(name="order", source="passages", group="query", together=3),
            Ordinal(name="grade", source="passages"),
            Contrastive(name="sim", source="pairs", negatives=("no",), widths=(4,)),
        ),
        phases=(Phase("all", steps=1),),
        evaluation=Evaluation(baseline="none"),
    )
    return experiment, folder / "run", train(experiment, folder / "run")


def test_metrics(several):
    results = several[2]
    metrics = {name: scores["metric"] for name, scores in results["tasks"].items()}
    assert metrics == {"choice": "accuracy", "order": "ndcg", "grade": "kappa", "sim": "mrr"}
    assert {"mrr", "ndcg", "accuracy", "mrr_4", "loss"} <= results["tasks"]["sim"]["test"].keys()


def test_choices_and_orders(several):
    experiment, folder, _ = several
    model = load_model(folder)
    questions = experiment.sources[0].rows.values
    answers = predict(model, "choice", questions)
    assert len(answers[0]["probabilities"]) == 3
    assert answers[1]["probabilities"][2] == 0
    assert answers[0]["text"] == questions[0]["abc"[answers[0]["choice"]]]
    right = [str(answer["choice"]) == row["label"] for answer, row in zip(answers, questions, strict=True)]
    assert evaluate(model, "choice", questions)["accuracy"] == pytest.approx(np.mean(right))
    order, grade = experiment.tasks[1], model.run.task("grade")
    assert order.describe([np.array([0.5])], (), None) == {"score": 0.5}
    assert grade.describe([np.array([1.0, -1.0])], (), None)["label"] == "1"


def test_vectors(several):
    experiment, folder, _ = several
    model = load_model(folder)
    rows = experiment.sources[2].rows.values[:4]
    pair, single = predict(model, "sim", rows), predict(model, "sim", [rows[0]["text"], rows[0]["pair"]])
    vectors = np.array([answer["vector"] for answer in single])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0] @ vectors[1], pair[0]["cosine"], atol=1e-5)
    assert "negatives" in pair[0]
    assert "negatives" not in pair[3]
    assert "truncated" not in pair[0]
    assert predict(model, "sim", ["film " * 20])[0]["truncated"]
    with pytest.raises(UserError, match="has no column 'no' for task 'sim'"):
        evaluate(model, "sim", [{"text": "good", "pair": "fine"}])


@pytest.fixture(scope="module")
def exported(several, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    assert "sentence-transformers" in convert(several[1], folder, task="sim")
    return folder


def test_the_export(several, exported, tmp_path):
    modules = json.loads((exported / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((exported / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    assert json.loads((exported / "sentence_bert_config.json").read_text())["max_seq_length"] == 8
    assert "pipeline_tag: sentence-similarity" in (exported / "README.md").read_text()
    with pytest.raises(UserError, match="only heads of"):
        convert(several[1], tmp_path / "other", task="order")


@pytest.mark.long
def test_transformers_gives_our_vectors(several, exported):
    """The mean of the vectors that transformers computes, scaled to length 1, is ours."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model, tokenizer = (opener.from_pretrained(exported) for opener in (transformers.AutoModel, transformers.AutoTokenizer))
    with torch.no_grad():
        hidden = model(**tokenizer("the film is great", return_tensors="pt")).last_hidden_state[0].numpy()
    expected = predict(several[1], "sim", ["the film is great"])[0]["vector"]
    np.testing.assert_allclose(unit_length(hidden.mean(axis=0, keepdims=True))[0], expected, atol=2e-6)


def test_bad_input(several):
    experiment = several[0]

    def changed(name, batch=None, **fields):
        tasks = [dataclasses.replace(task, **fields) if task.name == name else task for task in experiment.tasks]
        return dataclasses.replace(experiment, tasks=tuple(tasks), batch=dataclasses.replace(experiment.batch, **(batch or {})))

    for change, message in (
        (changed("choice", choices=()), "choices is empty"),
        (changed("choice", choices=("a",)), "set most to the most choices"),
        (changed("choice", answers=("A",)), "answers has 1 values for 3 choices"),
        (changed("order", together=1), "together is 1"),
        (changed("order", objective="triples"), "unknown objective"),
        (changed("order", group="text"), "set group='text' in source 'passages' too"),
        (changed("grade", labels=("a",)), "an order needs two"),
        (changed("sim", compare="words"), "unknown compare of task 'sim'"),
        (changed("sim", compare="labels", negatives=()), "column must name the column with the label"),
        (changed("sim", column="score", negatives=(), metric=""), "which in_batch does not read"),
        (changed("sim", objective="cosent"), "objective cosent needs the score"),
        (changed("sim", hidden=3), "hidden and dropout are those of a projection"),
        (changed("sim", scale=0.0), "scale is 0"),
        (changed("sim", source="passages"), "names no second text"),
        (changed("grade", source="pairs"), "reads the texts one by one, 'grade' as a pair"),
        (changed("", batch={"accumulate": 2}), "set batch.recompute"),
        (changed("", batch={"packed": False}), "needs packed rows"),
        (changed("", batch={"examples_per_row": 2}), "raise it to 3"),
        (changed("", batch={"row_length": 8}), "make it longer"),
    ):
        with pytest.raises(UserError, match=message):
            check(change)
    twice = (*experiment.tasks, dataclasses.replace(experiment.tasks[3], name="two"))
    with pytest.raises(UserError, match="both keep texts together; declare the same file"):
        check(dataclasses.replace(experiment, tasks=twice))
    with pytest.raises(UserError, match="widths has 16, but its vectors have 16"):
        dataclasses.replace(experiment.tasks[3], widths=(16,)).on(type("Facts", (), {"width": 16}))
