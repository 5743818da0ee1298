import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.weighting import Signals

RULES = ("equal", "uncertainty", "dwa", "rlw", "gls", "imtl_l", "stch", "famo", "excess")


def signals(losses, step=0):
    losses = {task: jnp.float32(loss) for task, loss in losses.items()}
    return Signals(losses=losses, gram=None, step=jnp.int32(step), key=jax.random.key(step))


def run(rule, history):
    """The weights after each set of losses."""
    state = rule.init(tuple(history[0]))
    actual = []
    for step, losses in enumerate(history):
        weights, state = rule.update(state, signals(losses, step))
        actual.append({task: float(weight) for task, weight in weights.items()})
    return actual


def test_equal_is_the_plain_sum():
    assert run(weighting.equal(), [{"a": 3.0, "b": 5.0}]) == [{"a": 1.0, "b": 1.0}]
    assert weighting.weighted_sum({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 5.0}) == 8.0


def test_fixed_takes_numbers_and_schedules():
    rule = weighting.fixed({"target": 1, "source": optax.linear_schedule(1.0, 0.0, 4)})
    assert [w["source"] for w in run(rule, [{"target": 1.0, "source": 1.0}] * 5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_dwa_follows_the_formula():
    weights = run(weighting.dwa(), [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 4.0}, {"a": 9.0, "b": 9.0}])
    assert weights[0] == weights[1] == {"a": 1.0, "b": 1.0}
    expected = 2 * np.exp([0.5, 2.0]) / np.exp([0.5, 2.0]).sum()
    np.testing.assert_allclose(list(weights[2].values()), expected, rtol=1e-6)


@given(st.lists(st.tuples(*[st.floats(0, 2.0**50, width=32, allow_subnormal=False)] * 3), min_size=1, max_size=6))
def test_dwa_weights_are_finite_and_sum_to_k(history):
    for weights in run(weighting.dwa(), [dict(zip("abc", losses, strict=True)) for losses in history]):
        assert sum(weights.values()) == pytest.approx(3, rel=1e-5)


THREE = {"a": 1.0, "b": 2.0, "c": 4.0}


def objective(rule, losses):
    return float(rule.objective(rule.init(tuple(losses)), signals(losses)))


def test_objectives_of_the_papers():
    assert objective(weighting.uncertainty(), THREE) == pytest.approx(3.5)
    assert objective(weighting.gls(), THREE) == pytest.approx(2.0)
    assert objective(weighting.stch(mu=1.0), {"a": 0.0, "b": 0.0}) == pytest.approx(np.log(2))
    assert objective(weighting.imtl_l(), THREE) == pytest.approx(7.0)


@pytest.mark.parametrize("name", ["uncertainty", "gls", "stch", "imtl_l"])
def test_the_weights_are_the_derivative_of_the_objective(name):
    rule = weighting.make(name)
    state = rule.init(tuple(THREE))
    for step in range(3):  # also where the rule's own numbers have moved
        at = signals(THREE, step)
        expected = jax.grad(lambda losses, at=at, state=state: rule.objective(state, at._replace(losses=losses)))(at.losses)
        weights, state = rule.update(state, at)
        for task in THREE:
            assert weights[task] == pytest.approx(float(expected[task]), rel=1e-5)


def test_learned_weights_find_their_optimum():
    """Kendall et al.: 1 / (2 L); IMTL-L: 1 / L."""
    for rule, factor in ((weighting.uncertainty(learning_rate=0.1), 0.5), (weighting.imtl_l(learning_rate=0.1), 1.0)):
        state = rule.init(tuple(THREE))
        update = jax.jit(rule.update)
        for _ in range(300):
            weights, state = update(state, signals(THREE))
        for task, loss in THREE.items():
            assert weights[task] == pytest.approx(factor / loss, rel=1e-2)


def test_rlw_draws_from_the_key():
    rule = weighting.rlw()
    actual = run(rule, [THREE] * 200)
    assert actual == run(rule, [THREE] * 200)
    assert all(sum(w.values()) == pytest.approx(1) for w in actual)
    np.testing.assert_allclose(np.mean([list(w.values()) for w in actual], axis=0), 1 / 3, atol=0.05)
    uniform = run(weighting.rlw(distribution="dirichlet"), [THREE] * 400)
    first = np.array([w["a"] for w in uniform])
    assert np.mean(first > 0.5) == pytest.approx(0.25, abs=0.07)  # (1 - 1/2)^2 of the simplex


def famo_written_out(history, rate=0.025, decay=0.01):
    """The paper's algorithm with the next step's losses, in float64."""
    K = len(history[0])
    xi, m, v, t, actual = np.zeros(K), np.zeros(K), np.zeros(K), 0, []
    for n, losses in enumerate(history):
        if n:
            change = np.log(history[n - 1]) - np.log(losses)
            z = np.exp(xi) / np.exp(xi).sum()
            gradient = (np.diag(z) - np.outer(z, z)) @ change + decay * xi
            t += 1
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            xi = xi - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        z = np.exp(xi) / np.exp(xi).sum()
        actual.append(z / losses / (z / losses).sum())
    return actual


def test_famo_is_the_algorithm_written_out():
    history = np.random.default_rng(0).uniform(0.5, 3.0, size=(6, 3))
    actual = run(weighting.famo(), [dict(zip("abc", map(float, losses), strict=True)) for losses in history])
    np.testing.assert_allclose([list(w.values()) for w in actual], famo_written_out(history), rtol=1e-4)


def test_excess_counts_from_the_reference():
    """The noisy task's loss is at its floor: its weight falls, though its loss is the largest."""
    rule = weighting.excess(learning_rate=1.0, reference={"easy": 0.0, "noisy": 4.0})
    actual = run(rule, [{"easy": 2.0, "noisy": 5.0}, {"easy": 1.0, "noisy": 4.0}])
    assert actual[0] == {"easy": 0.5, "noisy": 0.5}
    expected = np.exp([1.5, 1.0]) / np.exp([1.5, 1.0]).sum()
    np.testing.assert_allclose(list(actual[1].values()), expected, rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("losses", [(0.0, 0.0), (1e-15, 1e15), (1e15, 1e15), (0.0, 1e15), (3.0,)])
def test_weights_are_finite(name, losses):
    rule = weighting.make(name)
    history = [{f"t{i}": scale * loss for i, loss in enumerate(losses)} for scale in (1.0, 0.5, 2.0, 0.0)]
    for weights in run(rule, history):
        assert np.isfinite(list(weights.values())).all()


@pytest.mark.parametrize(
    ("weight", "values"),
    [
        ("linear_schedule(1.0, 0.0, 4)", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("piecewise_constant_schedule(1.0, {2: 0.5})", [1.0, 1.0, 0.5, 0.5, 0.5]),
        ("exponential_decay(init_value=1.0, transition_steps=1, decay_rate=0.5)", [1.0, 0.5, 0.25, 0.125, 0.0625]),
        ("dann_schedule(0.0, 1.0, 4)", [2 / (1 + np.exp(-10 * p)) - 1 for p in (0, 0.25, 0.5, 0.75, 1)]),
        ("dann_schedule(2.0, 0.0, 2, 3)", [4 - 4 / (1 + np.exp(-3 * p)) for p in (0, 0.5, 1, 1, 1)]),
        ("sigmoid_schedule(0.0, 1.0, 4, 8, 0.25)", [1 / (1 + np.exp(-2 * (t - 1))) for t in range(5)]),
        ("sigmoid_schedule(1.0, 0.5, 4)", [1 - 0.5 / (1 + np.exp(-2.5 * (t - 2))) for t in range(5)]),
        ("2.5", [2.5] * 5),
        (optax.constant_schedule(3.0), [3.0] * 5),
    ],
)
def test_scheduled_takes_the_calls_of_optax_as_text(weight, values):
    actual = run(weighting.scheduled({"target": 1, "source": weight}), [{"target": 1.0, "source": 1.0}] * 5)
    np.testing.assert_allclose([w["source"] for w in actual], values, rtol=1e-5)


def test_a_schedule_is_looked_at_in_every_step():
    weighting.check_steps({"a": "linear_schedule(1.0, 0.0, 10)"}, range(1000))
    with pytest.raises(UserError, match=r"schedule of a is -0.5 at step 15; it must be finite and not negative"):
        weighting.check_steps({"a": "linear_schedule(7.0, -1.0, 16)"}, range(21))
    weighting.check_steps({"a": "linear_schedule(7.0, -1.0, 16)"}, range(14))
    with pytest.raises(UserError, match="schedule of a is inf at step 0"):
        weighting.check_steps({"a": lambda step: 1.0 / step}, range(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighting.make("pcgard"), "unknown weighting 'pcgard'.*choices: equal, fixed, scheduled, uncertainty"),
        (lambda: weighting.make("dwa", temp=1), "unknown option of weighting 'dwa': 'temp'.*temperature"),
        (lambda: weighting.make("fixed"), "needs weights"),
        (lambda: weighting.dwa(temperature=0), "temperature is 0"),
        (lambda: weighting.make("uncertainty", learning_rate=0.0), "learning_rate is 0.0; it must be a finite number above 0"),
        (lambda: weighting.make("stch", mu="a"), "mu is 'a'; it must be a number"),
        (lambda: weighting.make("rlw", distribution="cauchy"), "distribution is 'cauchy'; it must be normal or dirichlet"),
        (lambda: weighting.make("rlw", distribution=3.0), "distribution is 3.0; it must be normal or dirichlet"),
        (lambda: weighting.make("excess", reference="low"), "reference is 'low'; it must be a number"),
        (lambda: weighting.make("famo", lowest=float("nan")), "lowest is nan; it must be a finite number"),
        (lambda: weighting.famo(decay=-1.0), "decay is -1.0"),
        (lambda: weighting.excess(reference={"a": 1.0}).init(["a", "b"]), "no reference for b"),
        (lambda: weighting.scheduled({"a": "__import__('os').system('true')"}), "a is .*; write a number or a schedule"),
        (lambda: weighting.scheduled({"a": "sine_schedule(1)"}), "unknown schedule.*'sine_schedule'.*linear_schedule"),
        (lambda: weighting.scheduled({"a": "linear_schedule(1)"}), "a is 'linear_schedule.1.': .*missing"),
        (lambda: weighting.scheduled({"a": "linear_schedule(open('x'), 0, 1)"}), "write a number or a schedule"),
        (lambda: weighting.scheduled({"a": "dann_schedule(0, 1, 0)"}), "a is .*: transition_steps is 0; it must be above 0"),
        (lambda: weighting.scheduled({"a": "sigmoid_schedule(0, 1, 5, 0)"}), "sharpness is 0; it must be above 0"),
        (lambda: weighting.fixed({"a": -1.0}), "a is -1.0; a weight must be finite and not negative"),
        (lambda: weighting.fixed({"a": float("nan")}), "a is nan"),
        (lambda: weighting.fixed({"a": 1.0}).init(["a", "b"]), "no weight for b"),
        (lambda: weighting.fixed({"a": 1.0, "c": 1.0}).init(["a"]), "unknown task in weights: 'c'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message):
        make()
