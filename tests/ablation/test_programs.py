"""From what is varied to runs, and from runs to programs."""

import dataclasses

import numpy as np
import pytest
import tiny

from mtl_jax.ablation import device_memory, fields, plan, space
from mtl_jax.core.errors import UserError
from mtl_jax.experiment import Experiment


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return tiny.experiment("no/bert", "no/data")  # nothing is read


def runs_of(experiment: Experiment, *vary: str, **options) -> list[plan.Run]:
    return plan.runs(experiment, space.axes(experiment, vary), **options)


def test_runs_are_all_combinations_with_seeds_innermost(experiment):
    runs = runs_of(experiment, "optimizer.learning-rate=1e-3,1e-2", "optimizer.weight-decay=0,0.1", seeds=2)
    assert [run.name for run in runs] == [f"{n:04d}" for n in range(8)]
    assert runs[3].values == {"optimizer.learning_rate": 1e-3, "optimizer.weight_decay": 0.1, "seed": 1}
    assert runs[3].experiment.optimizer.weight_decay == 0.1
    assert (runs[3].experiment.seed, runs[3].experiment.data_seed) == (1, 0)
    (program,) = plan.programs(runs)
    assert program.runs == tuple(runs)


def test_seeds_may_have_their_own_order(experiment):
    runs = runs_of(experiment, seeds=2, own_order=True)
    assert [plan.order_of(run) for run in runs] == [0, 1]
    assert [plan.order_of(run) for run in runs_of(experiment, seeds=2)] == [0, 0]
    assert len(plan.programs(runs)) == 1


def test_methods_are_programs_and_weights_belong_to_fixed_ones(experiment):
    runs = runs_of(experiment, "weights=simplex:4", methods=["equal", "cagrad:c=0.2", "cagrad:c=0.4", "famo"], seeds=2)
    counts = {program.runs[0].experiment.weighting: len(program.runs) for program in plan.programs(runs)}
    assert counts == {"fixed": 8, "equal": 2, "cagrad": 4, "famo": 2}


def test_options_that_decide_how_a_rule_is_built_are_programs(experiment):
    """krum compares a number of gradients that shapes its program; cagrad's c is a number that comes in from outside."""
    krum = runs_of(dataclasses.replace(experiment, weighting="krum"), "weighting-options.n_byzantine=0,1")
    assert len(plan.programs(krum)) == 2
    cagrad = runs_of(dataclasses.replace(experiment, weighting="cagrad"), "weighting-options.c=0.1,0.3,0.5")
    assert len(plan.programs(cagrad)) == 1


def test_what_shapes_a_program_makes_a_program(experiment):
    runs = runs_of(experiment, "trunk.dropout=0,0.1", "phases.everything.steps=4,6", "optimizer.learning-rate=1e-3,1e-2")
    programs = plan.programs(runs)
    assert [len(program.runs) for program in programs] == [2, 2, 2, 2]


def test_numbers_come_with_an_axis_over_runs(experiment):
    runs = runs_of(experiment, "weights.coarse=0,2,linear_schedule(1.0, 0.0, 10)", "phases.0.learning-rate=1e-3,1e-2")
    (program,) = plan.programs(runs)
    actual = fields.collect([run.experiment for run in runs])
    assert actual["phases.0.learning_rate"].tolist() == np.float32([1e-3, 1e-2] * 3).tolist()
    assert actual["weights.coarse"].shape == (6, 12)  # a schedule among them: a number for every step
    assert actual["weights.coarse"][4, :3] == pytest.approx([1.0, 0.9, 0.8])
    assert set(actual) == {"weights.coarse", "phases.0.learning_rate"}
    # What counts in one of the runs counts in the program.
    assert program.template.weights["coarse"] != 0


@pytest.mark.parametrize(
    ("vary", "options", "message"),
    [
        ((), {}, "nothing varies"),
        ((), {"seeds": 0}, "--seeds is 0"),
        (("seed=1,2",), {"seeds": 2}, "the field seed has two axes"),
        (("weighting=equal,pcgrad",), {"methods": ["equal"]}, "the field weighting has two axes"),
        ((), {"methods": ["equal", "equal"]}, "equal is given twice"),
        ((), {"methods": ["equal", "best"]}, "method.*'best'"),
        ((), {"methods": ["equal", "cagrad:c=-1"]}, "weighting cagrad: c is -1"),
        ((), {"methods": ["equal:c=1", "famo"]}, "it has no options"),
        (("optimizer.learning-rate=-1,1",), {}, "learning_rate is -1.0; it must not be negative"),
        (("weights.coarse=-1,1",), {}, "a weight must be finite and not negative"),
        (("phases.0.steps=0,1",), {}, "steps is 0"),
        (("weighting-options.c=0.2,0.5",), {"methods": ["equal", "pcgrad"]}, "none of the methods equal, pcgrad has it"),
        (("weighting-options.c=0.2,0.5",), {"methods": ["cagrad:c=0.4"]}, "weighting-options.c: the field has two axes"),
        (("optimizer.name=adam,adamw", "optimizer.weight-decay=0,0.5"), {}, "weight_decay: the optimizer adam does not use it"),
    ],
)
def test_what_is_refused(experiment, vary, options, message):
    with pytest.raises(UserError, match=message):
        runs_of(experiment, *vary, **options)


def test_an_axis_that_changes_nothing_is_refused(experiment):
    phases = tuple(dataclasses.replace(phase, learning_rate=1e-3) for phase in experiment.phases)
    own = dataclasses.replace(experiment, phases=phases)
    with pytest.raises(UserError, match=r"every phase has its own rate; vary phases\.N\.learning-rate"):
        runs_of(own, "optimizer.learning-rate=1e-3,1e-2")
    phases = (phases[0], dataclasses.replace(phases[1], learning_rate=None))
    assert len(runs_of(dataclasses.replace(own, phases=phases), "optimizer.learning-rate=1e-3,1e-2")) == 2


def test_weights_do_not_go_with_another_rule(experiment):
    with pytest.raises(UserError, match="weights are for the weighting fixed, but it is 'pcgrad'"):
        runs_of(dataclasses.replace(experiment, weighting="pcgrad"), "weights=simplex:2")


@pytest.mark.parametrize(
    ("name", "options", "inputs"),
    [
        ("cosmos", {"lam": 1.0}, {"lam"}),
        ("modo", {"gamma": 0.1, "rho": 0.1}, {"gamma", "rho"}),
        ("sdmgrad", {"iterations": 20, "momentum": 0.5}, {"momentum"}),
        ("trimmed_mean", {"trim": 1}, set()),
        ("excess_risk", {"learning_rate": 1.0}, {"learning_rate"}),
        ("auto_lambda", {"target": "fine", "share": 0.3, "rate": 0.1}, {"rate"}),
    ],
)
def test_options_that_are_numbers_are_inputs_of_one_program(experiment, name, options, inputs):
    """Others, such as the share of rows that are held out, make a program for each value."""
    paths = fields.numbers(dataclasses.replace(experiment, weighting=name, weighting_options=options))
    assert {path[1] for path in paths if path[0] == "weighting_options"} == inputs


def test_preferences_of_a_rule_may_vary_in_one_program(experiment):
    planned = runs_of(dataclasses.replace(experiment, weighting="pbi"), "weights.fine=0.5,1,2")
    assert [(run.experiment.weighting, run.experiment.weights["fine"]) for run in planned] == [("pbi", n) for n in (0.5, 1, 2)]
    assert len(plan.programs(planned)) == 1


def test_as_many_runs_as_fit():
    asked = []

    def bytes_of(runs: int) -> int:
        asked.append(runs)
        return 1000 + 10 * runs

    assert device_memory.runs_that_fit(bytes_of, 50, 1, 10_000) == 50
    assert asked == [50]
    assert device_memory.runs_that_fit(bytes_of, 50, 1, 1305) == 30
    assert device_memory.runs_that_fit(bytes_of, 50, 8, 1305) == 24  # runs come in eights, one for each device
    assert device_memory.runs_that_fit(lambda runs: 1000 + int(100 * runs**0.5), 50, 1, 1400) == 16  # not in proportion
    with pytest.raises(UserError, match=r"a run needs 0\.00 GB on each device"):
        device_memory.runs_that_fit(bytes_of, 50, 1, 1005)


def test_chunks_are_even():
    runs = list(range(10))
    assert device_memory.chunks([runs], 4, 1) == ([[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]], 4)
    assert device_memory.chunks([runs[:3], runs[3:]], 5, 2) == ([[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]], 4)


def test_rules_that_take_preferences_keep_those_of_the_experiment(experiment):
    preferences = {"rating": 1.0, "coarse": 2.0, "fine": 4.0}
    script = dataclasses.replace(experiment, weighting="cosmos", weights=preferences, weighting_options={"lam": 3.0})
    runs = runs_of(script, methods=["cosmos", "pbi", "cosmos:lam=2", "equal"])
    assert [run.experiment.weights for run in runs] == [preferences] * 3 + [{}]
    assert [run.experiment.weighting_options for run in runs] == [{}, {}, {"lam": 2}, {}]
    varied = [run.experiment for run in runs_of(script, "weights=1/2/4,4/2/1", methods=["pbi"])]
    assert [run.weights["rating"] for run in varied if run.weighting == "pbi"] == [1, 4]


@pytest.mark.parametrize("methods", [["cagrad"], ["fixed", "equal"]])
def test_options_of_the_experiments_rule_are_not_those_of_the_methods(experiment, methods):
    script = dataclasses.replace(experiment, weighting="cagrad", weighting_options={"c": 0.5})
    runs = runs_of(script, "weights=simplex:2", methods=methods)
    assert [run.experiment.weighting for run in runs] == ["fixed", "fixed", methods[-1]]
    assert all(run.experiment.weighting_options == {} for run in runs)
