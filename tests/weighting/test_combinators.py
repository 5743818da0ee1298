import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.weighting import Signals

NAMES = ("a", "b", "c")


def signals(values, step=0, gram=None, counts=None):
    losses = dict(zip(NAMES, jnp.asarray(values, jnp.float32), strict=True))
    counts = None if counts is None else dict(zip(NAMES, jnp.asarray(counts, jnp.float32), strict=True))
    return Signals(losses, gram, jnp.int32(step), jax.random.key(step), counts)


def run(rule, history, **more):
    state, actual = rule.init(NAMES), []
    for step, values in enumerate(history):
        weights, state = jax.jit(rule.update)(state, signals(values, step, **more))
        actual.append([float(weights[name]) for name in NAMES])
    return np.array(actual)


def by_loss(factor=1.0):
    """A rule whose weights are the losses."""
    return weighting.Rule(
        init=lambda names: (), update=lambda s, x: ({task: factor * loss for task, loss in x.losses.items()}, s)
    )


def test_normalized_sets_the_sum():
    np.testing.assert_allclose(run(weighting.normalized(by_loss()), [[1, 1, 2]])[0], [0.75, 0.75, 1.5])
    np.testing.assert_allclose(run(weighting.normalized(by_loss(), total=1), [[1, 1, 2]])[0], [0.25, 0.25, 0.5])
    np.testing.assert_allclose(run(weighting.normalized(by_loss(1e30)), [[1, 1, 2]])[0], [0.75, 0.75, 1.5])
    np.testing.assert_allclose(run(weighting.normalized(by_loss()), [[0, 0, 0]])[0], [1, 1, 1])
    two = run(weighting.normalized(by_loss()), [[1, 3, 0]], counts=[1, 1, 0])[0]
    np.testing.assert_allclose(two, [0.5, 1.5, 0])


def test_every_holds_the_weights():
    actual = run(weighting.every(by_loss(), k=3), [[n, n, n] for n in range(1, 8)])
    np.testing.assert_allclose(actual[:, 0], [1, 1, 1, 4, 4, 4, 7])


def test_every_needs_no_gram_matrix_where_it_is_not_due():
    rule = weighting.every(weighting.mgda(), k=2)
    state = rule.init(NAMES)
    assert bool(rule.due(state))
    weights, state = rule.update(state, signals([1, 1, 1], gram=jnp.diag(jnp.asarray([1.0, 2.0, 4.0]))))
    assert not bool(rule.due(state))
    held, state = rule.update(state, signals([1, 1, 1], step=1))
    assert held == weights
    assert bool(rule.due(state))


@pytest.mark.parametrize("wrap", [lambda update: update, jax.jit])
@pytest.mark.parametrize("combinators", [("every:k=2",), ("every:k=2", "ema", "normalized")])
@pytest.mark.parametrize(("name", "field"), [("mgda", "gram"), ("modo", "cross")])
def test_every_asks_for_a_signal_that_is_forgotten(wrap, combinators, name, field):
    rule = weighting.make(name)
    for combinator in combinators:
        rule = weighting.combine(rule, combinator)
    with pytest.raises(UserError, match=rf"weighting {name} needs Signals\.{field}, the inner products"):
        wrap(rule.update)(rule.init(NAMES), signals([1, 1, 1]))


def test_every_keeps_the_weights_in_a_traced_step_that_says_it_is_not_due():
    rule = weighting.make("mgda")
    for combinator in ("every:k=2", "ema:decay=0"):
        rule = weighting.combine(rule, combinator)
    rule = weighting.base.asks_for_signals(rule._replace(name="mine"))  # as that of a script's function
    first, state = rule.update(rule.init(NAMES), signals([1, 1, 1], gram=jnp.diag(jnp.asarray([1.0, 2.0, 4.0]))))
    held, _ = jax.jit(rule.update)(state, signals([1, 1, 1], step=1)._replace(not_due=()))
    assert held == first


def test_subset_draws_by_the_number_of_examples():
    counts = np.array([1.0, 4.0, 16.0])
    history = [[1, 1, 1]] * 400
    actual = run(weighting.subset(weighting.equal(), s=2), history, counts=counts)
    assert set(map(tuple, actual)) <= {(1, 1, 0), (1, 0, 1), (0, 1, 1)}
    one = run(weighting.subset(weighting.equal(), s=1), history, counts=counts)
    np.testing.assert_allclose(one.mean(axis=0), counts / counts.sum(), atol=0.07)
    half = run(weighting.subset(weighting.equal(), s=1, temperature=2), history, counts=counts)
    np.testing.assert_allclose(half.mean(axis=0), np.sqrt(counts) / np.sqrt(counts).sum(), atol=0.07)


def test_subset_gives_the_rule_those_tasks_only():
    gram = jnp.diag(jnp.asarray([1.0, 2.0, 4.0]))
    for weights in run(weighting.subset(weighting.mgda(), s=2), [[1, 1, 1]] * 5, gram=gram):
        inverse = np.where(weights > 0, 1 / np.array([1.0, 2.0, 4.0]), 0)
        np.testing.assert_allclose(weights, inverse / inverse.sum(), atol=1e-3)


@pytest.mark.parametrize("outer", [(), ("subset:s=1",), ("ema:decay=0", "normalized")])
@pytest.mark.parametrize("name", ["graddrop", "trimmed_mean", "excess_risk", "db_mtl", "moco"])
def test_subset_changes_the_gradients_of_the_tasks_that_it_weighs(name, outer):
    """One task of three is drawn, each with a parameter of its own: only this parameter gets a gradient, in every step."""
    rule = weighting.make(name)
    for combinator in ("subset:s=1" if not outer else "subset:s=2", *outer):
        rule = weighting.combine(rule, combinator)
    wanted = 2 if outer and "subset:s=1" not in outer else 1
    tasks = {task: {"kernel": row} for task, row in zip(NAMES, jnp.eye(3), strict=True)}
    losses = dict.fromkeys(NAMES, jnp.float32(1))

    @jax.jit
    def step(state, number):
        key = jax.random.key(number)
        return weighting.gradient(rule, state, tasks, losses, step=number, key=key)

    state = weighting.init(rule, tasks)
    for number in range(12):
        gradient, weights, state = step(state, number)
        drawn = np.array([float(weights[task]) > 0 for task in NAMES])
        assert drawn.sum() == wanted
        np.testing.assert_array_equal(np.abs(gradient["kernel"]) > 1e-6, drawn)


def test_under_subset_no_other_task_decides_a_sign():
    rule = weighting.combine(weighting.graddrop(), "subset:s=1")
    tasks = {"a": {"kernel": jnp.ones(50)}, "b": {"kernel": -9 * jnp.ones(50)}}
    losses, drawn = dict.fromkeys(tasks, jnp.float32(1)), set()
    for number in range(8):
        gradient, weights, _ = weighting.gradient(rule, (), tasks, losses, step=number, key=jax.random.key(number))
        (task,) = (task for task in tasks if float(weights[task]))
        drawn.add(task)
        np.testing.assert_allclose(gradient["kernel"], tasks[task]["kernel"])
    assert drawn == set(tasks)


def test_clipped_and_ema():
    np.testing.assert_allclose(run(weighting.clipped(by_loss(), low=0.5, high=2), [[0, 1, 9]])[0], [0.5, 1, 2])
    actual = run(weighting.ema(by_loss(), decay=0.5), [[4, 4, 4], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(actual[:, 0], [4, 2, 1])


def test_combinators_go_around_each_other():
    rule = weighting.make("mgda")
    for text in ("every:k=2", "ema:decay=0.5", "clipped:high=0.4", "normalized:total=3", "subset:s=2,temperature=inf"):
        rule = weighting.combine(rule, text)
    assert rule.needs_gram
    assert rule.due is not None
    actual = run(rule, [[1, 1, 1]] * 4, gram=jnp.diag(jnp.asarray([1.0, 2.0, 4.0])))
    assert np.isfinite(actual).all()


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        (lambda: weighting.combine(weighting.equal(), "mean"), "unknown combinator 'mean'.*normalized, every"),
        (lambda: weighting.combine(weighting.equal(), "every"), "combinator 'every' needs k"),
        (lambda: weighting.combine(weighting.equal(), "every:n=3"), "unknown option of combinator 'every': 'n'.*choices: k"),
        (lambda: weighting.combine(weighting.equal(), "every:k=often"), "k is 'often'; it must be a number"),
        (lambda: weighting.combine(weighting.equal(), "every:k='3'"), "k is '3'; it must be a number"),
        (lambda: weighting.combine(weighting.equal(), "every:k=inf"), "k is inf; it must be a whole number of at least 1"),
        (lambda: weighting.combine(weighting.equal(), "clipped:high=2,high=3"), "high is given twice; write clipped:"),
        (lambda: weighting.clipped(weighting.equal(), low=float("inf")), "low is inf; it must be a finite number"),
        (lambda: weighting.every(weighting.equal(), k=0), "k is 0"),
        (lambda: weighting.every(weighting.graddrop(), k=2), "changes the task gradients in every step"),
        (lambda: weighting.normalized(weighting.equal(), total=0), "total is 0"),
        (lambda: weighting.subset(weighting.equal(), s=4).init(NAMES), "s is 4, but there are 3 tasks"),
        (lambda: weighting.subset(weighting.equal(), s=1, temperature=0), "temperature is 0"),
        (lambda: weighting.clipped(weighting.equal(), low=2, high=1), "low is 2 and high is 1"),
        (lambda: weighting.ema(weighting.equal(), decay=1.0), "decay is 1.0"),
    ],
)
def test_bad_input(maker, message):
    with pytest.raises(UserError, match=message):
        maker()
