"""Hooks and loggers of a run: what they are told, that a failing one loses no work, and each service offline."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import Checkpoints, Evaluation, Hooks, Phase, UserError, train
from mtl_jax.core.trees import flat
from mtl_jax.inference.predict import open_run
from mtl_jax.training import loggers
from mtl_jax.training.metrics_log import read_metrics

STEPS = 6


def small(trunk, data, **changes):
    values = {
        "phases": (Phase("everything", steps=STEPS),),
        "evaluation": Evaluation(every=3, baseline="none"),
        "checkpoints": Checkpoints(every=100, keep=3),
        "only": ("fine",),
        "weighting": "equal",
    }
    return tiny.experiment(trunk, data, **(values | changes))


def recorder(calls):
    return Hooks(
        after_metrics=lambda step, metrics: calls.append(("train", step, dict(metrics))),
        after_evaluation=lambda step, scores: calls.append(("dev", step, dict(scores))),
        at_end=lambda results: calls.append(("end", results)),
        close=lambda: calls.append(("close",)),
    )


@pytest.fixture(scope="module")
def whole(trunk, data, tmp_path_factory):
    """A run with two hooks: its workdir, what each was told, and the order of the calls."""
    first, second, workdir = [], [], tmp_path_factory.mktemp("hooks") / "run"
    train(small(trunk, data), workdir, hooks=[recorder(first), Hooks(), recorder(second)])
    return workdir, first, second


def params(workdir):
    return flat(open_run(workdir, "last").params)


def test_hooks_get_what_the_log_gets(whole):
    workdir, first, second = whole
    logged = [(record.pop("kind"), record.pop("step"), record) for record in read_metrics(workdir)]
    assert first[:-2] == logged
    assert [call[:2] for call in logged] == [
        *(("train", 1), ("train", 2), ("train", 3), ("dev", 3)),
        *(("train", 4), ("train", 5), ("train", 6), ("dev", 6)),
    ]
    assert first[-2:] == [("end", mtl_jax.results(workdir)[0]), ("close",)]
    assert first == second


def test_hooks_are_not_in_the_configuration(whole):
    config = json.loads((whole[0] / "config.json").read_text())
    assert not {"hooks", "loggers", "logger"} & set(config)
    assert not (whole[0] / loggers.RECORD).exists()


@pytest.mark.parametrize("step", [2, STEPS])
def test_a_failing_hook_loses_no_work_and_the_run_resumes(whole, trunk, data, tmp_path, step):
    calls = []

    def fail(at, metrics):
        if at == step:
            raise ZeroDivisionError(f"at step {at}")

    hooks = [Hooks(after_metrics=fail, close=lambda: calls.append(("close",))), recorder(calls)]
    with pytest.raises(ZeroDivisionError, match=f"at step {step}") as caught:
        train(small(trunk, data), tmp_path / "run", hooks=hooks)
    assert "fail" in [entry.name for entry in caught.traceback]
    assert caught.value.__cause__ is None
    assert [call[:2] for call in calls if call[0] == "train"][-1] == ("train", step - 1)
    assert calls[-2:] == [("close",), ("close",)]
    assert not (tmp_path / "run" / "results.json").exists()
    resumed = []
    train(small(trunk, data), tmp_path / "run", hooks=recorder(resumed))
    assert step == STEPS or resumed[0][1] > step - 1
    assert len(resumed) < len(whole[1])
    expected, actual = params(whole[0]), params(tmp_path / "run")
    assert all(np.array_equal(expected[path], actual[path]) for path in expected)


def test_an_error_at_the_end_comes_after_the_results(whole, trunk, data, tmp_path):
    def leave(results):
        sys.exit(3)

    with pytest.raises(SystemExit):
        train(small(trunk, data, phases=(Phase("all", steps=1),)), tmp_path, hooks=Hooks(at_end=leave))
    assert mtl_jax.results(tmp_path)[0]["steps"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hooks": print}, "hooks: .* is not mtl_jax.Hooks"),
        ({"loggers": ["wanb"]}, r"unknown logger 'wanb' \(did you mean 'wandb'\?\); choices: wandb, trackio, mlflow"),
    ],
)
def test_bad_input_is_found_first(trunk, data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(small(trunk, data), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger mlflow: the package mlflow is not installed; pip install 'mtl_jax\[mlflow\]'"):
        loggers.checked(["mlflow"])
    assert loggers.checked([]) == ()


@pytest.fixture
def told():
    """A registered logger; gives what it was opened with, and the calls of its hooks."""
    opened, calls = [], []

    @mtl_jax.register_logger("told")
    def logger(config, workdir):
        opened.append((config["name"], workdir, loggers.kept(workdir, "told")))
        loggers.keep(workdir, "told", {"times": len(opened)})
        return recorder(calls)

    yield opened, calls
    loggers.LOGGERS._functions.pop("told")


def test_a_logger_of_the_script_by_its_flag(told, trunk, data, tmp_path, monkeypatch, capsys):
    opened, calls = told
    monkeypatch.setattr(
        sys, "argv", ["tiny.py", "--workdir", str(tmp_path), "--logger", "told", "--logger", "told", "--phases.0.steps", "1"]
    )
    mtl_jax.main(small(trunk, data), hooks=recorder(calls), description="tiny")
    assert opened == [("tiny", tmp_path, {})]
    assert [call[0] for call in calls] == ["train", "train", "dev", "dev", "end", "end", "close", "close"]
    assert loggers.kept(tmp_path, "told") == {"times": 1}
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--help"])
    with pytest.raises(SystemExit):
        mtl_jax.main(small(trunk, data), description="tiny")
    assert "--logger" in capsys.readouterr().out


RESULTS = {"steps": 2, "tasks": {"a": {"metric": "accuracy", "dev": {}, "test": {"accuracy": 0.5, "f1": None}}}}


def two_processes(name, workdir):
    """A run that is stopped after a step, and resumed: what the loop calls, without the loop."""
    config = {"name": "tiny", "optimizer": {"learning_rate": 0.1}, "tasks": [{"name": "a"}]}
    workdir.mkdir()
    for step in (1, 2):
        [hooks] = loggers.open_loggers([name], config, workdir)
        hooks.after_metrics(step, {"loss/a": 1.0 / step, "cosines": [[1.0]]})
        hooks.after_evaluation(step, {"a/accuracy": 0.25 * step, "criterion": float("nan")})
        if step == 2:
            hooks.at_end(RESULTS)
        hooks.close()
    return json.loads((workdir / loggers.RECORD).read_text())[name]


@pytest.mark.filterwarnings("ignore")  # those of the service's own packages
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_id = two_processes("wandb", tmp_path / "run")["id"]
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert folders
    assert all(folder.name.endswith(run_id) for folder in folders)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run_id = two_processes("mlflow", tmp_path / "run")["id"]
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.1"
    assert run.data.metrics["test/a/accuracy"] == 0.5
    assert [point.step for point in client.get_metric_history(run_id, "train/loss/a")] == [1, 2]


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_does_not_answer_ends_no_run(tmp_path, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    [hooks] = loggers.open_loggers(["mlflow"], {"name": "tiny"}, tmp_path)

    def no_answer(*arguments, **named):
        raise mlflow.exceptions.MlflowException("no answer")

    with monkeypatch.context() as away:
        away.setattr(mlflow.MlflowClient, "log_batch", no_answer)
        hooks.after_evaluation(1, {"a/accuracy": 0.25})
    assert "logger mlflow: no answer; 1 metrics are not sent yet" in caplog.text
    hooks.close()
    run = mlflow.MlflowClient().get_run(loggers.kept(tmp_path, "mlflow")["id"])
    assert (run.info.status, run.data.metrics) == ("KILLED", {"dev/a/accuracy": 0.25})


@pytest.mark.filterwarnings("ignore")
def test_trackio_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    name = two_processes("trackio", tmp_path / "run")["name"]
    [run] = trackio.Api().runs("tiny")
    assert run.name == name


def test_what_trackio_is_told(tmp_path, monkeypatch):
    """By a stand-in of the part of its API that we call, for where the package is not installed."""
    calls = []
    log = lambda values, step: calls.append((step, values))  # noqa: E731
    run = types.SimpleNamespace(log=log, finish=lambda: calls.append("finished"))
    begin = lambda **options: (calls.append((options["name"], options["resume"])), run)[1]  # noqa: E731
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=begin))
    name = two_processes("trackio", tmp_path / "run")["name"]
    assert calls == [
        (name, "allow"),
        *((1, {"train/loss/a": 1.0}), (1, {"dev/a/accuracy": 0.25}), "finished"),
        (name, "allow"),
        *((2, {"train/loss/a": 0.5}), (2, {"dev/a/accuracy": 0.5}), (2, {"test/a/accuracy": 0.5}), "finished"),
    ]
