import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import mtl_jax
from mtl_jax import Classification
from mtl_jax.cli import main, scripts
from mtl_jax.core import locks, parts
from mtl_jax.data.splits import read
from mtl_jax.inference.predict import predict


@pytest.fixture
def launch(bert, data, tmp_path, monkeypatch, capsys):
    """Runs the tiny experiment's command line; returns exit code and standard error."""

    def launch(*flags, **changes):
        monkeypatch.setattr(sys, "argv", ["tiny.py", "--workdir", str(tmp_path / "run"), *flags])
        try:
            mtl_jax.main(tiny.experiment(bert, data, **changes), description="tiny")
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return launch


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "rule"),
        (["--weigh-heads", "true"], True),
        (["--weigh-heads", "false"], False),
        (["--weigh-heads=rule"], "rule"),
        (["--weigh_heads", "true", "--seed", "1"], True),
        (["--weigh-heads"], True),  # it was a switch
        (["--weigh-heads", "--seed", "1"], True),
        (["--no-weigh-heads"], False),
        (["--no_weigh_heads", "--seed", "1"], False),
    ],
)
def test_weigh_heads_on_the_command_line(monkeypatch, flags, expected):
    monkeypatch.setenv("TINY", "nowhere")
    with scripts.given(flags):
        assert scripts.read(tiny.__file__).weigh_heads == expected


def test_another_word_for_weigh_heads_is_refused(launch):
    code, errors = launch("--weigh-heads", "sometimes")
    assert code == 2
    assert "'sometimes'" in errors


TWO_STEPS = ("--phases.0.steps", "1", "--phases.1.steps", "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--weighting", "pcgard"],
            "unknown weighting 'pcgard' (did you mean 'pcgrad'?); choices: equal, fixed, scheduled",
        ),
        (["--only", "ratings"], "unknown task in only: 'ratings' (did you mean 'rating'?); choices: rating, coarse, fine"),
        (["--tasks.0.source", "rating"], "unknown source of task 'rating': 'rating' (did you mean 'ratings'?)"),
        (["--weighting", "fixed", "--weights", "rating", "1"], "weights: no weight for coarse, fine"),
        (["--weights", "rating", "1"], "weights are for --weighting fixed or scheduled, but weighting is 'equal'"),
        (["--sources.0.text", "body"], "has no text column 'body'; columns: id, rating, text"),
        (["--tasks.0.column", "score"], "has no column 'score' for task 'rating'; columns: id, rating, text"),
        (["--tasks.1.labels", "HUM"], "label 'LOC' is not in the label set (HUM)"),
        (["--tasks.0.maximum", "0"], "is outside -4..0"),
        (["--sources.0.cut-dev", "0"], "split dev is empty"),
        (["--sources.0.path", "nowhere.tsv"], "nowhere.tsv: no such file or directory"),
        (["--phases.0.rules.0.pattern", "haeds/.*"], "the rule 'haeds/.*' matches no parameter"),
        (["--workdir", "/proc/run"], "/proc/run: cannot be written"),
        (["--workdir", "/dev/null/run"], "cannot be a workdir"),
        (["--batch.mixture", "unifrom"], "unknown batch.mixture 'unifrom' (did you mean 'uniform'?)"),
        (["--phases.0.mixture", "fixed"], "phases.heads.shares is empty, but the mixture is fixed"),
        (["--batch.row-length", "64"], "batch.row_length is 64; the trunk takes 32 at most"),
        (["--devices", "3"], "batch.rows is 8; it must be a multiple of the 3 devices"),
        (["--devices", "99"], "devices is 99, but there are 8 (cpu)"),
        (
            ["--evaluation.criterion", "rates"],
            "unknown evaluation.criterion 'rates'; choices: mean, rating, coarse, ",
        ),
        (["--evaluation.criterion", "fine/f1"], "unknown evaluation.criterion 'fine/f1'"),
        (["--devices", "-1"], "devices is -1; it must not be negative"),
        (["--seed", "-1"], "seed is -1; it must not be negative"),
        (["--tasks.0.scale", "0"], "task 'rating': scale is 0.0; it must be above 0"),
        (["--tasks.2.dropout", "1"], "task 'fine': dropout is 1.0"),
        (["--phases.1.learning-rate", "-1"], "phase 'everything': learning_rate is -1.0"),
        (["--sources.0.path", "/tmp"], "/tmp: a directory; a source needs a file"),
        (["--sources.0.group-pattern", "("], "source 'ratings': group_pattern is not a regular expression"),
        (["--distributed", "here"], "--distributed 'here': give auto, or HOST:PORT,INDEX,COUNT"),
        (["--weighting", "cagrad", "--weighting-options", "d", "1"], "unknown option of weighting 'cagrad': 'd'"),
        (["--optimizer.name", "lion"], "unknown optimizer 'lion'; choices: adamw, adam, sgd"),
        (["--trunk.path", "/nowhere"], "/nowhere: no such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(launch, tmp_path, flags, message):
    code, error = launch(*flags)
    assert code == 2
    assert message in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_bad_label_names_file_and_line(launch, data):
    _, error = launch("--tasks.1.labels", "HUM")
    lines = (data / "questions.txt").read_text().splitlines()
    number = int(error.rsplit("questions.txt:", 1)[1].split(":")[0])
    assert lines[number - 1].startswith("LOC")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--optimizer.learning-rat", "1"), "unknown flag --optimizer.learning-rat (did you mean --optimizer.learning-rate?)"),
        (("--phases.everything.step", "1"), "unknown flag --phases.everything.step (did you mean --phases.everything.steps?)"),
        (
            ("--phases.evrything.steps", "1"),
            "unknown name in --phases.evrything.steps: 'evrything' (did you mean",
        ),
        (("--rows", "1"), "unknown flag --rows (did you mean --batch.rows?)"),
        (("--lr", "1"), "unknown flag --lr (did you mean --optimizer.learning-rate?)"),
        (("quickly",), "quickly: not a flag, and no flag before takes it; see --help"),
    ],
)
def test_an_unknown_flag_names_the_nearest(launch, tmp_path, words, line):
    code, error = launch(*words)
    assert code == 2
    assert error.splitlines()[-1].startswith(f"error: {line}")
    assert not (tmp_path / "run").exists()


def help_of(flag, monkeypatch, capsys, **changes):
    monkeypatch.setattr(sys, "argv", ["tiny.py", flag])
    with pytest.raises(SystemExit, match="0"):
        mtl_jax.main(tiny.experiment("bert", "data", **changes), description="tiny")
    return capsys.readouterr().out


def test_help_is_one_screen_of_the_flags_that_people_use(monkeypatch, capsys):
    """Sources and tasks are described once, however many there are."""
    monkeypatch.setenv("COLUMNS", "110")
    text = help_of("--help", monkeypatch, capsys)
    assert len(text.splitlines()) < 60
    for flag in (
        "--workdir runs/tiny",
        "--weighting equal",
        "--optimizer.learning-rate 0.01",
        "--phases.NAME.steps 6",
        "--seed",
    ):
        assert flag in text
    assert "Steps between evaluations on dev" in text
    assert "NAME is one of: sources ratings, questions; tasks rating, coarse, fine; phases heads, everything." in text
    several = tiny.experiment("bert", "data").tasks * 3
    tasks = tuple(dataclasses.replace(task, name=f"{task.name}{number}") for number, task in enumerate(several))
    many = help_of("--help", monkeypatch, capsys, tasks=tasks)
    assert len(many.splitlines()) < 62


def test_help_all_shows_every_field_with_doc_and_default(monkeypatch, capsys):
    text = help_of("--help-all", monkeypatch, capsys)
    for flag in ("--workdir", "--weighting", "--optimizer.learning-rate", "--phases.1.steps", "--tasks.0.scale", "--seed"):
        assert flag in text
    assert "Share of a phase's steps over which the rate rises" in text.replace("│", " ")
    assert "(default: 0.01)" in text


def test_every_name_and_its_meaning(monkeypatch, capsys):
    """Of rules and of all other parts: at the end of --help-all, and by --help-names of scripts and of mtl-jax."""
    monkeypatch.setenv("COLUMNS", "110")
    code, page, _ = console(monkeypatch, capsys, "affinity", "--help-names")
    assert code == 0
    assert help_of("--help-names", monkeypatch, capsys) == page
    assert help_of("--help-all", monkeypatch, capsys).endswith(page)
    doors = parts.by_door()
    assert {"weighting rule", "combinator", "mixture", "format", "logger", "launcher", "task", "trunk"} <= doors.keys()
    for named in doors.values():
        for name, part in named.items():
            meaning = re.search(rf"^  {name}(?: \(.*\))?\s+(\S.*)$", page, re.MULTILINE)
            assert meaning or parts.origin_of(part), name
    assert re.search(r"^  cagrad \(c\) +The direction near the mean gradient", page, re.MULTILINE)
    # Also of packages that load their names when they are asked for.
    packages = [module for module in map(mtl_jax.__getattr__, mtl_jax.__all__) if inspect.ismodule(module)]
    for kind in [getattr(package, name) for package in packages for name in dir(package)]:
        is_kind = inspect.isclass(kind) and issubclass(kind, parts.Part) and kind is not parts.Part
        if is_kind and parts.Part not in kind.__bases__ and not inspect.isabstract(kind):
            assert re.search(rf"^  {kind.__name__}\b", page, re.MULTILINE), kind


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "tasks",
            Classification(name="a", source="b"),
            r"tasks is of the type Classification; .* comma: (Classification(...),)",
        ),
        ("only", "fine", "only is of the type str; it must be a tuple, and a tuple of one has a comma: ('fine',)"),
        ("adapters", None, "adapters is of the type NoneType; it must be a tuple"),
        ("tasks", ("fine",), "tasks.0 is of the type str; it must be of the class Task"),
        ("trunk", "bert", "trunk is of the type str; it must be of the class TrunkConfig"),
    ],
)
def test_a_part_of_another_class_is_one_line(launch, tmp_path, field, value, message):
    code, error = launch(**{field: value})
    assert code == 2
    assert error.splitlines()[-1].endswith(message.partition(".* ")[2] or message)
    assert not (tmp_path / "run").exists()


def test_elements_by_name_as_well_as_by_place(launch, tmp_path):
    flags = ("--phases.heads.steps", "3", "--tasks.fine.dropout=0.25", "--sources.ratings.limit", "40", "--dry-run")
    code, error = launch(*flags)
    assert code == 0, error
    assert "source ratings: " in error
    assert not (tmp_path / "run").exists()


def test_a_dry_run_compiles_a_step_and_writes_nothing(launch, tmp_path, capsys):
    code, error = launch("--dry-run", "--phases.heads.steps", "5")
    assert code == 0, error
    assert "compiling a step of phase heads ..." in error
    assert "phase       parameters" in error
    assert not (tmp_path / "run").exists()


def test_a_dry_run_checks_the_runs_that_it_begins_from(launch):
    code, error = launch("--dry-run", "--init-from.path", "/nowhere/run")
    assert code == 2
    assert error.splitlines()[-1].startswith("error: /nowhere/run: no such file or directory")


def test_a_dry_run_checks_the_loggers(launch):
    code, error = launch("--dry-run", "--logger", "wanb")
    assert code == 2
    assert error.startswith("error: unknown logger 'wanb' (did you mean 'wandb'?)")


def test_weights_of_tasks_that_are_left_out_do_not_matter(launch, tmp_path):
    weights = ("--weighting", "fixed", "--weights", "rating", "1", "coarse", "2", "fine", "3")
    code, error = launch(*TWO_STEPS, *weights, "--only", "rating", "fine")
    assert code == 0, error


def test_flags_reach_the_run(launch, tmp_path):
    code, error = launch(*TWO_STEPS, "--optimizer.learning-rate", "3e-5", "--seed", "7")
    assert code == 0, error
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 3e-5
    assert config["seed"] == 7


def console(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mtl-jax", *map(str, arguments)])
    try:
        main.console()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_an_unknown_command_names_the_nearest(monkeypatch, capsys):
    code, _, error = console(monkeypatch, capsys, "ablat", "x.py")
    assert code == 2
    assert error.startswith("error: unknown command 'ablat' (did you mean 'ablate'?); choices: predict, evaluate")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("compare", "run", "other", "--joined", "a"), "unknown flag --joined (did you mean --joint?)"),
        (("predict", "run", "--tsk", "a"), "unknown flag --tsk (did you mean --task?); mtl-jax predict --help shows all"),
        (("translate", "--num-beam=2"), "unknown flag --num-beam (did you mean --num-beams?)"),
        (("convert", "a", "b", "--no-overwritten"), "unknown flag --no-overwritten (did you mean --overwrite?)"),
    ],
)
def test_an_unknown_flag_of_a_command_names_the_nearest(monkeypatch, capsys, words, line):
    code, _, error = console(monkeypatch, capsys, *words)
    assert code == 2
    assert error.startswith(f"error: {line}")


def test_flags_of_other_names_and_values_that_hold_flags_are_known():
    """As docs/compare.md and docs/pods.md give them."""
    main.check_flags("compare", main.compare, ["equal=runs/equal*", "runs/alone_*", "--joint", "pcgrad=runs/pcgrad*"])
    main.check_flags("launch", main.launch_command, ["x.py", "--on", "ssh:a,b", "--ablate", "--vary rate=1,2 --workdir runs/x"])
    with pytest.raises(mtl_jax.UserError, match="unknown flag --joint-too"):
        main.check_flags("compare", main.compare, ["a", "b", "--joint-too", "c"])


def test_predict_keeps_order_and_count(workdir, tmp_path, monkeypatch, capsys):
    texts = ["who is the man ?", "", "where is the city ?"] * 40 + ["the film is " + "good " * 50]
    (tmp_path / "in.txt").write_text("\r\n".join(texts) + "\r\n", newline="")
    code, out, error = console(monkeypatch, capsys, "predict", workdir, "--task", "coarse", "--file", tmp_path / "in.txt")
    assert code == 0, error
    actual = [json.loads(line) for line in out.splitlines()]
    assert len(actual) == len(texts)
    assert actual[0] == actual[3] != actual[1] == {"error": "empty text"}
    assert actual[0]["label"] in ("HUM", "LOC")
    assert 0.5 <= actual[0]["probability"] <= 1
    assert actual[-1]["truncated"] is True
    assert predict(workdir, "coarse", [texts[2]])[0]["label"] == actual[2]["label"]


def test_predict_rows(workdir, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "who is the man ?"}\n\n{"text": "where is the city ?"}\n')
    arguments = ("predict", workdir, "--task", "coarse", "--file", tmp_path / "in.jsonl")
    code, out, error = console(monkeypatch, capsys, *arguments)
    assert code == 0, error
    assert [next(iter(json.loads(line))) for line in out.splitlines()] == ["label", "error", "label"]
    (tmp_path / "in.jsonl").write_text('{"text": ["who", "is"]}\n')
    code, _, error = console(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "input 1: source 'questions' needs the text columns text; 'text' is a list, where a text is needed" in error


def test_predict_a_number(workdir, monkeypatch, capsys):
    code, out, _ = console(monkeypatch, capsys, "predict", workdir, "--task", "rating", "--text", "good", "bad film")
    assert code == 0
    assert [list(json.loads(line)) for line in out.splitlines()] == [["value"], ["value"]]


def test_a_workdir_is_read_while_it_trains(workdir, monkeypatch, capsys):
    """Under its lock, and nothing of it changes."""
    before = sorted(path.name for path in workdir.iterdir())
    with locks.workdir(workdir):
        for command in (("predict", workdir, "--task", "rating", "--text", "good"), ("results", workdir)):
            code, out, error = console(monkeypatch, capsys, *command)
            assert (code, bool(out)) == (0, True), error
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_predict_bad_input(workdir, tmp_path, monkeypatch, capsys):
    cases = [
        ((workdir, "--task", "coarce", "--text", "x"), "unknown task 'coarce' (did you mean 'coarse'?)"),
        ((workdir, "--task", "coarse"), "nothing to predict: give --text or --file"),
        ((workdir, "--task", "coarse", "--file", tmp_path / "none.txt"), "No such file or directory"),
        ((tmp_path / "absent", "--task", "coarse", "--text", "x"), "not the workdir of a run"),
        ((tmp_path, "--task", "coarse", "--text", "x"), "not the workdir of a run"),
    ]
    for arguments, message in cases:
        code, out, error = console(monkeypatch, capsys, "predict", *arguments)
        assert code == 2
        assert out == ""
        assert message in error
        assert "Traceback" not in error


def test_evaluate_on_the_test_rows_is_the_result(workdir, bert, data, tmp_path, monkeypatch, capsys):
    """The rows that were cut off for the test, as a file of their own; and an unknown label names its line."""
    source = tiny.experiment(bert, data).sources[1]
    lines = [f"{row.columns['fine']} {row.columns['text']}" for row in read(source).rows["test"]]
    (tmp_path / "test.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ("evaluate", workdir, "--task", "fine", "--path", tmp_path / "test.txt")
    code, out, _ = console(monkeypatch, capsys, *arguments)
    actual = json.loads(out)
    assert (code, actual.pop("rows")) == (0, len(lines))
    expected = json.loads((workdir / "results.json").read_text())["tasks"]["fine"]["test"]
    assert actual == pytest.approx(expected, rel=1e-5)
    (tmp_path / "test.txt").write_text("\n".join([*lines, "HUM:man who is " + "the " * 40]), encoding="utf-8")
    assert "test.txt: 1 text cut to 24 tokens" in console(monkeypatch, capsys, *arguments)[2]
    (tmp_path / "test.txt").write_text("\n".join([*lines, "HUM:nobody who is it ?"]), encoding="utf-8")
    code, _, error = console(monkeypatch, capsys, *arguments)
    assert code == 2
    assert f"test.txt:{len(lines) + 1}: task 'fine': label 'HUM:nobody' is not in the label set" in error


def test_results_of_a_run(workdir, tmp_path, monkeypatch, capsys):
    code, out, _ = console(monkeypatch, capsys, "results", workdir)
    assert code == 0
    assert "| coarse" in out
    code, _, error = console(monkeypatch, capsys, "results", tmp_path)
    assert code == 2
    assert "no results.json" in error


def test_the_installed_command_answers():
    command = Path(sys.executable).with_name("mtl-jax")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0
    assert "predict" in done.stdout
