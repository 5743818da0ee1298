"""Rules in a loop of one's own: the gradient of the train step, from task gradients that someone else computed."""

import functools

import every_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.training import task_gradients
from mtl_jax.weighting import RULES, Signals

NAMES = ("fine", "coarse", "rating")  # not in sorted order
CHANGING = ("graddrop", "moco", "db_mtl", "trimmed_mean")


def made(name):
    return every_rule.make(name, NAMES)


def squares(params):
    """A loss on held-out rows."""
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))


def drawn(seed):
    """Losses and task gradients, which conflict here and there."""
    rng = np.random.default_rng(seed)
    shapes = {"bias": (3,), "layer": {"kernel": (4, 3)}}

    def tree():
        return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple)

    return {name: jnp.float32(rng.uniform(0.5, 2)) for name in NAMES}, {name: tree() for name in NAMES}


def as_in_the_train_step(rule, state, tasks, losses, step, key, **beside):
    """The end of a step over the Gram matrix, on two rounds as it would have."""
    rounds = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tasks[name] for name in names)) for names in (NAMES[:2], NAMES[2:])
    ]
    signals, order = Signals(losses, None, jnp.int32(step), key, None, **beside), list(NAMES)
    if rule.transform is None:
        weights, state = rule.update(state, signals._replace(gram=task_gradients.gram_matrix(rounds, order)))
        return task_gradients.combine(rounds, weights, order), weights, state
    drawing = signals._replace(key=jax.random.fold_in(key, 1))
    rows = task_gradients.in_order(rounds, order)
    changed, kept = rule.transform.update(state["transform"], drawing, rows)
    gram = task_gradients.gram_matrix([changed], sorted(order)) if rule.needs_gram else None
    weights, own = rule.update(state["rule"], signals._replace(gram=gram, transformed=every_rule.told(rule, kept, rows)))
    return task_gradients.combine([changed], weights, sorted(order)), weights, {"rule": own, "transform": kept}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_the_train_steps_gradient(name):
    rule, losses, tasks = made(name), *drawn(0)
    state, expected_state = rule.init(NAMES), weighting.init(rule, tasks)
    train_step = jax.jit(functools.partial(as_in_the_train_step, rule))
    own_step = jax.jit(functools.partial(weighting.gradient, rule))
    for step in range(2):
        losses, tasks = drawn(step)
        key = jax.random.key(step)
        beside = {
            "cross": weighting.cross(tasks, drawn(step + 10)[1]),
            "held_out": weighting.look_ahead(squares, drawn(step + 20)[1]["fine"], tasks),
        }
        gradient, weights, state = own_step(state, tasks, losses, step=step, key=key, **beside)
        expected, expected_weights, expected_state = train_step(expected_state, tasks, losses, step, key, **beside)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
        assert weights == pytest.approx({task: float(weight) for task, weight in expected_weights.items()}, rel=1e-4, abs=1e-6)
        assert jax.tree.structure(state) == jax.tree.structure(expected_state)


def test_it_may_be_jitted_and_scanned():
    rule, losses, tasks = weighting.combine(weighting.moco(), "ema:decay=0.5"), *drawn(0)

    def step(state, number):
        gradient, weights, state = weighting.gradient(rule, state, tasks, losses, step=number, key=jax.random.key(0))
        return state, (gradient, weights)

    start = weighting.init(rule, jax.eval_shape(lambda: tasks))
    _, (_, weights_N) = jax.lax.scan(step, start, jnp.arange(3))
    state = rule.init(NAMES)
    for n in range(3):
        _, weights, state = weighting.gradient(rule, state, tasks, losses, step=n, key=jax.random.key(0))
        assert weights == pytest.approx({task: float(leaf[n]) for task, leaf in weights_N.items()}, rel=1e-5)


def test_a_step_that_gets_look_ahead_is_compiled_once_for_a_loss():
    rule, losses, tasks = made("auto_lambda"), *drawn(0)
    traced = []

    @jax.jit
    def step(state, tasks, held_out):
        traced.append(1)
        return weighting.gradient(rule, state, tasks, losses, step=0, key=jax.random.key(0), held_out=held_out)[2]

    state = weighting.init(rule, tasks)
    for seed in range(3):
        state = step(state, tasks, weighting.look_ahead(squares, drawn(seed)[1]["fine"], tasks))
    assert len(traced) == 1
    step(state, tasks, weighting.look_ahead(lambda params: 2 * squares(params), tasks["fine"], tasks))
    assert len(traced) == 2


def test_the_gram_matrix_is_in_sorted_order():
    _, tasks = drawn(0)
    flat = {name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for name, tree in tasks.items()}
    expected = [[flat[a] @ flat[b] for b in sorted(NAMES)] for a in sorted(NAMES)]
    np.testing.assert_allclose(weighting.gram(tasks), expected, rtol=1e-5)


def test_absent_tasks_have_no_weight():
    losses, tasks = drawn(0)
    counts = {"fine": 0, "coarse": 2, "rating": 5}
    found = weighting.gradient(made("mgda"), (), tasks, losses, step=0, key=jax.random.key(0), counts=counts)
    without = {name: tree for name, tree in tasks.items() if name != "fine"}
    losses = {name: losses[name] for name in without}
    expected = weighting.gradient(made("mgda"), (), without, losses, step=0, key=jax.random.key(0))
    assert found[1]["fine"] == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[0], expected[0])


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("combinator", ["", "normalized", "ema", "clipped", "subset:s=2"])
@pytest.mark.parametrize("wrap", [lambda update: update, jax.jit])
def test_a_rule_that_changes_gradients_refuses_to_give_weights_alone(name, combinator, wrap):
    rule = weighting.combine(made(name), combinator) if combinator else made(name)
    losses, tasks = drawn(0)
    signals = Signals(losses, weighting.gram(tasks), jnp.int32(0), jax.random.key(0))
    with pytest.raises(UserError, match=rf"weighting {name} changes the task gradients, .*mtl_jax\.weighting\.gradient\("):
        wrap(rule.update)(rule.init(NAMES), signals)


def test_without_an_average_db_mtl_is_a_weighted_sum():
    losses, tasks = drawn(0)
    rule = weighting.db_mtl(beta=0.0)
    weights, _ = rule.update((), Signals(losses, weighting.gram(tasks), jnp.int32(0), jax.random.key(0)))
    assert all(float(weight) > 0 for weight in weights.values())


def test_what_does_not_fit_is_one_line():
    losses, tasks = drawn(0)
    rule, more = made("equal"), {"step": 0, "key": jax.random.key(0)}
    with pytest.raises(UserError, match="losses are of the tasks coarse, fine, and task_gradients of coarse, fine, rating"):
        weighting.gradient(rule, (), tasks, {name: losses[name] for name in NAMES[:2]}, **more)
    with pytest.raises(UserError, match="the tasks 'coarse' and 'rating' are not by the same parameters"):
        weighting.gradient(rule, (), tasks | {"rating": {"bias": jnp.ones(3)}}, losses, **more)
    with pytest.raises(UserError, match="task_gradients is empty"):
        weighting.gram({})


def test_a_whole_loop_learns():
    """Five steps under a rule that changes the gradients; its weights sum to 1, and the first task's loss falls."""
    rule = weighting.make("moco")
    params = {"kernel": jnp.ones((3, 2))}
    tasks = {"a": jnp.ones(3), "b": -jnp.arange(3.0)}

    def loss(params, x):
        return jnp.square(x @ params["kernel"] - 1).mean()

    before, state = float(loss(params, tasks["a"])), rule.init(tuple(tasks))
    for step in range(5):
        both = {task: jax.value_and_grad(loss)(params, x) for task, x in tasks.items()}
        losses, gradients = ({task: values[part] for task, values in both.items()} for part in (0, 1))
        gradient, weights, state = weighting.gradient(rule, state, gradients, losses, step=step, key=jax.random.key(step))
        params = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient)
    assert sum(map(float, weights.values())) == pytest.approx(1.0, abs=1e-5)
    assert losses["a"] < 0.9 * before
