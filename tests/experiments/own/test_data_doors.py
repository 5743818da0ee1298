"""A format, a mixture and rows of a script, each in its example script: trained, opened, exported, resumed."""

import dataclasses
import json
import random
from pathlib import Path

import own_parts
import pytest
import tiny

from mtl_jax import Experiment, ablate, reporting, train
from mtl_jax.core.errors import UserError
from mtl_jax.data.formats import READERS
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import evaluate, predict
from mtl_jax.training.experiment_json import from_json

EMOTIONS = ("anger", "joy", "optimism", "sadness")


def read(script: str, bert: Path, *flags: str) -> Experiment:
    """The experiment of an example, on a tiny trunk and for two steps."""
    small = ["--trunk.path", str(bert), "--phases.0.steps", "2", "--evaluation.every", "2", "--batch.rows", "4"]
    small += ["--devices", "1", "--batch.row-length", "24"]
    return own_parts.experiment_of(own_parts.FOLDER / script, *small, *flags)


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(tiny.GOOD + tiny.BAD + tiny.OTHER, k=6)) for _ in range(count)]


@pytest.fixture(scope="module")
def tweets(tmp_path_factory) -> Path:
    """Files in the form of TweetEval."""
    folder = tmp_path_factory.mktemp("texts")
    for source, labels in (("emotion", 4), ("irony", 2), ("offensive", 2)):
        (folder / "tweeteval" / source).mkdir(parents=True)
        for seed, (split, count) in enumerate((("train", 40 * labels), ("val", 12), ("test", 12))):
            texts = sentences(count, seed=10 * labels + seed + len(source))
            (folder / "tweeteval" / source / f"{split}_text.txt").write_text("\n".join(texts) + "\n")
            numbers = "\n".join(str(n % labels) for n in range(count))
            (folder / "tweeteval" / source / f"{split}_labels.txt").write_text(f"{numbers}\n")
    (folder / "tweeteval" / "emotion" / "mapping.txt").write_text("".join(f"{n}\t{e}\n" for n, e in enumerate(EMOTIONS)))
    return folder


@pytest.fixture
def data_dir(tweets, monkeypatch) -> Path:
    monkeypatch.setenv("MTL_JAX_DATA", str(tweets))
    return tweets


def test_rows_of_a_script(bert, data_dir, tmp_path, caplog):
    experiment = read("rows.py", bert, "--phases.0.steps", "4", "--evaluation.baseline", "none")
    with caplog.at_level("INFO"):
        whole = train(experiment, tmp_path / "run")
    assert "task emotion: 4 labels (0 = anger, 1 = joy, 2 = optimism, 3 = sadness)" in caplog.text
    config, data = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("config", "data"))
    record = config["sources"][0]["rows"]
    assert record["rows"] == 160
    assert data["rows"]["tweets"]["rows"] == record
    assert data["tasks"]["emotion"]["label_names"] == dict(zip("0123", EMOTIONS, strict=True))
    # The workdir by itself: everything that does not need the rows.
    (answer,) = predict(tmp_path / "run", "emotion", ["the film was good"])
    assert answer["label"] in EMOTIONS
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "emotion": 1}) + "\n" for text in sentences(5, seed=0)))
    assert evaluate(tmp_path / "run", "emotion", str(rows), "jsonl")["rows"] == 5
    convert(str(tmp_path / "run"), tmp_path / "model", task="emotion")
    assert json.loads((tmp_path / "model" / "labels.json").read_text()) == list(EMOTIONS)
    reporting.write(tmp_path / "run", tmp_path / "report")
    assert "0 = anger" in (tmp_path / "report" / "report.html").read_text()
    reopened = from_json(config)
    with pytest.raises(UserError, match="source 'tweets': its rows came from a script; give a path"):
        train(dataclasses.replace(reopened, name="other"), tmp_path / "other")
    # With other rows, it does not resume; finished, it is not taken for the run of these rows.
    train(experiment, tmp_path / "run")
    changed = dataclasses.replace(experiment.sources[0], rows=[{"text": "good", "emotion": "1"}])
    with pytest.raises(UserError, match=f'source tweets: rows changed .their SHA-256 was "{record["sha256"]}", is "'):
        train(dataclasses.replace(experiment, sources=(changed,)), tmp_path / "run")
    tiny.cut(tmp_path / "run", tmp_path / "cut", 2)
    assert train(experiment, tmp_path / "cut")["tasks"] == whole["tasks"]
    ablate(experiment, tmp_path / "ablation", ["optimizer.learning-rate=1e-4,1e-3"])
    (first, *_) = sorted(tmp_path.glob("ablation/runs/*/config.json"))
    assert json.loads(first.read_text())["sources"][0]["rows"] == record


def test_names_of_labels_are_a_flag_and_rows_are_none(bert):
    named = read("rows.py", bert, "--tasks.0.label-names", "0", "cross", "1", "glad")
    assert named.tasks[0].label_names == {"0": "cross", "1": "glad"}
    assert read("rows.py", bert, "--tasks.0.label-names", "names.json").tasks[0].label_names == "names.json"
    assert named.sources[0].rows.values.args == ("train",)
    with pytest.raises(UserError, match=r"unknown flag --sources\.0\.rows"):
        read("rows.py", bert, "--sources.0.rows", "3")


def test_a_format_of_a_script(bert, tmp_path):
    def write(name: str, count: int) -> str:
        texts = sentences(count, seed=count)
        spans = [text.index(text.split()[2]) for text in texts]
        labels = [{"slot": "people", "valueSpan": {"startIndex": start, "endIndex": start + 4}} for start in spans]
        rows = [{"userInput": {"text": text}, "labels": [label]} for text, label in zip(texts, labels, strict=True)]
        (tmp_path / name).write_text(json.dumps([*rows, {"userInput": {"text": "who was the man"}}]))
        return str(tmp_path / name)

    path, test = write("train.json", 80), write("test.json", 12)
    experiment = read("file_format.py", bert, "--sources.0.path", path, "--sources.0.test-path", test)
    train(experiment, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["parts"]["restaurants"]["door"] == "format"
    assert config["parts"]["restaurants"]["file"].endswith("file_format.py")
    (answer,) = predict(tmp_path / "run", "slots", ["the film was good"])
    assert set(answer["tags"]) <= {"O", "B-number_of_guests", "I-number_of_guests"}
    assert evaluate(tmp_path / "run", "slots", test)["rows"] == 13
    convert(str(tmp_path / "run"), tmp_path / "model", task="slots")
    assert "B-number_of_guests" in json.loads((tmp_path / "model" / "config.json").read_text())["id2label"].values()
    # A file that changed since: both hashes. A workdir whose format is not imported: the file to import.
    config["parts"]["restaurants"]["sha256"] = "0" * 64
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f'parts.restaurants.sha256 was "{"0" * 64}", is "'):
        train(experiment, tmp_path / "run")
    functions = dict(READERS)
    READERS._functions.pop("restaurants")
    try:
        with pytest.raises(UserError, match=r"unknown format 'restaurants'.*--import .*file_format\.py"):
            evaluate(tmp_path / "run", "slots", test)
    finally:
        READERS._functions.update(functions)


def test_a_mixture_of_a_script(bert, data_dir, tmp_path):
    experiment = read(
        "mixture.py",
        bert,
        "--batch.mixture",
        "effective:beta=0.99",
        "--only",
        "irony",
        "offensive",
        "--evaluation.baseline",
        "none",
    )
    train(experiment, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["batch"]["mixture"] == "effective:beta=0.99"
    assert config["parts"]["effective"]["door"] == "mixture"
    assert predict(tmp_path / "run", "irony", ["the film was good"])
    ablate(experiment, tmp_path / "ablation", ["batch.mixture=effective:beta=0.9,effective:beta=0.99"])
    assert len(list(tmp_path.glob("ablation/runs/*/results.json"))) == 2
    for text, message in (
        ("effective:bata=1", "it has no option 'bata' .did you mean 'beta'..; write effective:beta=NUMBER"),
        ("effective:beta=1", "beta must be at least 0 and below 1"),
        ("efective", "unknown batch.mixture 'efective' .did you mean 'effective'."),
    ):
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(experiment, batch=dataclasses.replace(experiment.batch, mixture=text)), tmp_path / "x")
