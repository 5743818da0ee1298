"""The same from Python as from the command line: public functions, their docstrings' examples, and the log of a script."""

import dataclasses
import doctest
import inspect
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import compiling
import numpy as np
import pytest
import tiny
import tiny_decoder
import tiny_seq2seq

import mtl_jax
from mtl_jax import Evaluation, Phase, UserError, merging
from mtl_jax.cli import main
from mtl_jax.core import parts
from mtl_jax.inference import answer_rows
from mtl_jax.inference import predict as prediction
from mtl_jax.training.experiment_json import from_json
from mtl_jax.training.loggers import LOGGERS

ELSEWHERE = {"launch"}  # tests/launching has the script of its example
NAMES = {name for name in mtl_jax.__all__ if not inspect.ismodule(getattr(mtl_jax, name))} - ELSEWHERE
COMMANDS = (
    "train",
    "predict",
    "evaluate",
    "convert",
    "merge",
    "translate",
    "summarize",
    "generate",
    "ablate",
    "take",
    "results",
    "report",
    "compare",
)


@pytest.fixture(scope="module")
def folder(bert, data, tmp_path_factory):
    """A directory with runs/tiny, a finished run of 3 steps, bert/ and marian/, where the examples run."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "bert").symlink_to(bert)
    tiny_seq2seq.write_marian(folder / "marian")
    tiny_decoder.write_llama(folder / "llama")
    mtl_jax.train(experiment(bert, data), folder / "runs" / "tiny")
    return folder


def experiment(bert, data):
    values = {"phases": (Phase("everything", steps=3),), "evaluation": Evaluation(every=1, baseline="none")}
    return tiny.experiment(bert, data, only=("coarse", "fine"), **values)


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    yield folder
    LOGGERS._functions.pop("lines", None)


def test_the_examples_of_public_names(inside, bert, data, monkeypatch):
    """All examples in one process and directory, as their runs share one tiny model; that of train writes runs for others."""
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--workdir", "runs/tiny"])
    names = {"mtl_jax": mtl_jax, "dataclasses": dataclasses, "Path": Path, "EXPERIMENT": experiment(bert, data)}
    functions = [getattr(mtl_jax, name) for name in sorted(NAMES, key=lambda name: (name != "train", name))]
    functions.append(mtl_jax.data.batches_of)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with parts.forgotten():
        for function in functions:
            tests = finder.find(function, function.__name__, globs=dict(names))
            assert any(test.examples for test in tests), f"{function.__name__} has no example"
            for test in tests:
                result = runner.run(test)
                assert not result.failed, test.name


def test_every_command_has_a_function_of_its_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mtl-jax", "--help"])
    with pytest.raises(SystemExit):
        main.console()
    commands = re.search(r"\{(.*?)\}", capsys.readouterr().out.replace("\n", "")).group(1)
    # Packages that have functions of arrays beside it.
    packages = {
        "affinity": mtl_jax.affinity.of_experiment,
        "audit": mtl_jax.audit.of_experiment,
        "augment": mtl_jax.augment.of_experiment,
    }
    for command in re.split(r"[, ]+", re.sub(r"[^a-z,-]", "", commands)):
        assert callable(packages.get(command) or getattr(mtl_jax, command.replace("-", "_"))), command


def test_the_module_is_the_console_entry():
    command = [sys.executable, "-m", "mtl_jax", "results", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=compiling.environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere: no results.json")


def test_a_model_is_opened_once_and_its_programs_are_kept(inside, monkeypatch):
    model = mtl_jax.load_model("runs/tiny")
    monkeypatch.setattr(prediction, "open_run", None)
    texts = ["who is the man ?", "where is the city ?"]
    first = model.predict("fine", texts)
    apply, _ = model.outputs("fine")
    assert mtl_jax.predict(model, "fine", texts * 9) == first * 9
    assert model.evaluate("fine", [{"text": texts[0], "fine": "HUM:man"}])["rows"] == 1
    assert model.outputs("fine")[0] is apply
    assert apply._cache_size() <= 2  # with labels and without


def test_the_most_likely_labels(inside, monkeypatch, capsys):
    [answer] = mtl_jax.predict("runs/tiny", "fine", ["who is the man ?"], top_k=99)
    top = answer["top"]
    assert sum(entry["probability"] for entry in top) == pytest.approx(1, abs=1e-5)
    assert top == sorted(top, key=lambda entry: -entry["probability"])
    assert (top[0]["label"], top[0]["probability"]) == (answer["label"], answer["probability"])
    monkeypatch.setattr(sys, "argv", ["mtl-jax", "predict", "runs/tiny", "--task", "fine", "--text", "who ?", "--top-k", "2"])
    main.console()
    assert len(json.loads(capsys.readouterr().out)["top"]) == 2
    with pytest.raises(UserError, match="top_k is 0; it must be at least 1"):
        mtl_jax.predict("runs/tiny", "fine", ["who"], top_k=0)


def test_the_most_likely_labels_have_the_names_that_people_read():
    task = mtl_jax.Classification(name="a", source="s", labels=("0", "1"), label_names={"1": "joy"})
    assert [entry["label"] for entry in answer_rows.top(task, np.float32([-1, 2]), 9)] == ["joy", "0"]


def test_the_most_likely_of_several_labels_and_of_none():
    labels = mtl_jax.Multilabel(name="a", source="s", labels=("x", "y"))
    assert [entry["label"] for entry in answer_rows.top(labels, np.float32([-1, 2]), 1)] == ["y"]
    with pytest.raises(UserError, match="task 'b': Regression has no probability for each label; leave top_k out"):
        answer_rows.top(mtl_jax.Regression(name="b", source="s"), np.float32([1]), 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mtl_jax.results(), "no workdir given"),
        (lambda: mtl_jax.report(), "no workdir given"),
        (lambda: mtl_jax.evaluate("runs/tiny", "fine", []), "rows has no rows"),
        (lambda: mtl_jax.evaluate("runs/tiny", "fine", ["text"]), r"questions.rows\[0\]: the row is a str; it must be a dict"),
        (lambda: mtl_jax.evaluate("runs/tiny", "fine", [{"text": "who", "fine": "X"}]), r"rows\[0\]: .*label 'X' is not in"),
        (lambda: mtl_jax.translate("marian", "hello"), "texts is a text; it must be a list of texts"),
        (lambda: mtl_jax.translate("runs/tiny", ["hello"]), "runs/tiny: no task of this run writes texts"),
        (lambda: mtl_jax.translate(mtl_jax.pretrained.load("bert"), ["hello"]), "bert: this checkpoint cannot generate texts"),
        (lambda: mtl_jax.translate("llama", ["hello"]), "llama: LlamaForCausalLM answers prompts: use mtl-jax generate"),
        (
            lambda: mtl_jax.generate("llama", ["a"], prompt="{b}"),
            "text 1: --prompt: the row has no column 'b', which prompt names",
        ),
        (lambda: mtl_jax.generate("marian", ["a"], chat=True), "marian: --chat is for decoder-only checkpoints; leave it out"),
        (
            lambda: mtl_jax.generate("runs/tiny", ["a"], prompt="{text}"),
            "runs/tiny: a run's task has its own prompt; leave out",
        ),
        (lambda: mtl_jax.translate("marian", ["hello"], task="a"), "--task a: marian is not the workdir of a run"),
        (lambda: mtl_jax.merge("x", ["a", "b"], merging.Method("soup"), alpha=0.5), "soup: the numbers of a Method are its"),
        (lambda: mtl_jax.merge("x", ["a", "b"], "soap"), r"unknown method 'soap' \(did you mean 'soup'\?\)"),
    ],
)
def test_bad_input_from_python_is_one_line(inside, call, message):
    with pytest.raises(UserError, match=message):
        call()


SCRIPT = """
import logging, mtl_jax
{before}
mtl_jax.train(EXPERIMENT, "runs/tiny")
{after}
mtl_jax.train(EXPERIMENT, "runs/tiny")
"""


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ("", "", ["runs/tiny is done"] * 2),
        ("", "logging.basicConfig(level='INFO')", ["runs/tiny is done", "INFO:mtl_jax.training.train:runs/tiny is done"]),
        ("logging.basicConfig(level='ERROR')", "", []),
    ],
)
def test_a_script_sees_the_lines_of_the_log(inside, monkeypatch, capsys, before, after, lines):
    """As in a script, where pytest's handlers are not there."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    config = json.loads(Path("runs/tiny/config.json").read_text())
    names = {"EXPERIMENT": from_json(config, "config.json")}
    exec(SCRIPT.format(before=before, after=after), names)
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("page", ["python.md", "parts/hooks.md"])
def test_the_code_of_the_guide(inside, bert, data, page):
    """Its blocks in order, in the directory where the examples ran, so that most of its runs are done."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    names = {"EXPERIMENT": experiment(bert, data)}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_every_command_is_in_the_table_of_the_guide():
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"| `mtl_jax.{name}(" in text, name
