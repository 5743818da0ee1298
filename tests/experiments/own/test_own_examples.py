"""The examples of experiments/own, as their users run them: a part of one's own works in every place like one of ours."""

import json
from pathlib import Path
from typing import NamedTuple

import own_parts
import processes
import pytest
import tiny


class Example(NamedTuple):
    """What is special about an example.

    Attributes:
        parts: {name: door} in config.json.
        flag: A flag of the part, and its value.
        field: (path in config.json, the value) that the flag sets.
        vary: What an ablation varies.
    """

    parts: dict[str, str]
    flag: tuple[str, ...]
    field: tuple[tuple[str, ...], object]
    vary: str


EXAMPLES = {
    "weighting.py": Example(
        {"inverse_norm": "weighting rule", "warmup": "combinator"},
        ("--weighting-options", "power", "0.5", "--combinators", "warmup:steps=3"),
        (("weighting_options", "power"), 0.5),
        "weighting=equal,inverse_norm",
    ),
    "task.py": Example({"Graded": "task"}, ("--tasks.0.grades", "7"), (("tasks", "0", "grades"), 7), "tasks.0.grades=5,6"),
    "regulariser.py": Example(
        {"ConfidencePenalty": "regulariser", "HeadsAlike": "regulariser"},
        ("--regularisers.1.layer", "hidden/kernel"),
        (("regularisers", "1", "layer"), "hidden/kernel"),
        "regularisers.0.weight=0,0.1",
    ),
    "metric.py": Example(
        {"roc_auc": "metric"},
        ("--tasks.0.metric", "accuracy", "--tasks.0.more-metrics", "roc_auc"),
        (("tasks", "0", "more_metrics"), ["roc_auc"]),
        "optimizer.learning-rate=1e-3,1e-2",
    ),
}


class Trained(NamedTuple):
    script: Path
    flags: list[str]
    workdir: Path
    example: Example


@pytest.fixture(scope="module", params=EXAMPLES)
def run(request, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param.removesuffix(".py"))
    script = own_parts.copied(request.param, folder)
    example = EXAMPLES[request.param]
    flags = [*own_parts.SMALL, *own_parts.data_flags(folder / "data"), *example.flag]
    own_parts.start(script, *flags, "--workdir", str(folder / "run"))
    return Trained(script, flags, folder / "run", example)


def value(values, path):
    for name in path:
        values = values[int(name) if isinstance(values, list) else name]
    return values


def test_its_flag_and_config_json(run):
    config = json.loads((run.workdir / "config.json").read_text())
    path, expected = run.example.field
    assert value(config, path) == expected
    assert {name: part["door"] for name, part in config["parts"].items()} == run.example.parts
    assert {Path(part["file"]).name for part in config["parts"].values()} == {run.script.name}
    assert {len(part["sha256"]) for part in config["parts"].values()} == {64}


def test_predict_and_evaluate_with_import_alone(run, capsys):
    """In a new process: the file is named where it is needed and not imported; with --import it works."""
    arguments = ["predict", str(run.workdir), "--task", "movies", "--text", "a fine film", ""]
    without = processes.run(*arguments, code=processes.CONSOLE)
    needs_class = set(run.example.parts.values()) & {"task", "regulariser"}
    if needs_class:
        assert without.returncode == 2
        assert without.stderr.count("\n") == 1
        assert f"is a class of {run.script}, which is not imported; add --import {run.script}" in without.stderr
    capsys.readouterr()
    own_parts.command(*arguments, "--import", str(run.script))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert second == {"error": "empty text"}
    assert first.keys() & {"label", "grade"}
    if not needs_class:
        assert json.loads(without.stdout.splitlines()[0]) == first
    data = str(run.script.parent / "data" / "sentiment.tsv")
    own_parts.command("evaluate", str(run.workdir), "--task", "movies", "--path", data, "--import", str(run.script))
    scores = json.loads(capsys.readouterr().out)
    assert scores.keys() >= {"rows", "loss", *(["roc_auc"] if run.script.name == "metric.py" else [])}


def test_it_resumes_bit_for_bit_and_refuses_a_changed_file(run, tmp_path, capsys):
    tiny.cut(run.workdir, tmp_path / "cut", 2)
    own_parts.start(run.script, *run.flags, "--workdir", str(tmp_path / "cut"))
    whole, resumed = ((folder / "results.json").read_text() for folder in (run.workdir, tmp_path / "cut"))
    assert json.loads(whole)["tasks"] == json.loads(resumed)["tasks"]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run.workdir, tmp_path / "cut")]
    assert lines[0] == lines[1]
    tiny.cut(run.workdir, tmp_path / "changed", 2)
    text = run.script.read_text(encoding="utf-8")
    run.script.write_text(text + "# changed\n", encoding="utf-8")
    try:
        with pytest.raises(SystemExit) as stopped:
            own_parts.start(run.script, *run.flags, "--workdir", str(tmp_path / "changed"))
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert "has changed since" not in error  # the refusal below says it, once
        (line,) = error.splitlines()[-1:]
        for name, part in json.loads((run.workdir / "config.json").read_text())["parts"].items():
            assert f'parts.{name}.sha256 was "{part["sha256"]}", is "' in line
    finally:
        run.script.write_text(text, encoding="utf-8")


def test_report_and_convert(run, tmp_path, capsys):
    own_parts.command("report", str(run.workdir), "--output", str(tmp_path / "report"), "--import", str(run.script))
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000
    with pytest.raises(SystemExit):
        own_parts.command("convert", str(run.workdir), str(tmp_path / "out"), "--import", str(run.script))
    assert "transformers" in capsys.readouterr().err.splitlines()[-1]  # no class for a trunk from scratch


def test_ablate(run, tmp_path):
    arguments = ["--workdir", str(tmp_path / "runs"), "--vary", run.example.vary, "--", *run.flags]
    own_parts.command("ablate", str(run.script), *arguments)
    index = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert [entry["status"] for entry in index["runs"]] == ["done"] * 2
    config = json.loads((tmp_path / "runs" / "runs" / index["runs"][-1]["run"] / "config.json").read_text())
    assert config["parts"].keys() <= run.example.parts.keys()
    assert config["parts"]
