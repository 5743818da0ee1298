"""Examples that are drawn independently of each other."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from mtl_jax import Batching
from mtl_jax.core.errors import UserError
from mtl_jax.data import batch_shape, poisson
from mtl_jax.data.batch_plan import PlanCache, PoissonPlan
from mtl_jax.data.ragged import Ragged
from mtl_jax.data.source_arrays import SourceArrays

BATCHING = Batching(rows=24, row_length=4, packed=False, sampling="poisson", expected_rows=9)
SIZES = {"many": 40, "few": 10}
SHARES = [(100, {"many": 2 / 3, "few": 1 / 3})]


def arrays(name, size, first_id):
    tokens = Ragged.of([np.array([n + 1], np.int32) for n in range(size)], np.int32)
    return SourceArrays(name, first_id, tokens, None, {})


def plan(batching=BATCHING, seed=0, shares=SHARES):
    schedule = poisson.schedule(batching, SIZES, shares)
    sources = (arrays("many", 40, 0), arrays("few", 10, 40))
    return PoissonPlan(sources, (), False, batching, schedule, seed, 0, 1)


def drawn(of, steps, state=None):
    """bool[steps, examples]: which examples are in which batch."""
    state, caches = of.start() if state is None else state, [PlanCache(), PlanCache()]
    result = np.zeros((steps, 50), bool)
    for step in range(steps):
        batch = of.fill(of.advance(state, caches))
        assert batch.index.shape == (of.batching.rows, 1)
        ids = batch.index[batch.index >= 0]
        assert len(set(ids.tolist())) == len(ids) == (batch.source >= 0).sum()
        result[step, ids] = True
    return result


def test_every_example_is_drawn_with_its_sources_rate_and_independently():
    steps = 2000
    taken = drawn(plan(), steps).astype(float)
    expected = np.repeat([6 / 40, 3 / 10], [40, 10])
    deviation = np.sqrt(expected * (1 - expected) / steps)
    assert (np.abs(taken.mean(axis=0) - expected) < 4.5 * deviation).all()
    correlations = np.corrcoef(taken.T)[np.triu_indices(50, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(steps)
    following = [np.corrcoef(taken[:-1, n], taken[1:, n])[0, 1] for n in range(50)]
    assert np.abs(following).max() < 5 / np.sqrt(steps)
    sizes = taken.sum(axis=1)  # a sum of independent draws
    assert sizes.var() == pytest.approx((expected * (1 - expected)).sum(), rel=0.1)


def test_a_position_resumes_and_the_seed_decides():
    whole = drawn(plan(), 12)
    state, caches = plan().start(), [PlanCache(), PlanCache()]
    for _ in range(5):
        plan().advance(state, caches)
    np.testing.assert_array_equal(drawn(plan(), 7, state), whole[5:])
    assert (drawn(plan(seed=1), 12) != whole).any()


def test_more_rows_than_fit_are_left_out():
    tight = plan(dataclasses.replace(BATCHING, rows=10, expected_rows=10))
    assert (drawn(tight, 40).sum(axis=1) <= 10).all()


def test_the_bound_on_overflow_holds_and_the_chosen_size_keeps_it():
    for rows, size in ((32, 500), (64, 1000), (256, 4000)):
        expected = poisson.expected_rows(rows, size)
        exact = scipy.stats.binom.sf(rows, size, expected / size)
        assert exact <= poisson.overflow(rows, expected) <= poisson.OVERFLOW < poisson.overflow(rows, expected + 1)
    assert poisson.overflow(10, 11) == 1.0
    assert plan(dataclasses.replace(BATCHING, rows=51)).schedule.overflow(10) == 0.0  # all examples fit, and one more
    assert plan().schedule.overflow(10) == pytest.approx(10 * poisson.overflow(24, 9.3))


def test_rates_of_several_mixtures():
    schedule = poisson.schedule(BATCHING, SIZES, [(4, {"many": 1.0, "few": 0.0}), (6, {"many": 0.5, "few": 0.5})])
    assert schedule.rates_until(3) == {"many": [(9 / 40, 3)], "few": [(0.0, 3)]}
    assert schedule.rates_until(12) == {"many": [(9 / 40, 4), (4.5 / 40, 8)], "few": [(0.0, 4), (0.45, 8)]}
    assert schedule.rates(3) == {"many": 9 / 40, "few": 0.0}
    assert schedule.rates(4) == {"many": 4.5 / 40, "few": 0.45}
    assert schedule.capacity(range(3)) == {"many": 24, "few": 10}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sampling": "poison"}, r"unknown batch\.sampling 'poison' \(did you mean 'poisson'\?\)"),
        ({"packed": True}, r"batch\.sampling poisson draws every example alone.*--batch\.no-packed"),
        ({"mixture_end": "proportional"}, r"batch\.mixture_end: with the sampling poisson each phase has one mixture"),
        ({"expected_rows": 25}, r"batch\.expected_rows is 25; it must be at most batch\.rows, 24"),
        ({"sampling": "shuffled"}, r"batch\.expected_rows is for the sampling poisson"),
    ],
)
def test_wrong_fields_are_one_line(changes, line):
    with pytest.raises(UserError, match=line):
        batch_shape.check(dataclasses.replace(BATCHING, **changes))


def test_a_source_with_too_few_examples_is_one_line():
    with pytest.raises(UserError, match=r"expected to have 12 rows of source 'few', which has 10"):
        plan(dataclasses.replace(BATCHING, expected_rows=12), shares=[(1, {"many": 0.0, "few": 1.0})])
