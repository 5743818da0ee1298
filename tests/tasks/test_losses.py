import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.tasks import Classification
from mtl_jax.tasks.losses import balanced_weights

CLASSES = Classification(name="t", source="s", labels=("x", "y", "z"))


def test_weights_multiply_losses_and_not_counts():
    outputs, labels = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 3))), jnp.array([[0, 2, -1, 1]])
    weighted = dataclasses.replace(CLASSES, class_weights={"x": 3.0, "z": 0.5})
    total, count = weighted.loss(outputs, labels)
    log_probs = jax.nn.log_softmax(outputs[0])
    assert count == 3
    np.testing.assert_allclose(total, -(3 * log_probs[0, 0] + 0.5 * log_probs[1, 2] + log_probs[3, 1]), rtol=1e-5)
    smooth = dataclasses.replace(weighted, label_smoothing=0.3)
    expected = -(np.array([3.0, 0.5, 0.0, 1.0]) * ((np.eye(3)[[0, 2, 0, 1]] * 0.7 + 0.1) * log_probs).sum(1)).sum()
    np.testing.assert_allclose(smooth.loss(outputs, labels)[0], expected, rtol=1e-5)


def test_balanced_weights_come_from_the_training_labels():
    train = Examples("s", 0, [()] * 6, {"t": np.array([0, 0, 0, 1, -1, 0], np.int32)})
    task = dataclasses.replace(CLASSES, balanced=True).fitted(train)
    assert task.class_weights == {"x": 5 / (2 * 4), "y": 5 / (2 * 1)}  # z does not occur
    assert CLASSES.fitted(train) == CLASSES
    assert balanced_weights(np.array([-1]), ("x",)) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balanced": True, "class_weights": {"x": 1.0}}, "balanced computes class_weights; give one or the other"),
        ({"class_weights": {"w": 1.0}}, "unknown label in class_weights of task 't': 'w'"),
        ({"class_weights": {"x": -1.0}}, "class_weights of 'x' is -1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"metric": "f1:w"}, "metric 'f1:w': 'w' is not in the label set"),
        ({"metric": "f1"}, "unknown metric of task 't'"),
    ],
)
def test_fields_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CLASSES, **changes).check()


def test_the_metric_may_name_labels_that_are_found_later():
    task = dataclasses.replace(CLASSES, labels=(), metric="f1:x+y")
    task.check()
    rows = [Row({"label": label}, f"file:{i}") for i, label in enumerate(("y", "x", "", None))]
    filled = task.filled(rows, None)
    assert filled.labels == ("x", "y")
    assert [filled.parse(row) for row in rows] == [1, 0, None, None]
    examples = Examples("s", 0, [()] * 4, {"t": np.array([1, 0, -1, -1])})
    scores = filled.metrics(np.eye(2)[[1, 1, 0, 0]], examples)
    assert scores["accuracy"] == 0.5
    assert scores["f1:x+y"] == pytest.approx((0 + 2 / 3) / 2)
    with pytest.raises(UserError, match="'z' is not in the label set"):
        dataclasses.replace(task, metric="f1:z").filled(rows, None)
