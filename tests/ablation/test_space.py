"""What is tried: from words to points."""

import math

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.ablation import space
from mtl_jax.core.errors import UserError
from mtl_jax.experiment import Experiment


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return tiny.experiment("no/bert", "no/data")  # nothing is read


def points(experiment: Experiment, text: str, samples: str = "") -> list:
    (axis,) = space.axes(experiment, [text], samples)
    return [value for (value,) in axis.points]


def test_lists_and_grids(experiment):
    assert points(experiment, "optimizer.learning-rate=1e-5,3e-5") == [1e-5, 3e-5]
    assert points(experiment, "phases.everything.steps=3,4") == [3, 4]
    assert points(experiment, "trunk.dropout=0,0.5") == [0.0, 0.5]
    assert points(experiment, "optimizer.weight_decay=grid:0:1:3") == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(points(experiment, "optimizer.learning-rate=loggrid:1e-5:1e-3:3"), [1e-5, 1e-4, 1e-3])
    assert points(experiment, "seed=3,5") == [3, 5]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("averaging=none,ema", ["none", "ema"]),  # the names of values that look like others
        ("averaging=None,ema:decay=0.9", ["None", "ema:decay=0.9"]),
        ("dtype=float32,true,1e-5", ["float32", "true", "1e-5"]),
        ("averaging='none','ema'", ["none", "ema"]),
        ("phases.0.learning-rate=none,1e-3", [None, 1e-3]),
    ],
)
def test_text_is_text_whatever_it_looks_like(experiment, text, values):
    assert points(experiment, text) == values


def test_weights_are_one_field_and_may_be_schedules(experiment):
    assert points(experiment, "weights=1/2/3")[0] == {"rating": 1.0, "coarse": 2.0, "fine": 3.0}
    assert points(experiment, "weights.coarse=0,linear_schedule(1.0, 0.0, 10)") == [0.0, "linear_schedule(1.0, 0.0, 10)"]
    assert points(experiment, "weights=1/linear_schedule(1.0, 0.0, 10)/1")[0]["coarse"] == "linear_schedule(1.0, 0.0, 10)"


@given(st.integers(2, 6), st.integers(1, 40))
def test_points_of_the_simplex(tasks, count):
    actual = space.simplex(tasks, count)
    assert len(actual) == len(set(actual)) == count
    assert actual[0] == pytest.approx([1 / tasks] * tasks, abs=1e-5)
    for point in actual:
        assert len(point) == tasks
        assert sum(point) == pytest.approx(1, abs=1e-9)
        assert min(point) >= -1e-9


def test_sobol_points_of_the_simplex_are_spread_evenly():
    """Uniform points have coordinates with the mean 1 / K and the variance (K - 1) / (K^2 (K + 1)) of a flat Dirichlet."""
    actual = np.array(space.simplex(4, 512)[1:])
    np.testing.assert_allclose(actual.mean(axis=0), 1 / 4, atol=0.01)
    np.testing.assert_allclose(actual.var(axis=0), 3 / (16 * 5), rtol=0.1)


def test_the_lattice_has_all_multiples_and_the_corners():
    assert space.lattice(3, 2) == [(1, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 1, 0), (0, 0.5, 0.5), (0, 0, 1)]
    assert len(space.lattice(4, 5)) == math.comb(8, 3)


@pytest.mark.parametrize("samples", ["sobol:8", "random:8:3"])
def test_ranges_are_drawn_together(experiment, samples):
    vary = ["optimizer.learning-rate=loguniform:1e-6:1e-2", "optimizer.weight-decay=uniform:0:0.5"]
    (axis,) = space.axes(experiment, vary, samples)
    assert axis.paths == (("optimizer", "learning_rate"), ("optimizer", "weight_decay"))
    rates, decays = np.array(axis.points).T
    assert len(set(rates)) == len(set(decays)) == 8
    assert rates.min() >= 1e-6
    assert rates.max() <= 1e-2
    assert 0 <= decays.min() < decays.max() <= 0.5
    if samples.startswith("sobol"):  # one in each eighth of the range, by its logarithm
        assert sorted(np.floor((np.log10(rates) + 6) * 2)) == list(range(8))
    assert axis == space.axes(experiment, vary, samples)[0]


@pytest.mark.parametrize(
    ("vary", "samples", "message"),
    [
        ("optimizer.learning-rate", "", "write FIELD=VALUES"),
        ("optimizer.learning-rate=", "", "write FIELD=VALUES"),
        ("optimizer.rate=1", "", "field of optimizer.*learning_rate"),
        ("phases.9.steps=1", "", "element of phases.*heads, everything"),
        ("weights.nobody=1", "", "task in weights.*rating, coarse, fine"),
        ("optimizer.learning-rate=fast", "", "fast is not a value of this field, which is a number"),
        ("phases.0.steps=1.5", "", "1.5 is not a value of this field, which is a whole number"),
        ("optimizer.learning-rate=1e-3,1e-3", "", "is given twice"),
        ("optimizer.learning-rate=1e-3,", "", "a value is empty"),
        ("optimizer.learning-rate=grid:1:2", "", "write grid:LOW:HIGH:N"),
        ("optimizer.learning-rate=grid:2:1:3", "", "from 2 to 1: LOW must be below HIGH, both finite$"),
        ("optimizer.learning-rate=loggrid:0:1:3", "", "from 0 to 1: LOW must be below HIGH, both finite and above 0"),
        ("optimizer.learning-rate=loguniform:1e-5:1e-3", "", "say how often to sample the range by --samples"),
        ("optimizer.learning-rate=loguniform:1e-5:1e-3", "sobol:0", "there would be no run"),
        ("optimizer.learning-rate=1e-3", "sobol:4", "no field has a range"),
        ("seed=uniform:0:9", "random:2", "4.5 is not a value of this field, which is a whole number"),
        ("optimizer.name=uniform:4:9", "random:2", "6.5 is not a value of this field, which is a text"),
        ("weights=simplex:0", "", "N must be at least 1"),
        ("weights=simplex:0.5/0.6/0.1", "", "0.5/0.6/0.1 is not on the simplex"),
        ("weights=simplex:1.5/-0.5/0", "", "must not be negative"),
        ("weights=1/2", "", "has 2 weights; write one for each of rating/coarse/fine"),
        ("weights=1/2/x", "", "'x' in '1/2/x' is neither a number nor a schedule"),
        ("name=a,b", "", "it cannot vary: it only names the experiment. What may: weights"),
        ("evaluation.criterion=mean,coarse", "", "it cannot vary: runs are compared by it"),
        ("optimizer=1", "", "it cannot vary as a whole: it has parts"),
        ("phases=1", "", "it cannot vary as a whole"),
    ],
)
def test_what_is_refused(experiment, vary, samples, message):
    with pytest.raises(UserError, match=message):
        space.axes(experiment, [vary], samples)


def test_a_field_has_one_axis(experiment):
    for second in ("weights.rating=1,2", "weights=1/1/1,2/2/2"):
        with pytest.raises(UserError, match="has two axes"):
            space.axes(experiment, ["weights=1/1/1,1/2/1", second])
