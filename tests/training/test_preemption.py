"""A signal stops the process wherever the work is: also when nothing is left of a run, and a script has more of them."""

import os
import signal

import pytest
import tiny

from mtl_jax import Evaluation, Hooks, Phase, ablate, train
from mtl_jax.core.errors import Interrupted
from mtl_jax.core.progress import Progress
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.preemption import stop_on_signals

PHASES = (Phase("everything", steps=2),)


def signalled(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_the_work_did_not_see_stops_what_comes_after_it(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="the same command resumes"), stop_on_signals(raise_at_end=True):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    with stop_on_signals() as stop:  # as of a command whose output is whole
        os.kill(os.getpid(), number)
    assert stop.flag.is_set()


def test_an_error_of_the_work_is_not_hidden_by_a_signal():
    def work():
        signalled()
        return 1 / 0

    with pytest.raises(ZeroDivisionError), stop_on_signals(raise_at_end=True):
        work()


@pytest.mark.parametrize(("moment", "finished"), [("after_evaluation", False), ("at_end", True)])
def test_a_signal_after_the_last_step_of_a_run(trunk, data, tmp_path, moment, finished):
    """Before the test scores or after them; the run takes no step again, and has the scores of one without a signal."""
    experiment = tiny.experiment(trunk, data, phases=PHASES, evaluation=Evaluation(every=2))
    with pytest.raises(Interrupted, match="the same command"):
        train(experiment, tmp_path / "run", hooks=Hooks(**{moment: signalled}))
    assert (tmp_path / "run" / "results.json").exists() == finished
    records = read_metrics(tmp_path / "run")
    found = train(experiment, tmp_path / "run")
    assert found["tasks"] == train(experiment, tmp_path / "whole")["tasks"]
    assert found["steps"] == 2
    assert read_metrics(tmp_path / "run") == records


def test_a_signal_after_the_last_step_of_an_ablation(trunk, data, tmp_path, monkeypatch):
    experiment = tiny.experiment(trunk, data, phases=PHASES, evaluation=Evaluation(every=2))
    monkeypatch.setattr(Progress, "close", signalled)
    with pytest.raises(Interrupted, match="the same command"):
        ablate(experiment, tmp_path, seeds=2)
    monkeypatch.undo()
    assert [run["status"] for run in ablate(experiment, tmp_path, seeds=2)["runs"]] == ["done", "done"]
    assert (tmp_path / "report.html").exists()
