"""The rate of the units and the time that is left, by a clock that the test moves."""

import dataclasses
import sys

import pytest
import tiny

from mtl_jax.core import progress
from mtl_jax.core.progress import Progress
from mtl_jax.experiment import Checkpoints, Evaluation, Phase
from mtl_jax.training.counts import evaluations_and_checkpoints, steps_by_phase


@pytest.fixture
def clock(monkeypatch, capsys):
    """Moves the time on; last() is the line that was printed last."""

    class Clock:
        now = 1000.0

        def __call__(self) -> float:
            return self.now

        def pass_(self, seconds: float) -> None:
            self.now += seconds

        def last(self) -> str:
            return capsys.readouterr().err.splitlines()[-1]

    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    return found


def steps(bar: Progress, clock, count: int, seconds: float = 1.0) -> None:
    for _ in range(count):
        clock.pass_(seconds)
        bar.update(1)


def test_what_is_done_before_the_first_unit_is_in_no_rate(clock):
    """Such as reading, and compiling the program of a step."""
    bar = Progress("training", 100, seconds=4.0)
    steps(bar, clock, 1, 300.0)
    assert clock.last() == "training 1/100"
    steps(bar, clock, 4)
    assert clock.last() == "training 5/100 1.0 step/s ETA 1:35"


@pytest.mark.parametrize("work", ["compilation", "evaluation", "checkpoint"])
@pytest.mark.parametrize("first", [0, 3])
def test_other_work_is_not_in_the_rate_of_the_steps(clock, work, first):
    bar = Progress("training", 100, seconds=4.0)
    steps(bar, clock, first)
    clock.pass_(120)
    bar.beside(work)
    steps(bar, clock, 5)
    assert clock.last() == f"training {first + 5}/100 1.0 step/s ETA 1:{35 - first}"


def test_other_work_that_is_still_to_come_is_in_the_time_that_is_left(clock):
    bar = Progress("training", 40, seconds=1.0, coming={"evaluation": 4, "checkpoint": 2})
    steps(bar, clock, 9)
    assert clock.last().endswith("ETA 0:31")  # how long an evaluation takes is not known yet
    steps(bar, clock, 1)
    clock.pass_(20)
    bar.beside("evaluation")
    steps(bar, clock, 1)
    assert clock.last().endswith("1.0 step/s ETA 1:29")  # 29 steps and 3 evaluations
    clock.pass_(7)
    bar.beside("checkpoint")
    steps(bar, clock, 1)
    assert clock.last().endswith("1.0 step/s ETA 1:35")  # 28 steps, 3 evaluations, a checkpoint


def test_units_that_were_done_before_are_in_no_rate(clock):
    """An ablation that goes on, or ends a chunk early."""
    bar = Progress("ablation", 1000, seconds=4.0, coming={"evaluation": 10})
    bar.skip({"ablation": 500}, {"evaluation": 5})
    clock.pass_(60)
    steps(bar, clock, 5)
    assert clock.last() == "ablation 505/1000 1.0 step/s ETA 8:15"
    clock.pass_(30)
    bar.beside("evaluation", 3)
    bar.skip({"ablation": 395})
    steps(bar, clock, 5)
    assert clock.last() == "ablation 905/1000 1.0 step/s ETA 1:55"  # 95 steps, 2 evaluations of 10 s


def test_steps_of_each_phase_have_a_rate_of_their_own(clock):
    """Heads on cached features take no time; what everything takes is not known before it begins."""
    bar = Progress("training", 2000, seconds=1.0, stretches={"heads": 1000, "everything": 1000})

    def take(count, seconds, title):
        for _ in range(count):
            clock.pass_(seconds)
            bar.update(1, title=title)

    take(900, 0.125, "heads")
    assert " 8.0 step/s ETA >0:1" in clock.last()
    take(100, 0.125, "heads")
    clock.pass_(60)
    bar.beside("compilation")
    take(1, 5, "everything")
    assert clock.last() == "everything 1001/2000"  # not yet known
    take(3, 5, "everything")
    assert clock.last() == "everything 1004/2000 0.2 step/s ETA 83:00"


def test_phases_that_come_again_are_known(clock):
    """Chunks of an ablation go through the same phases."""
    bar = Progress("ablation", 40, seconds=1.0, stretches={"heads": 20, "everything": 20})
    for title, seconds in (("heads", 1), ("everything", 4), ("heads", 1)):
        for _ in range(5 if title == "heads" else 10):
            clock.pass_(seconds)
            bar.update(1, title=title)
    assert clock.last() == "heads 20/40 1.0 step/s ETA 0:50"


def test_units_of_one_batch_are_done_together(clock):
    """32 texts every 2 seconds, told one by one within a millisecond."""
    bar = Progress("translate", 320, unit="text", seconds=1.0)
    clock.pass_(50)
    for _ in range(4):
        clock.pass_(2)
        steps(bar, clock, 32, 1e-5)
    assert clock.last() == "translate 97/320 16.0 text/s ETA 0:14"


@pytest.mark.parametrize("done", [0, 3, 4, 5, 11, 12])
def test_what_a_run_does_beside_its_steps(done):
    experiment = dataclasses.replace(
        tiny.experiment("", ""),
        phases=(Phase("a", 6), Phase("b", 6)),
        evaluation=Evaluation(every=4),
        checkpoints=Checkpoints(every=3),
    )
    evaluations, saved = {4, 6, 8, 12}, {3, 9}  # 6 and 12 are saved with the evaluation
    expected = {"evaluation": sum(at > done for at in evaluations), "checkpoint": sum(at > done for at in saved)}
    assert evaluations_and_checkpoints(experiment, done) == expected
    assert steps_by_phase(experiment, done) == {"a": max(6 - done, 0), "b": min(12 - done, 6)}
    assert steps_by_phase(experiment, 0, done, 2) == {"a": 2 * min(done, 6), "b": 2 * max(done - 6, 0)}
    both = [evaluations_and_checkpoints(experiment, 0, done, 3), evaluations_and_checkpoints(experiment, done, None, 3)]
    assert {name: both[0][name] + both[1][name] for name in expected} == {"evaluation": 12, "checkpoint": 6}
