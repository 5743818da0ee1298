import dataclasses
import math
from fractions import Fraction
from typing import Annotated

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.core.configuration import Limits
from mtl_jax.core.errors import UserError
from mtl_jax.data import mixture, mixture_schedule
from mtl_jax.data.mixture import shares
from mtl_jax.data.mixture_schedule import Schedule, ScheduleSequence, schedule

SIZES = {"a": 100_000, "b": 10_000, "c": 1_000}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform", [1, 1, 1]),
        ("proportional", [100, 10, 1]),
        ("temperature:t=2", [math.sqrt(100), math.sqrt(10), 1]),
        ("temperature:t=1", [100, 10, 1]),
        ("capped:cap=20000", [20, 10, 1]),
        ("capped:cap=1e9", [100, 10, 1]),
        ("fixed", [0, 3, 1]),
    ],
)
def test_what_the_mixtures_mean(text, expected):
    found = shares(text, SIZES, {"c": 0.5, "b": 1.5, "a": 0.0})
    assert list(found) == list(SIZES)
    np.testing.assert_allclose(list(found.values()), np.array(expected) / np.sum(expected), rtol=1e-12)


def test_a_low_temperature_stays_finite():
    assert shares("temperature:t=0.01", SIZES)["a"] == pytest.approx(1.0)


def rows_one_by_one(run: Schedule) -> list[str]:
    """The rule by hand, in fractions: the source of every row, for shares that stay the same."""
    total = sum(Fraction(share).limit_denominator(1000) for share in run.start.values())
    exact = {source: Fraction(share).limit_denominator(1000) / total for source, share in run.start.items()}
    out = dict.fromkeys(exact, 0)
    rows = []
    for _ in range(run.rows * run.steps):
        due = {source: (out[source] + Fraction(1, 2)) / share for source, share in exact.items() if share}
        source = min(due, key=lambda name: due[name])  # the first of equals, as min does
        out[source] += 1
        rows.append(source)
    return rows


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), st.integers(1, 9))
def test_counts_are_exact_over_every_cycle_and_follow_the_rule_between(weights, rows):
    fixed = {f"s{number}": float(weight) for number, weight in enumerate(weights)}
    run = schedule("fixed", "", fixed, dict.fromkeys(fixed, 1), rows, steps=3 * sum(weights))
    cycle = sum(weights)  # steps in which all sources have whole numbers of rows
    for n in range(4):
        assert run.before(n * cycle) == {source: n * rows * int(weight) for source, weight in fixed.items()}
    by_hand = rows_one_by_one(run)
    for step in range(0, run.steps, max(run.steps // 7, 1)):
        assert sum(run.counts(step).values()) == rows
        here = by_hand[step * rows : (step + 1) * rows]
        # Where due times are equal but for rounding, the order may differ.
        assert all(abs(count - here.count(source)) <= 1 for source, count in run.counts(step).items())
        before = by_hand[: step * rows]
        assert all(abs(count - before.count(source)) <= 1 for source, count in run.before(step).items())


weights = st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda x: sum(x) > 0.01)


@given(st.data(), st.integers(1, 40), st.integers(1, 200))
def test_annealed_counts_follow_the_integral(data, rows, steps):
    first = np.array(data.draw(weights))
    last = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(first), max_size=len(first)).filter(any)))
    first, last = first / first.sum(), last / last.sum()
    names = [f"s{number}" for number in range(len(first))]
    run = Schedule(dict(zip(names, first, strict=True)), dict(zip(names, last, strict=True)), rows, steps)
    for step in {0, 1, steps // 3, steps - 1, steps}:
        time = step * rows
        integral = first * time + (last - first) * time**2 / (2 * rows * steps)
        off = np.abs(np.array(list(run.before(step).values())) - integral)
        assert sum(run.before(step).values()) == time
        if len(names) <= 3:
            assert off.max() <= 1 + 1e-6
        assert (off <= 0.5 + np.maximum(first, last) * (len(names) - 2) / 2 + 1e-6).all()


def test_an_annealed_run_goes_from_one_mixture_to_the_other():
    run = schedule("proportional", "uniform", {}, SIZES, rows=111, steps=1000)
    assert run.counts(0) == {"a": 100, "b": 10, "c": 1}
    assert run.counts(999) == {"a": 37, "b": 37, "c": 37}
    assert run.counts(500) == {"a": 68, "b": 24, "c": 19}
    assert run.before(1000)["c"] == pytest.approx(111_000 * (1 / 111 + 1 / 3) / 2, abs=1)


def test_uniform_gives_the_same_rows_in_every_step():
    run = schedule("uniform", "", {}, dict.fromkeys("abcdefg", 1), rows=21, steps=5000)
    assert run.constant()
    assert all(set(run.counts(step).values()) == {3} for step in (0, 1, 17, 4999, 123_456))
    assert run.capacity() == dict.fromkeys("abcdefg", 3)


def test_steps_that_have_the_same_rows_of_every_source():
    even, odd = Schedule({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}, 4, 10), {"a": 0.3, "b": 0.7}
    only_b = Schedule({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}, 4, 10)
    turns = ScheduleSequence((even, Schedule(odd, odd, 4, 10), only_b, only_b))
    assert turns.constant_counts(range(10)) == {"a": 2, "b": 2}
    assert (
        turns.constant_counts(range(9, 11))
        is turns.constant_counts(range(12, 15))
        is turns.constant_counts(range(5, 25))
        is None
    )
    assert turns.constant_counts(range(20, 40)) == turns.constant_counts(range(35, 99)) == {"a": 0, "b": 4}


def test_a_small_source_is_seen_in_some_steps_only():
    run = schedule("proportional", "", {}, {"large": 100_000, "small": 1_000}, rows=8, steps=101)
    counts = [run.counts(step)["small"] for step in range(101)]
    assert sum(counts) == 8
    assert set(counts) == {0, 1}
    gaps = np.diff(np.flatnonzero(counts))
    assert gaps.min() >= 12
    assert gaps.max() <= 13


@given(weights, weights, st.integers(1, 20), st.integers(1, 60))
def test_the_capacity_is_the_most_of_any_step_and_its_bound_is_one(first, last, rows, steps):
    size = min(len(first), len(last))
    first, last = np.array(first[:size]) + 1e-3, np.array(last[:size]) + 1e-3
    names = [f"s{number}" for number in range(size)]
    run = Schedule(
        dict(zip(names, first / first.sum(), strict=True)), dict(zip(names, last / last.sum(), strict=True)), rows, steps
    )
    every = [run.counts(step) for step in range(steps)]
    assert run.capacity() == {name: max(counts[name] for counts in every) for name in names}
    limit, mixture_schedule.EXACT_ROWS = mixture_schedule.EXACT_ROWS, 0
    try:
        bound = run.capacity()
    finally:
        mixture_schedule.EXACT_ROWS = limit
    assert all(rows >= bound[name] >= max(counts[name] for counts in every) for name in names)


def test_a_long_run_goes_on_exactly_at_any_step():
    """10^8 rows in, still the rows between two steps are those that the rule gives, and the capacity is found at once."""
    run = schedule("fixed", "", {"a": 0.7, "b": 0.2, "c": 0.1}, dict.fromkeys("abc", 1), rows=10, steps=10_000_000)
    assert run.before(9_999_990) == {"a": 69_999_930, "b": 19_999_980, "c": 9_999_990}
    assert run.counts(9_999_990) == {"a": 7, "b": 2, "c": 1}
    assert run.capacity() == {"a": 7, "b": 2, "c": 1}
    odd = dataclasses.replace(run, rows=7)
    assert not odd.constant()
    assert max(odd.counts(step)["a"] for step in range(100)) <= odd.capacity()["a"] <= 7


@pytest.mark.parametrize(
    ("text", "end", "fixed", "message"),
    [
        ("unifrom", "", {}, r"unknown batch.mixture 'unifrom' \(did you mean 'uniform'\?\)"),
        ("uniform", "proportonal", {}, r"unknown batch.mixture_end 'proportonal' \(did you mean 'proportional'"),
        ("uniform:t=2", "", {}, "batch.mixture is 'uniform:t=2'; uniform has no option"),
        ("temperature", "", {}, "batch.mixture is 'temperature'; write temperature:t=NUMBER"),
        ("temperature:cap=2", "", {}, "write temperature:t=NUMBER"),
        ("temperature:t=hot", "", {}, "write temperature:t=NUMBER"),
        ("temperature:t=0", "", {}, "t must be a number above 0"),
        ("temperature:t=inf", "", {}, "t must be a number above 0"),
        ("uniform", "capped:cap=-5", {}, "batch.mixture_end is 'capped:cap=-5'; cap must be a number above 0"),
        ("fixed", "", {}, "batch.shares is empty"),
        ("fixed", "", {"a": 1, "b": 1}, "batch.shares lacks c"),
        ("fixed", "", {"a": 1, "b": 1, "c": 1, "d": 1}, "unknown source in batch.shares: 'd'"),
        ("fixed", "", {"a": 1, "b": -1, "c": 1}, "batch.shares: b is -1; a share must be a finite number"),
        ("fixed", "", {"a": 1, "b": math.nan, "c": 1}, "batch.shares: b is nan"),
        ("fixed", "", {"a": 0, "b": 0, "c": 0}, "batch.shares are all 0"),
        ("uniform", "", {"a": 1}, "batch.shares is for the mixture fixed"),
    ],
)
def test_what_cannot_be_is_refused_by_field(text, end, fixed, message):
    with pytest.raises(UserError, match=message):
        schedule(text, end, fixed, SIZES, rows=4, steps=4)


def test_fixed_shares_may_stand_at_one_end_only():
    run = schedule("uniform", "fixed", {"a": 0, "b": 0, "c": 1}, SIZES, rows=3, steps=100)
    assert run.counts(0) == {"a": 1, "b": 1, "c": 1}
    assert run.counts(99) == {"a": 0, "b": 0, "c": 3}


@pytest.fixture
def _mixtures_restored():
    before = dict(mixture.MIXTURES)
    yield
    mixture.MIXTURES._functions.clear()
    mixture.MIXTURES._functions.update(before)


@pytest.mark.usefixtures("_mixtures_restored")
def test_a_mixture_of_a_script():
    @mixture.register_mixture("power")
    def power(sizes, exponent, floor: Annotated[float, Limits(0, 5)] = 0.0):
        return {source: np.float32(size**exponent + floor) for source, size in sizes.items()}

    assert shares("power:exponent=0.5", SIZES) == pytest.approx(shares("temperature:t=2", SIZES), rel=1e-6)
    assert shares("power:exponent=0,floor=3", SIZES) == pytest.approx(shares("uniform", SIZES))
    run = schedule("power:exponent=1", "uniform", {}, SIZES, rows=111, steps=1000)
    assert run.counts(0) == {"a": 100, "b": 10, "c": 1}
    for text, message in (
        ("power", "batch.mixture is 'power'; write power:exponent=NUMBER,floor=NUMBER"),
        ("power:exponnt=1", r"it has no option 'exponnt' \(did you mean 'exponent'\?\); write power:exponent=NUMBER"),
        ("power:exponent=1,floor=-1", "floor must be at least 0 and at most 5"),
        ("power:1", "write power:exponent=NUMBER"),
    ):
        with pytest.raises(UserError, match=message):
            shares(text, SIZES)


@pytest.mark.usefixtures("_mixtures_restored")
def test_a_mixture_of_a_script_that_takes_the_shares():
    @mixture.register_mixture("scaled")
    def scaled(sizes, shares):
        return {source: size * shares[source] for source, size in sizes.items()}

    mixture.check("scaled", "", {"a": 1.0})
    assert shares("scaled", SIZES, {"a": 0.01, "b": 0.1, "c": 1.0}) == pytest.approx(shares("uniform", SIZES))
    with pytest.raises(UserError, match=r"batch\.shares is empty, but the mixture is scaled"):
        mixture.check("scaled", "", {})
    with pytest.raises(UserError, match=r"batch\.shares is for the mixture fixed, scaled, but batch\.mixture is 'uniform'"):
        mixture.check("uniform", "", {"a": 1.0})
    with pytest.raises(
        UserError, match=r"the mixture scaled of .*test_mixture\.py failed: KeyError: 'b' \(.*test_mixture\.py:"
    ):
        shares("scaled", SIZES, {"a": 1.0})


@pytest.mark.usefixtures("_mixtures_restored")
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 1, 1], "returned a list; it must return {source: number}"),
        ({"a": 1, "b": 1}, "returned no number for c; give every source one, 0 for never"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, "unknown source in what batch.mixture: the mixture odd of .* returned: 'd'"),
        ({"a": -1, "b": 1, "c": 1}, "returned -1 for a; it must be a finite number, not negative"),
        ({"a": "1", "b": 1, "c": 1}, "returned '1' for a"),
        ({"a": 0, "b": 0, "c": 0}, "returned 0 for every source"),
    ],
)
def test_what_a_mixture_of_a_script_may_not_return(returned, message):
    mixture.register_mixture("odd")(lambda sizes: returned)
    with pytest.raises(UserError, match=message):
        shares("odd", SIZES)
