import numpy as np
import pytest

from mtl_jax import Optimizer
from mtl_jax import optimizer as optimizers
from mtl_jax.errors import UserError


def rates(steps=40, **fields):
    schedule = optimizers.schedule(Optimizer(**fields), 2.0, steps)
    return np.array([float(schedule(step)) for step in range(steps)])


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_every_schedule_rises_evenly_to_its_peak(name):
    np.testing.assert_allclose(rates(schedule=name, warmup=0.25)[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)


def test_inverse_square_root_of_the_steps():
    """Peak * sqrt(warm-up / steps), wherever the phase ends."""
    expected = [2.0 * np.sqrt(10 / max(10, step)) for step in range(10, 40)]
    np.testing.assert_allclose(rates(schedule="inverse_sqrt", warmup=0.25)[9:39], expected, rtol=1e-6)
    np.testing.assert_allclose(rates(steps=80, schedule="inverse_sqrt", warmup=0.125)[9:39], expected, rtol=1e-6)


def test_linear_and_cosine_end_at_0():
    for name in ("linear", "cosine"):
        assert rates(schedule=name, warmup=0.25)[-1] == pytest.approx(0.0, abs=0.01)


def test_a_schedule_that_is_none():
    with pytest.raises(UserError, match=r"unknown schedule 'inverse_sqr' .did you mean 'inverse_sqrt'"):
        optimizers.check(Optimizer(schedule="inverse_sqr"))
