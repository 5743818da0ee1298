"""Rules on two halves of a batch, beside loops over their definitions; test_beside_torchjd.py has further numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.weighting import Signals

NAMES = ("b", "a", "c")


def onto_simplex(values):
    """By bisection of the threshold."""
    low, high = values.min() - 1, values.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(values - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(values - low, 0)


def drawn(seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, 4)) * 10.0 ** rng.uniform(-1, 1, (3, 1))
    return (rows + rng.normal(size=rows.shape)) @ (rows + rng.normal(size=rows.shape)).T


RULES = {"modo": weighting.modo(gamma=0.2, rho=0.3), "sdmgrad": weighting.sdmgrad(lam=0.5, iterations=5, learning_rate=0.2)}
UPDATE = {name: jax.jit(rule.update) for name, rule in RULES.items()}


def weigh(name, state, cross, counts=(1, 1, 1)):
    losses = dict.fromkeys(sorted(NAMES), jnp.ones(()))
    present = dict(zip(sorted(NAMES), map(jnp.float32, counts), strict=True))
    signals = Signals(losses, None, jnp.int32(0), jax.random.key(0), present, cross=jnp.asarray(cross, jnp.float32))
    weights, state = UPDATE[name](state, signals)
    return np.array([float(weights[task]) for task in sorted(NAMES)]), state


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_the_definitions_over_three_steps(seed):
    lam, expected = 0.5, {name: np.full(3, 1 / 3) for name in RULES}
    states = {name: rule.init(NAMES) for name, rule in RULES.items()}
    for step in range(3):
        cross = drawn(seed + step)
        w = expected["modo"]
        expected["modo"] = onto_simplex(w - 0.2 * (cross @ w + 0.3 * w))
        weights, states["modo"] = weigh("modo", states["modo"], cross)
        np.testing.assert_allclose(weights, expected["modo"], atol=1e-4)
        weights, states["sdmgrad"] = weigh("sdmgrad", states["sdmgrad"], cross)
        np.testing.assert_allclose(weights, (expected["sdmgrad"] + lam / 3) / (1 + lam), atol=1e-3)  # of the steps before
        scaled = cross / (np.sqrt(np.maximum(np.diagonal(cross), 0)).mean() ** 2 + 1e-8)
        w, velocity = expected["sdmgrad"], 0.0
        for _ in range(5):
            velocity = 0.5 * velocity + scaled @ (w + lam / 3)
            w = onto_simplex(w - 0.2 * velocity)
        expected["sdmgrad"] = w


@pytest.mark.parametrize("name", RULES)
def test_a_task_that_is_missing_in_a_half_keeps_its_weight(name):
    _, state = weigh(name, RULES[name].init(NAMES), drawn(0))
    cross = drawn(1)
    cross[1] = cross[:, 1] = 0
    weights, after = weigh(name, state, cross)
    assert float(after[1]) == float(state[1])
    assert float(after.sum()) == pytest.approx(1.0, abs=1e-6)
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    weights, _ = weigh(name, after, cross, counts=(1, 0, 1))
    assert weights[1] == 0
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("modo", "gamma", 0.0),
        ("modo", "rho", -1.0),
        ("sdmgrad", "iterations", 1.5),
        ("sdmgrad", "learning_rate", 0.0),
        ("sdmgrad", "momentum", 1.0),
    ],
)
def test_options(name, option, value):
    with pytest.raises(UserError, match=f"weighting {name}: {option} is {value}"):
        weighting.make(name, **{option: value})


def test_without_halves_the_rule_says_what_makes_the_signal():
    gradients, given = {task: jnp.ones(2) for task in NAMES}, {"step": 0, "key": jax.random.key(0)}
    with pytest.raises(UserError, match=r"weighting modo needs Signals\.cross, .*weighting\.cross\(first, second\)"):
        weighting.gradient(weighting.modo(), jnp.ones(3) / 3, gradients, dict.fromkeys(NAMES, 1.0), **given)
    with pytest.raises(UserError, match="the two halves are of the tasks a, b, c and of a, b"):
        weighting.cross(gradients, {task: gradients[task] for task in ("a", "b")})
