"""Grad-TAG on problems with known answers: ridge and logistic regression, tasks that agree and disagree, and a trained run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from sklearn.linear_model import LogisticRegression

from mtl_jax import UserError, affinity
from mtl_jax.affinity import task_features
from mtl_jax.core import trees
from mtl_jax.training.setup import prepare

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(80, 5))
W = RANDOM.normal(size=5)


def errors(features, numbers):
    """The linear rows of a regression whose model is 0: the residual, and its gradient."""
    return np.concatenate([np.zeros((len(features), 1)), -numbers[:, None], features], axis=1)


def margins(features, classes):
    """The linear rows of a logistic regression whose model is 0: margins are 0."""
    return np.concatenate(
        [np.ones((len(features), 1)), np.zeros((len(features), 1)), features * (2 * classes - 1)[:, None]], axis=1
    )


def test_squared_errors_have_the_solution_of_ridge_regression():
    numbers = X @ W + RANDOM.normal(size=80)
    rows = errors(X, numbers)
    penalty = 0.1 * (X**2).sum(axis=1).mean() / 5
    expected = np.linalg.solve(2 * X.T @ X / 80 + penalty * np.eye(5), 2 * X.T @ numbers / 80)
    np.testing.assert_allclose(affinity.fit_change([rows], 0.1), expected, rtol=1e-6)
    [before, after] = affinity.subset_losses({"a": rows}, {"a": rows}, [[], ["a"]], 0.1)
    assert before["a"] == pytest.approx((numbers**2).mean())
    assert after["a"] == pytest.approx(((X @ expected - numbers) ** 2).mean())


def test_margins_have_the_solution_of_logistic_regression():
    classes = (X @ W + RANDOM.normal(size=80) > 0).astype(int)
    rows = margins(X, classes)
    penalty = 0.1 * (X**2).sum(axis=1).mean() / 5
    model = LogisticRegression(fit_intercept=False, C=1 / (80 * penalty), tol=1e-10).fit(X, classes)
    np.testing.assert_allclose(affinity.fit_change([rows], 0.1), model.coef_[0], rtol=1e-4)


def test_who_agrees_helps_and_who_disagrees_harms():
    """Twelve noisy rows of the target; a source with the same weights, one with the opposite ones, and classes of the first."""
    few = X[:12]
    target = errors(few, few @ W + 0.5 * RANDOM.normal(size=12))
    helpful, harmful = errors(X, X @ W), errors(X, -X @ W)
    classes = margins(X, (X @ W > 0).astype(int))
    gains = [affinity.grad_tag(source, target) for source in (helpful, harmful, classes)]
    assert gains[0] > gains[2] > 0 > gains[1]
    # Any subset, from the same rows.
    tasks = {"target": target, "helpful": helpful, "harmful": harmful}
    losses = affinity.subset_losses(tasks, {"target": errors(X, X @ W)}, [["target"], ["target", "helpful"], list(tasks)])
    alone, pair, everything = (loss["target"] for loss in losses)
    assert pair < alone
    assert pair < everything


def test_a_projection_keeps_inner_products():
    keys = jax.random.split(jax.random.key(0), 2)
    first, other = ({"a": jax.random.normal(key, (40, 3)), "b": jax.random.normal(key, (7,))} for key in keys)
    gradients = [first, jax.tree.map(jnp.add, first, other)]

    def inner(first, second):
        return sum(float(jnp.vdot(*pair)) for pair in zip(*map(jax.tree.leaves, (first, second)), strict=True))

    sketches = np.array([[affinity.project(tree, 64, seed) for tree in gradients] for seed in range(30)])
    assert (sketches[:, 0] * sketches[:, 1]).sum(axis=-1).mean() == pytest.approx(inner(*gradients), rel=0.15)
    double = affinity.project(jax.tree.map(lambda leaf: 2 * leaf, first), 64, 4)
    np.testing.assert_allclose(double, 2 * sketches[4, 0], rtol=1e-6)


@pytest.mark.parametrize("loss", [0.01, 0.7, 5.0])
def test_values_give_the_losses_back(loss):
    margin, root = (float(affinity.linear_value(jnp.float32(loss), kind)) for kind in (True, False))
    assert np.logaddexp(0, -margin) == pytest.approx(loss, rel=1e-4)
    assert root**2 == pytest.approx(loss, rel=1e-5)


def test_rows_of_a_run(bert, data):
    """The loss of all rows, and the projection of the gradient of one of them over the trunk."""
    prepared = prepare(tiny.experiment(bert, data))
    trunk = task_features.before_training(prepared)
    task = task_features.task_of(prepared, "rating")
    examples = task_features.sample(task, prepared.corpus.splits["train"][task.source], 1, 0)
    [batch] = task_features.labelled_batches(task, examples, prepared.experiment.batch)
    head = prepared.params["heads"]["rating"]
    rows = affinity.make_linear_rows(trunk, dimensions=6)(task, head, [batch])

    def loss(params):
        output = trunk.encode(params, batch._replace(labels={}))
        return task.loss(task.apply(head, output, batch, None), batch.labels["rating"], batch)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(trunk.params)
    assert rows[0, :2] == pytest.approx([0, np.sqrt(value)], rel=1e-4)
    trained = {path: leaf for path, leaf in trees.leaves_of(gradient).items() if not path.endswith("embedding")}
    expected = np.asarray(affinity.project(trained, 6)) / (2 * np.sqrt(value))
    np.testing.assert_allclose(rows[0, 2:], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((4, 2)), "gradients must have the columns 1 or 0, value and gradient"),
        (np.full((4, 5), 2.0), "gradients must have the columns 1 or 0, value and gradient"),
        (np.zeros((1, 5)), "gradients has 1 row; at least 2 are needed, to fit one half"),
        (np.full((4, 5), np.nan), "row 0 of gradients has a number that is not finite"),
    ],
)
def test_refused(rows, message):
    with pytest.raises(UserError, match=message):
        affinity.grad_tag(errors(X, X @ W), rows)
    with pytest.raises(UserError, match="ridge is 0; it must be above 0"):
        affinity.subset_losses({}, {}, [], 0)
    with pytest.raises(UserError, match="unknown task of a subset: 'b'"):
        affinity.subset_losses({"a": errors(X, X @ W)}, {}, [["b"]])
