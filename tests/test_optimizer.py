import numpy as np
import pytest

from mtl_jax import Optimizer
from mtl_jax import optimizer as optimizers
from mtl_jax.errors import UserError


def rates(steps=40, **fields):
    schedule = optimizers.schedule(Optimizer(**fields), 2.0, steps)
    return np.array([float(schedule(step)) for step in range(steps)])


@pytest.mark.parametrize("name", [name for name in optimizers.SCHEDULES if name != "slanted_triangular"])
def test_every_schedule_but_the_slanted_one_rises_evenly_to_its_peak(name):
    np.testing.assert_allclose(rates(schedule=name, warmup=0.25)[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)


def test_inverse_square_root_of_the_steps():
    """Peak * sqrt(warm-up / steps), wherever the phase ends."""
    expected = [2.0 * np.sqrt(10 / max(10, step)) for step in range(10, 40)]
    np.testing.assert_allclose(rates(schedule="inverse_sqrt", warmup=0.25)[9:39], expected, rtol=1e-6)
    np.testing.assert_allclose(rates(steps=80, schedule="inverse_sqrt", warmup=0.125)[9:39], expected, rtol=1e-6)


def test_linear_and_cosine_end_at_0():
    for name in ("linear", "cosine"):
        assert rates(schedule=name, warmup=0.25)[-1] == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(("steps", "cut_frac"), [(40, 0.25), (45, 0.1), (40, 0.0), (40, 1.0)])
def test_slanted_triangular_as_the_paper_has_it(steps, cut_frac):
    cut, ratio, expected = round(cut_frac * steps), 8.0, []
    for t in range(1, steps + 1):
        p = t / cut if t < cut else 1 - (t - cut) / max(1, steps - cut)
        if t >= cut and cut and cut == cut_frac * steps and cut < steps:
            assert p == pytest.approx(1 - (t - cut) / (cut * (1 / cut_frac - 1)))
        expected.append(2.0 * (1 + p * (ratio - 1)) / ratio)
    np.testing.assert_allclose(rates(steps, schedule="slanted_triangular", warmup=cut_frac, ratio=ratio), expected, rtol=1e-6)
    assert expected[-1] == (2.0 if cut == steps else 2.0 / ratio)
    assert cut == 0 or max(expected) == expected[cut - 1] == 2.0


def test_a_ratio_below_1():
    with pytest.raises(UserError, match=r"optimizer.ratio is 0\.5"):
        optimizers.check(Optimizer(schedule="slanted_triangular", ratio=0.5))


def test_a_schedule_that_is_none():
    with pytest.raises(UserError, match=r"unknown schedule 'inverse_sqr' .did you mean 'inverse_sqrt'"):
        optimizers.check(Optimizer(schedule="inverse_sqr"))
