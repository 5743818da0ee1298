"""Tasks that compute the same are one vmapped call, with the numbers of a call for each; others stay apart."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import mtl_jax
from mtl_jax import Classification, Multilabel, Regression
from mtl_jax.models.layers import Head
from mtl_jax.training import each_task as module
from mtl_jax.training.each_task import each_task

H, R, S = 8, 4, 2
PLAIN = Classification(name="plain", source="s", labels=("a", "b", "c"))
SAME = dataclasses.replace(PLAIN, name="same", source="t", column="other", labels=("x", "y", "z"))
MORE = dataclasses.replace(PLAIN, name="more", labels=("p", "q", "r"))


def head_and_loss(task, given):
    params, vectors, labels, key = given
    rngs = None if key is None else {"dropout": key}
    head = Head(task.outputs, task.hidden, task.dropout)
    outputs = head.apply({"params": params}, vectors, deterministic=key is None, rngs=rngs)
    return outputs, task.loss(outputs, labels, None)[0]


def inputs(tasks, key=None):
    """Own parameters and labels, and vectors that all tasks read."""
    vectors = jax.random.normal(jax.random.key(1), (R, S, H))
    given = {}
    for n, task in enumerate(tasks):
        params = Head(task.outputs, task.hidden).init(jax.random.key(n), vectors)["params"]
        shape = (R, S, *task.label_shape)
        labels = np.random.default_rng(n).integers(-1, 2, shape).astype(task.dtype)
        of_key = None if key is None else jax.random.fold_in(key, n)
        given[task.name] = params, vectors, jnp.asarray(labels), of_key
    return given


def calls(function, tasks, given):
    """How often the function runs where its arrays are those of a step, and what it returns."""
    count = []

    def counted(task, leaves):
        count.append(task.name)
        return function(task, leaves)

    traced = jax.jit(lambda given: each_task(counted, tasks, given)).lower(given)
    return len(count), traced.as_text().count("stablehlo.dot_general")


def assert_as_alone(function, tasks, given):
    expected = {task.name: function(task, given[task.name]) for task in tasks}
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), each_task(function, tasks, given), expected
    )


@pytest.mark.parametrize(
    ("tasks", "products"),
    [
        ((PLAIN,), 1),
        ((PLAIN, SAME, MORE), 1),
        ((PLAIN, dataclasses.replace(SAME, labels=("x", "y"))), 2),
        ((PLAIN, dataclasses.replace(SAME, label_smoothing=0.1), dataclasses.replace(MORE, label_smoothing=0.1 + 1e-6)), 3),
        ((PLAIN, dataclasses.replace(SAME, class_weights={"x": 2.0}), dataclasses.replace(MORE, class_weights={"p": 3.0})), 3),
        ((dataclasses.replace(SAME, class_weights={"x": 2.0}), dataclasses.replace(MORE, class_weights={"p": 2.0})), 1),
        ((Regression(name="n", source="s", column="x"), Regression(name="m", source="s", column="y"), PLAIN), 2),
        ((Multilabel(name="n", source="s", labels=("a", "b")), Multilabel(name="m", source="s", labels=("c", "d"))), 1),
    ],
    ids=["one", "three", "outputs", "nearly the same", "other constants", "same constants", "kinds", "multilabel"],
)
def test_numbers_are_those_of_each_alone(tasks, products):
    given = inputs(tasks)
    assert_as_alone(head_and_loss, tasks, given)
    assert calls(head_and_loss, tasks, given)[1] == products


def test_a_task_of_a_kind_alone_is_not_traced_twice():
    assert calls(head_and_loss, (PLAIN,), inputs((PLAIN,)))[0] == 1


def test_hidden_layers_with_dropout_drop_what_they_drop_alone():
    tasks = tuple(dataclasses.replace(task, hidden=16, dropout=0.5) for task in (PLAIN, SAME, MORE))
    given = inputs(tasks, jax.random.key(5))
    assert_as_alone(head_and_loss, tasks, given)
    assert calls(head_and_loss, tasks, given)[1] == 2


def test_gradients_are_those_of_each_alone():
    tasks = (PLAIN, SAME, MORE)
    given = inputs(tasks)

    def total(params, of_each):
        with_params = {name: (params[name], *rest) for name, (_, *rest) in given.items()}
        return sum(loss * (n + 1) for n, (_, loss) in enumerate(of_each(with_params).values()))

    params = {name: leaves[0] for name, leaves in given.items()}
    gradient = jax.jit(jax.grad(total), static_argnums=1)
    together = gradient(params, lambda given: each_task(head_and_loss, tasks, given))
    alone = gradient(params, lambda given: {task.name: head_and_loss(task, given[task.name]) for task in tasks})
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), together, alone)


def test_a_function_that_reads_something_of_the_task_from_outside_is_not_shared():
    """Here one array for each task, as a head might read its own labels from the batch."""
    tasks = (PLAIN, SAME)

    @jax.jit
    def both(x, outside):
        assert isinstance(outside["plain"], Tracer)
        return each_task(lambda task, x: x * outside[task.name], tasks, dict.fromkeys(outside, x))

    result = both(2.0, {"plain": jnp.array(3.0), "same": jnp.array(5.0)})
    assert jax.tree.map(float, result) == {"plain": 6.0, "same": 10.0}


def test_tasks_that_also_read_the_same_arrays_are_one_call():
    """As two tasks whose heads are the same object."""
    given = dict.fromkeys(("plain", "same"), inputs((PLAIN,))["plain"])
    assert_as_alone(head_and_loss, (PLAIN, SAME), given)
    one, other = each_task(head_and_loss, (PLAIN, SAME), given).values()
    assert one is other


def test_large_heads_are_not_copied():
    class Decoder(Classification):
        @property
        def large(self):
            return True

    tasks = tuple(Decoder(name=name, source="s", labels=("a", "b")) for name in "xy")
    assert calls(head_and_loss, tasks, inputs(tasks)) == (2, 2)


def test_example():
    results = doctest.testmod(module, extraglobs={"mtl_jax": mtl_jax})
    assert results.attempted == 3
    assert results.failed == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def reversed_gradient(vectors, strength):
    return vectors


reversed_gradient.defvjp(lambda vectors, strength: (vectors, None), lambda strength, _, gradient: (-strength * gradient,))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scaled_gradient(vectors, strength):
    return vectors


@scaled_gradient.defjvp
def _(strength, primals, tangents):
    return primals[0], strength * tangents[0]


def called_back(vectors, strength):
    shape = jax.ShapeDtypeStruct(vectors.shape, vectors.dtype)
    return jax.pure_callback(lambda given: np.asarray(given) * np.float32(strength), shape, vectors)


@pytest.mark.parametrize("part", [reversed_gradient, scaled_gradient, called_back])
def test_what_a_jaxpr_does_not_show_tells_tasks_apart(part):
    """A rule for the gradient, and a function of Python: strengths of a user's task that stand in nothing else."""
    strengths = {"plain": 1.0, "same": 10.0, "more": 1.0}
    given = {name: jnp.arange(3.0) + n for n, name in enumerate(strengths)}

    def function(task, vectors):
        return 2 * part(vectors, strengths[task.name])

    def of(each):
        if part is called_back:  # has no gradient
            return each(given)
        return each(given), jax.grad(lambda given: sum(leaf.sum() for leaf in each(given).values()))(given)

    tasks = (PLAIN, SAME, MORE)
    found = of(lambda given: each_task(function, tasks, given))
    jax.tree.map(np.testing.assert_array_equal, found, of(lambda given: {t.name: function(t, given[t.name]) for t in tasks}))


def test_tasks_with_the_same_rule_for_the_gradient_are_one_call():
    given = {name: jnp.arange(3.0) for name in ("plain", "same")}
    given["same"] = given["same"] + 1

    def texts(strengths):
        def function(task, vectors):
            return scaled_gradient(jnp.sin(vectors), strengths[task.name])

        return jax.jit(lambda given: each_task(function, (PLAIN, SAME), given)).lower(given).as_text()

    assert texts({"plain": 2.0, "same": 2.0}).count("stablehlo.sine") == 1
    assert texts({"plain": 2.0, "same": 3.0}).count("stablehlo.sine") == 2
