"""Every kind of task with every command that takes a run: it works, or one line says why not."""

import dataclasses
import json
import math
import random
import shutil

import pytest
import tiny
import tiny_decoder

import mtl_jax
from mtl_jax import (
    EWC,
    Batching,
    CausalLM,
    Checkpoints,
    Classification,
    Contrastive,
    Distillation,
    Evaluation,
    Experiment,
    MaskedLM,
    Multilabel,
    MultipleChoice,
    Ordinal,
    Phase,
    Pretrained,
    Ranking,
    RDrop,
    Regression,
    Seq2Seq,
    Source,
    Span,
    Tagging,
    UserError,
)
from mtl_jax.core.files import number_of
from mtl_jax.training.setup import prepare

PLACE = {"source": "texts"}
DECODER = {"layers": 1, "heads": 2, "feed_forward": 16, "target_length": 8}
TASKS = (
    Classification(name="classes", column="label", **PLACE),
    Multilabel(name="labels", column="labels", **PLACE),
    Regression(name="number", column="number", **PLACE),
    Ordinal(name="stars", column="stars", labels=("1", "2", "3"), **PLACE),
    Tagging(name="tags", source="words", column="tags"),
    Span(name="answers", source="questions"),
    MaskedLM(name="masked", source="raw"),
    Seq2Seq(
        name="written", source="targets", column="target", layers=1, heads=2, feed_forward=16, target_length=8, metric="chrf"
    ),
    Contrastive(name="vectors", source="pairs", column="score", objective="cosent"),
    MultipleChoice(name="choices", source="stories", choices=("first", "second"), column="right"),
    Ranking(name="order", source="lists", group="query", column="grade", together=2),
)
CAUSAL = CausalLM(name="generated", source="prompts", column="answer", target_length=3, prompt="{text}", metric="f1")


def texts(count, seed):
    """Different texts of tiny's words."""
    rng, seen = random.Random(seed), {}
    while len(seen) < count:
        seen[" ".join(rng.choice(tiny.GOOD + tiny.BAD + tiny.OTHER[:8]) for _ in range(rng.randint(3, 7)))] = None
    return list(seen)


def rows_of(source, seed):
    """The rows of a source: columns that its tasks can learn from the words."""
    rows = []
    for number, text in enumerate(texts(60, seed)):
        words = text.split()
        good, bad = (sum(word in chosen for word in words) for chosen in (tiny.GOOD, tiny.BAD))
        rows.append(
            {
                "texts": {
                    "text": text,
                    "label": "good" if good > bad else "other",
                    "labels": [name for name, counted in (("g", good), ("b", bad)) if counted],
                    "number": good - bad + 0.5,
                    "stars": 1 + (good >= bad) + (good > bad),
                },
                "words": {"text": words, "tags": ["B-good" if word in tiny.GOOD else "O" for word in words]},
                "questions": {
                    "question": "who was the man ?",
                    "context": text,
                    "answers": [{"text": words[1], "start": len(words[0]) + 1}],
                },
                "raw": {"text": text},
                "targets": {"text": text, "target": " ".join(words[:2])},
                "pairs": {"text": text, "second": " ".join(words[::-1]), "score": good},
                "stories": {"text": text, "first": words[0], "second": words[-1], "right": number % 2},
                "lists": {"query": f"q{number // 3}", "text": text, "grade": good},
            }[source]
        )
    return rows


FIELDS = {
    "questions": {"text": "question", "pair": "context"},
    "pairs": {"pair": "second"},
    "lists": {"group": "query"},
}


def sources_of(folder, tasks):
    chosen = []
    for number, name in enumerate(dict.fromkeys(task.source for task in tasks)):
        rows = tiny_decoder.rows() if name == "prompts" else rows_of(name, number)
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        chosen.append(Source(name=name, path=str(path), format="jsonl", cut_dev=0.25, cut_test=0.25, **FIELDS.get(name, {})))
    return tuple(chosen)


def experiment_of(folder, trunk, tasks, **changes):
    values = {
        "name": "kinds",
        "trunk": Pretrained(str(trunk)),
        "sources": sources_of(folder, tasks),
        "tasks": tasks,
        "phases": (Phase("everything", steps=2),),
        "batch": Batching(rows=16, row_length=32, target_length=12),
        "evaluation": Evaluation(every=2, baseline="none"),
        "checkpoints": Checkpoints(every=2),
        "devices": 1,
    }
    return Experiment(**(values | changes))


@pytest.fixture(scope="module")
def runs(shallow, tmp_path_factory):
    """(experiment, workdir) of a run of all kinds on a BERT, and of one on a Llama."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny_decoder.write_llama(folder / "llama")
    shutil.copytree(shallow, folder / "bert")
    tokenizer = json.loads((folder / "bert" / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "bert" / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"mask_token": "?"}), encoding="utf-8")
    encoder = experiment_of(folder, folder / "bert", TASKS)
    decoder = experiment_of(folder, folder / "llama", (CAUSAL,))
    for name, experiment in (("encoder", encoder), ("decoder", decoder)):
        mtl_jax.train(experiment, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_JAX_CACHE", str(folder / "cache"))
        yield (encoder, folder / "encoder"), (decoder, folder / "decoder")


@pytest.fixture(scope="module")
def models(runs):
    """{task: (experiment, its opened run)}."""
    opened = [(experiment, mtl_jax.load_model(workdir)) for experiment, workdir in runs]
    return {task.name: (experiment, model) for experiment, model in opened for task in experiment.tasks}


def source_of(experiment, name):
    (task,) = (task for task in experiment.tasks if task.name == name)
    return next(source for source in experiment.sources if source.name == task.source)


def first_row(source):
    with open(source.path, encoding="utf-8") as file:
        return json.loads(file.readline())


def check(names, command, refused):
    """Runs a command for every kind: it works, but for those in {task: a part of its line}."""
    for name in names:
        if name in refused:
            with pytest.raises(UserError, match=refused[name]) as error:
                command(name)
            assert "\n" not in str(error.value)
        else:
            command(name)


def test_evaluate(models):
    def command(name):
        experiment, model = models[name]
        scores = mtl_jax.evaluate(model, name, source_of(experiment, name).path)
        assert math.isfinite(scores["loss"])
        assert model.run.task(name).metric in scores

    check(models, command, {})


def test_predict(models, tmp_path):
    """Rows in Python, and the same rows in a file, which gives the same answers."""

    def command(name):
        experiment, model = models[name]
        row = first_row(source_of(experiment, name))
        (answer,) = mtl_jax.predict(model, name, [row])
        assert "error" not in answer
        (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        mtl_jax.predict_file(model, name, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
        (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line).keys() == json.loads(json.dumps(answer, allow_nan=False)).keys()

    check(models, command, {"masked": "hides tokens at random: it has no prediction for a text"})


def test_compare(runs, tmp_path):
    """A run against a copy: no difference in any task, and the values of its results."""
    for experiment, workdir in runs:
        shutil.copytree(workdir, tmp_path / workdir.name)
        compared = mtl_jax.compare(workdir, tmp_path / workdir.name, resamples=100)
        (column,) = compared.columns.values()
        for task, result in json.loads((workdir / "results.json").read_text())["tasks"].items():
            reported = number_of(result["test"][result["metric"]])
            assert compared.alone[task].value == pytest.approx(reported, abs=1e-5, nan_ok=True), task
            assert column.differences[task].value == 0 or math.isnan(reported), task
        assert len(compared.alone) == len(experiment.tasks)


def test_memorisation(runs):
    compares = dict.fromkeys(("vectors", "choices", "order"), "is not one of single rows")
    for experiment, workdir in runs:
        single = [task.name for task in experiment.tasks if task.name not in compares]
        assert list(mtl_jax.memorisation(workdir, single, rows=20).memberships) == single
        others = [task.name for task in experiment.tasks if task.name in compares]
        check(others, lambda name, workdir=workdir: mtl_jax.memorisation(workdir, [name], rows=20), compares)


def test_merge(runs, tmp_path):
    for experiment, workdir in runs:
        shutil.copytree(workdir, tmp_path / workdir.name)
        scores = mtl_jax.merge(tmp_path / "merged" / workdir.name, [workdir, tmp_path / workdir.name], method="soup")
        assert scores["tasks"].keys() == {task.name for task in experiment.tasks}


def test_convert(models, runs, tmp_path):
    workdirs = {task.name: workdir for experiment, workdir in runs for task in experiment.tasks}

    def command(name):
        mtl_jax.convert(workdirs[name], tmp_path / name, task=name)
        assert (tmp_path / name / "README.md").exists()

    has_no_form = dict.fromkeys(("stars", "masked", "choices", "order"), "only heads of classification, multilabel")
    check(models, command, has_no_form | {"written": "no class for an encoder checkpoint with a decoder from scratch"})


def test_pseudo_label(models, runs, tmp_path):
    workdirs = {task.name: workdir for experiment, workdir in runs for task in experiment.tasks}

    def command(name):
        path = source_of(models[name][0], name).path
        labelled = mtl_jax.pseudo_label(workdirs[name], path, tmp_path / "labelled.jsonl", task=name, threshold=0.0)
        assert labelled

    gives_none = dict.fromkeys(models.keys() - {"classes", "stars"}, "gives no label to a text; Classification and Ordinal do")
    check(models, command, gives_none)


def test_affinity(runs):
    """With the finished run, for every target: what does not apply is among the notes."""
    experiment, workdir = runs[0]
    result = mtl_jax.affinity.of_experiment(experiment, runs=[workdir], rows=20, resamples=0)
    assert result.rankings.keys() == {task.name for task in TASKS}
    assert all(result.rankings.values())
    notes = "\n".join(result.notes)
    for kind in ("Contrastive", "MultipleChoice", "Ranking", "Seq2Seq", "MaskedLM"):
        assert f"no head of a {kind} can be fitted to features alone" in notes


def test_audit(runs):
    for experiment, _ in runs:
        assert mtl_jax.audit.of_experiment(experiment).to_json(True)


NOT_COMPARED = dict.fromkeys(("answers", "masked", "written", "vectors", "choices", "order", "generated"), "")


@pytest.mark.parametrize(
    ("regulariser", "refused"),
    [
        (Distillation(), dict.fromkeys(NOT_COMPARED, "outputs of a [A-Za-z0-9]* such as '[a-z]*' cannot be imitated")),
        (EWC(labels="data"), dict.fromkeys(("vectors", "choices", "order"), "compares examples, and Fisher information")),
        (RDrop(), dict.fromkeys(NOT_COMPARED, "there is no task whose outputs can be compared")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_regulariser(runs, regulariser, refused):
    for experiment, workdir in runs:

        def command(name, experiment=experiment, workdir=workdir):
            given = {"distillation": {"teacher": str(workdir)}, "ewc": {"source": source_of(experiment, name).name}}
            chosen = dataclasses.replace(regulariser, **given.get(regulariser.name, {}))
            prepare(dataclasses.replace(experiment, only=(name,), regularisers=(chosen,)), abstract=True)

        check([task.name for task in experiment.tasks], command, refused)
