"""Rules that know their target, against their definitions written out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.weighting import Signals

NAMES = ("b", "a", "c")  # rows of gradients are in the sorted order a, b, c
UPDATE = {  # one program for all examples: the options of pcd are inputs
    "gcs": jax.jit(lambda state, signals, tau: weighting.gcs("b").update(state, signals)),
    "weighted": jax.jit(lambda state, signals, tau: weighting.gcs("b", weighted=True).update(state, signals)),
    "pcd": jax.jit(lambda state, signals, tau: weighting.pcd("b", tau=tau, beta=0.9).update(state, signals)),
}
INIT = {"gcs": weighting.gcs("b"), "weighted": weighting.gcs("b", weighted=True), "pcd": weighting.pcd("b", beta=0.9)}


def weigh(name, rows, state=None, tau=0.02, counts=(1, 1, 1)):
    """Weights f64[3] in the order a, b, c, and the state."""
    rows = np.asarray(rows, np.float64)
    tasks = sorted(NAMES)
    by_task = dict(zip(tasks, jnp.ones(3), strict=True))
    present = dict(zip(tasks, map(jnp.float32, counts), strict=True))
    signals = Signals(by_task, jnp.asarray(rows @ rows.T, jnp.float32), jnp.int32(0), jax.random.key(0), present)
    weights, state = UPDATE[name](INIT[name].init(NAMES) if state is None else state, signals, tau)
    return np.array([float(weights[task]) for task in tasks]), state


def drawn(seed, width=6):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, width)) + rng.choice([-2, 0, 2]) * rng.normal(size=width)
    return rows * 10.0 ** rng.uniform(-2, 2, 3)[:, None]


@pytest.mark.parametrize("seed", range(20))
def test_gcs_by_hand(seed):
    rows = drawn(seed)
    cosines = rows @ rows[1] / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows[1])
    weights, _ = weigh("gcs", rows)
    assert weights.tolist() == [float(cosines[0] > 0), 1.0, float(cosines[2] > 0)]
    weights, _ = weigh("weighted", rows)
    np.testing.assert_allclose(weights, np.maximum(cosines, 0), atol=1e-5)


def bent(u, first, tau):
    """The definition of pcd for scaled gradients: every set of active constraints is tried. None: no point meets them."""
    others = [row for row in range(len(u)) if row != first]
    best = None
    for size in range(len(others) + 1):
        for active in itertools.combinations(others, size):
            d = u[first]
            if active:
                rows = u[list(active)]
                short = tau * (rows**2).sum(1) - rows @ u[first]
                shares = np.linalg.lstsq(rows @ rows.T, short, rcond=None)[0]
                d = u[first] + shares @ rows
                if (shares < -1e-9).any():
                    continue
            if all(u[row] @ d >= tau * (u[row] ** 2).sum() - 1e-9 for row in others):
                distance = np.linalg.norm(d - u[first])
                best = d if best is None or distance < np.linalg.norm(best - u[first]) else best
    return best


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_pcd_by_hand_over_three_steps(seed, tau):
    state, mean = None, np.zeros(3)
    for step in range(3):
        rows = drawn(100 * seed + step)
        mean = 0.9 * mean + 0.1 * (rows**2).sum(1)
        u = rows / np.sqrt(mean / (1 - 0.9 ** (step + 1)) + 1e-8)[:, None]
        d = bent(u, 1, tau)
        expected = rows[1] if d is None else d / np.linalg.norm(d) * np.linalg.norm(rows[1])
        weights, state = weigh("pcd", rows, state, tau)
        np.testing.assert_allclose(weights @ rows, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_of_two_tasks_pcd_has_a_formula(seed):
    """d = u_1 + max(0, tau - u_2 . u_1 / |u_2|^2) u_2; the third task has no labelled row."""
    rows, tau = drawn(seed), 0.1
    u = rows / np.sqrt((rows**2).sum(1) + 1e-8)[:, None]  # after one step the debiased average is the squared length
    d = u[1] + max(0.0, tau - u[0] @ u[1] / (u[0] @ u[0])) * u[0]
    weights, _ = weigh("pcd", rows, tau=tau, counts=(1, 1, 0))
    assert weights[2] == 0
    expected = d / np.linalg.norm(d) * np.linalg.norm(rows[1])
    np.testing.assert_allclose(weights[:2] @ rows[:2], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_special_cases_of_pcd():
    opposite = np.array([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0]])
    weights, _ = weigh("pcd", opposite, tau=0.1)  # no step helps both sources
    np.testing.assert_allclose(weights, [0, 1, 0], atol=1e-4)
    weights, _ = weigh("pcd", np.array([[1.0, 0], [0, 0], [0, 1]]))  # the target has no gradient
    assert np.abs(weights @ np.array([[1.0, 0], [0, 0], [0, 1]])).max() == 0
    weights, _ = weigh("pcd", np.array([[1.0, 0], [1, 1], [0, 0]]))  # a source without one
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("name", INIT)
def test_without_the_target_no_task_counts_and_its_state_stays(name):
    rows = drawn(3)
    _, before = weigh(name, rows)
    weights, after = weigh(name, rows, before, counts=(1, 0, 1))
    assert weights.tolist() == [0, 0, 0]
    if name == "pcd":
        assert float(after["mean"][1]) == float(before["mean"][1])
        assert float(after["steps"][1]) == float(before["steps"][1]) == 1


@pytest.mark.parametrize("rule", [weighting.gcs, weighting.pcd, weighting.auto_lambda])
def test_a_target_that_is_no_task(rule):
    with pytest.raises(UserError, match=r"unknown target of weighting .*'bb'.*did you mean 'b'"):
        rule("bb").init(NAMES)
    with pytest.raises(UserError, match="target is 3; it must be the name of a task"):
        rule(3).init(NAMES)
    with pytest.raises(UserError, match="needs target"):
        weighting.make(rule.__name__)


@pytest.mark.parametrize(("option", "value"), [("tau", -0.1), ("tau", 1.5), ("beta", 1.0), ("eps", -1.0)])
def test_options_of_pcd(option, value):
    with pytest.raises(UserError, match=f"weighting pcd: {option} is {value}"):
        weighting.pcd("b", **{option: value})


def test_auto_lambda_by_hand_over_three_steps():
    """Adam on the derivative of the target's held-out loss after the step, by reverse-mode differentiation through it."""
    rule = weighting.auto_lambda("b", learning_rate=0.1, start=0.05, rate=0.3)
    state, expected = weighting.init(rule, {task: np.ones(6, np.float32) for task in NAMES}), jnp.full(3, 0.05)
    adam = optax.adam(0.1)
    adam_state, tasks = adam.init(expected), sorted(NAMES)

    def held_out(params):
        return jnp.square(params - 1).sum() + jnp.prod(params[:2])

    for step in range(3):
        rows, params = jnp.asarray(drawn(step), jnp.float32) / 100, jnp.linspace(-1.0, 1.0, 6) * (1 + step)
        gradients, losses = dict(zip(tasks, rows, strict=True)), dict.fromkeys(tasks, 1.0)
        present = np.array([True, True, step != 1])
        counts, shown = dict(zip(tasks, present.astype(np.float32), strict=True)), jnp.where(present, expected, 0.0)
        combined, weights, state = weighting.gradient(
            rule,
            state,
            gradients,
            losses,
            step=step,
            key=jax.random.key(0),
            counts=counts,
            held_out=weighting.look_ahead(held_out, params, gradients),
        )
        np.testing.assert_allclose([float(weights[task]) for task in tasks], shown, rtol=1e-4)
        np.testing.assert_allclose(combined, shown @ rows, rtol=1e-4, atol=1e-6)
        slope = jax.grad(lambda w, params=params, rows=rows: held_out(params - 0.3 * w @ rows))(shown) / 0.3
        updates, adam_state = adam.update(jnp.where(present, slope, 0.0), adam_state)
        expected = jnp.where(present, jnp.maximum(expected + updates, 0.0), expected)


@pytest.mark.parametrize(
    ("option", "value"), [("share", 0.0), ("share", 1.0), ("start", 0), ("learning_rate", 0), ("rate", -1)]
)
def test_options_of_auto_lambda(option, value):
    with pytest.raises(UserError, match=f"weighting auto_lambda: {option} is {value}"):
        weighting.auto_lambda("b", **{option: value})


def test_without_held_out_rows_auto_lambda_says_what_makes_the_signal():
    rule, gradients = weighting.auto_lambda("b"), {task: np.ones(2, np.float32) for task in NAMES}
    with pytest.raises(UserError, match=r"auto_lambda needs Signals\.held_out, .*weighting\.look_ahead\(loss, params, "):
        weighting.gradient(rule, rule.init(NAMES), gradients, dict.fromkeys(NAMES, 1.0), step=0, key=jax.random.key(0))
