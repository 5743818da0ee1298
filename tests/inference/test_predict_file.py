"""Predictions of a file: those of predict, in order, resumable to the byte."""

import dataclasses
import io
import json
import signal
import sys
import time
from pathlib import Path

import finished_runs
import pytest
import tiny
from processes import CONSOLE, Process
from tokenizers import normalizers

from mtl_jax import Embedding, Interrupted, MultipleChoice, Source, UserError, load_model, predict_file
from mtl_jax.cli import main
from mtl_jax.inference import answer_rows
from mtl_jax.inference import predict_file as of_file
from mtl_jax.inference.predict_file import Request, answer_file
from mtl_jax.inference.resumable_output import part_of

WORDS = ["the film is great", "who is the man ?", "a sad song", "where was the city . " * 9, "", "é", "who was bad ?"]
ROWS = [{"id": n, "text": WORDS[n % len(WORDS)] + " good" * (n % 5)} if n % 11 else {"id": n, "text": " "} for n in range(60)]
TASKS = ("rating", "coarse", "fine")


@pytest.fixture(scope="module")
def model(workdir):
    return load_model(workdir)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "in.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return file


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same(answers, expected):
    """Equal, numbers to the last digits of what is written."""
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.keys() == wanted.keys()
        for name, value in wanted.items():
            assert answer[name] == (pytest.approx(value, abs=3e-6) if isinstance(value, float) else value)


def test_several_tasks_in_one_pass_on_all_devices_are_what_predict_says(model, file, tmp_path, caplog):
    """Two sources, of which texts are read in the same way: one pass of the trunk; and more rows than a device has."""
    [reading] = answer_rows.readings(model.run, TASKS)
    assert [task.name for task in reading.tasks] == [*TASKS]
    summary = predict_file(model, TASKS, file, tmp_path / "out.jsonl", with_input=True, chunk=25)
    expected = {task: model.predict(task, ROWS) for task in TASKS}
    errors = [answer for answer in expected["coarse"] if "error" in answer]
    assert summary == {"rows": 60, "errors": len(errors)}
    assert "rows have an error in place of a prediction, the first: input 1: empty text" in caplog.text
    answers = lines(tmp_path / "out.jsonl")
    assert [{"id": row["id"], "text": row["text"]} for row in answers] == ROWS
    for task in TASKS:
        same([row["prediction"][task] for row in answers], expected[task])
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_text_in_each_line_from_a_pipe(model, monkeypatch, capsysbinary):
    """Standard input is read twice; an empty line is an answer, too."""
    texts = ["who is the man ?", "", "a sad song"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(texts).encode("utf-8-sig"))))
    assert answer_file(model, Request(("fine",), ("the man",), "-", chunk=2), "-") == {"rows": 4, "errors": 1}
    same([json.loads(line) for line in capsysbinary.readouterr().out.splitlines()], model.predict("fine", ["the man", *texts]))


def test_texts_with_a_row_each_are_cut_together(model, tmp_path):
    """Batches of short texts have short rows, and the answers are those of packed rows."""
    experiment = dataclasses.replace(
        model.run.experiment, batch=dataclasses.replace(model.run.experiment.batch, packed=False, rows=4)
    )
    alone = model._replace(run=model.run._replace(experiment=experiment))
    assert of_file._buckets(alone, experiment.batch) == (16,)
    (tmp_path / "in.txt").write_text("\n".join(WORDS), encoding="utf-8")
    assert predict_file(alone, "fine", tmp_path / "in.txt", tmp_path / "out.jsonl", chunk=4) == {"rows": 7, "errors": 1}
    same(lines(tmp_path / "out.jsonl"), model.predict("fine", WORDS))


def test_what_was_stopped_resumes_with_the_same_settings_only(model, file, tmp_path, monkeypatch):
    request, output = Request(("fine",), file=str(file), top_k=2, chunk=9), str(tmp_path / "out.jsonl")
    answer_file(model, request, str(tmp_path / "whole.jsonl"))
    answers, chunks = of_file._answers, []

    def third_fails(model, request, readings, compute, chunk):
        chunks.append(chunk[0].number)
        if len(chunks) == 3:
            raise Interrupted("stopped")
        return answers(model, request, readings, compute, chunk)

    monkeypatch.setattr(of_file, "_answers", third_fails)
    with pytest.raises(Interrupted):
        answer_file(model, request, output)
    part = part_of(Path(output))
    part.write_bytes(part.read_bytes()[:-5])  # as if the process had been killed within a line
    kept = part.read_bytes()
    other = [
        (Request(("coarse",), file=str(file), chunk=9), r"values of task \(\[\"fine\"\] then, \[\"coarse\"\] now\), top_k"),
        (Request(("fine",), file=str(file), top_k=2, chunk=10), r"values of chunk \(9 then, 10 now\); repeat that command"),
    ]
    for changed, message in other:
        with pytest.raises(UserError, match=message):
            answer_file(model, changed, output)
    head = model.run.params["heads"]["fine"]
    heads = {**model.run.params["heads"], "fine": {**head, "output": {**head["output"], "bias": head["output"]["bias"] + 1}}}
    moved = model._replace(run=model.run._replace(params={**model.run.params, "heads": heads}))
    with pytest.raises(UserError, match="had other values of model; repeat"):
        answer_file(moved, request, output)
    assert part.read_bytes() == kept
    answer_file(model, request, output)
    assert chunks == [1, 10, 19, *range(10, 60, 9)]  # the first chunk is not computed again
    assert Path(output).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_a_killed_process_resumes_to_the_byte(model, workdir, tmp_path):
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2), encoding="utf-8")
    options = ("--file", file, "--output", output, "--rows", 20, "--chunk", 1)
    process = Process("predict", workdir, "--task", "coarse", *options, code=CONSOLE, apart=True)
    part, deadline = part_of(output), time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if part.exists() and part.read_bytes().count(b"\n") > 5:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    assert 5 < part.read_bytes().count(b"\n") < 120
    predict_file(model, "coarse", file, output, rows=20, chunk=1)
    predict_file(model, "coarse", file, tmp_path / "whole.jsonl", rows=20, chunk=1)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(lines(output)) == 120


def test_a_line_without_a_choice_is_an_error_before_any_work(tmp_path):
    """Choices are no text columns of the source, and are read with them."""
    texts = [f"a {first} {second}" for first in tiny.GOOD + tiny.BAD for second in tiny.OTHER[:4]]
    rows = [{"text": text, "a": "good", "b": "bad", "label": str(n % 2)} for n, text in enumerate(texts)]
    task = MultipleChoice(name="choice", source="asked", choices=("a", "b"))
    changes = {
        "sources": (Source("asked", rows=rows, cut_dev=0.3, cut_test=0.3),),
        "tasks": (task,),
        "trunk": Embedding(dimension=8),
    }
    finished_runs.write(tmp_path / "run", tiny.experiment("", "", **changes))
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], {}, {"text": "who"}]))
    with pytest.raises(UserError, match=r"in\.jsonl: input 4: source 'asked' has no column 'a' for task 'choice'"):
        predict_file(tmp_path / "run", "choice", file, output, chunk=1)
    assert not part_of(output).exists()
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], {}]))
    assert predict_file(tmp_path / "run", "choice", file, output, chunk=1) == {"rows": 3, "errors": 1}


def test_a_text_of_which_no_token_is_left_has_no_label(model, tmp_path, monkeypatch):
    backend = model.run.trunk.tokenizer.backend_tokenizer
    monkeypatch.setattr(backend, "normalizer", normalizers.Replace("song", ""))
    texts = ["who is the man ?", "song", "a sad song"]
    first, second, third = model.predict("fine", texts)
    assert second == {"error": "the text has no token that the vocabulary knows"}
    assert (first, third) == tuple(model.predict("fine", texts[::2]))


@pytest.mark.parametrize(
    ("flags", "rows", "message"),
    [
        (("--task", "fine", "--task", "coarce"), "", "unknown task 'coarce' (did you mean 'coarse'?)"),
        (("--task", "fine", "--task", "fine"), "", "task names a task twice: fine, fine"),
        (
            ("--task", "fine"),
            '{"text": "a"}\n{"text": 3}\n',
            "in.jsonl: input 2: source 'questions' needs the text columns text",
        ),
        (("--task", "fine"), '{"text": "a"}\n{"text"', "in.jsonl:2: not JSON"),
        (("--task", "fine"), '["a"]\n', "in.jsonl:1: "),
        (("--task", "fine", "--with-input"), '{"text": "a", "prediction": 1}', "input 1: there is a 'prediction' already"),
        (("--task", "fine", "--with-input"), '{"text": "a", "x": "\\ud800"}', "input 1: no valid Unicode"),
        (("--task", "rating", "--top-k", "2"), "", "Regression has no probability for each label; leave top_k out"),
        (("--task", "fine", "--chunk", "0"), "", "chunk is 0; it must be at least 1"),
        (("--task", "fine", "--output", "{file}"), "", "the output is the input; give another file"),
        (("--task", "fine", "--output", "{file}/x"), "", "there is no directory"),
    ],
)
def test_mistakes_are_one_line_before_any_work(model, tmp_path, monkeypatch, capsys, flags, rows, message):
    (tmp_path / "in.jsonl").write_text(rows or '{"text": "who"}\n')
    monkeypatch.setattr(of_file, "opened", lambda workdir: model)
    monkeypatch.setattr(of_file, "_answers", None)
    given = [flag.format(file=tmp_path / "in.jsonl") for flag in flags]
    output = [] if "--output" in given else ["--output", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", ["mtl-jax", "predict", "run", *given, "--file", str(tmp_path / "in.jsonl"), *output])
    with pytest.raises(SystemExit) as stopped:
        main.console()
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
