import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.tasks import Classification, Regression

CLASSES = Classification(name="t", source="s", labels=("x", "y", "z"))
RATING = Regression(name="r", source="s", minimum=-4, maximum=4, scale=2.0)


def row(label):
    return Row({"label": label}, "file:1")


def test_cross_entropy_by_hand_and_missing_labels():
    outputs = jnp.array([[[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]])
    total, count = CLASSES.loss(outputs, jnp.array([[0, 2, -1]]))
    expected = -np.log(np.exp(2) / (np.exp(2) + 1 + np.e)) + np.log(3)
    assert count == 2
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_label_smoothing_by_hand():
    import dataclasses

    task = dataclasses.replace(CLASSES, label_smoothing=0.3)
    log_probs = np.log(np.exp([2.0, 0.0, 1.0]) / np.exp([2.0, 0.0, 1.0]).sum())
    total, _ = task.loss(jnp.array([[[2.0, 0.0, 1.0]]]), jnp.array([[1]]))
    np.testing.assert_allclose(total, -(np.array([0.1, 0.8, 0.1]) * log_probs).sum(), rtol=1e-6)


def test_squared_error_is_in_units_of_scale():
    total, count = RATING.loss(jnp.array([[[1.0], [0.5], [7.0]]]), jnp.array([[4.0, -1.0, jnp.nan]]))
    np.testing.assert_allclose(total, (1 - 2) ** 2 + (0.5 + 0.5) ** 2)
    assert count == 2


@pytest.mark.parametrize(("task", "label"), [(CLASSES, -1), (RATING, np.nan)])
def test_missing_labels_give_no_gradient(task, label):
    outputs = jnp.ones((1, 2, task.outputs))
    labels = jnp.array([[label, task.missing]], task.dtype)
    gradient = jax.grad(lambda o: task.loss(o, labels)[0])(outputs)
    np.testing.assert_array_equal(gradient, 0)


def test_classification_metrics_are_sklearns():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    found = CLASSES.scores(outputs, labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, outputs.argmax(1)))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, outputs.argmax(1), average="macro"))


def test_regression_metrics_by_hand():
    labels = np.array([1.0, 2.0, 4.0], np.float32)
    found = RATING.scores(np.array([[0.5], [0.6], [5.0]], np.float32), labels)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef([1.0, 1.2, 10.0], labels)[0, 1])
    assert found["mean_absolute_error"] == pytest.approx((0 + 0.8 + 6) / 3)


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]),
        ([1.0, 2.0, 4.0], [3.0, 3.0, 3.0]),
        ([1.0, np.nan, 2.0], [1.0, 2.0, 4.0]),
        ([np.nan] * 3, [1.0, 2.0, 4.0]),
        ([1.0, np.inf, 2.0], [1.0, 2.0, 4.0]),
        ([1.0], [1.0]),
    ],
)
def test_a_correlation_that_is_not_defined_is_nan(predicted, labels):
    found = RATING.scores(np.array(predicted, np.float32)[:, None], np.array(labels, np.float32))
    assert np.isnan([found["pearson"], found["spearman"]]).all()
    assert np.isfinite(found["mean_absolute_error"]) == np.isfinite(predicted).all()


def test_constant_baselines():
    def labelled(task, labels):
        return Examples("s", 0, [np.zeros(1, np.int32)] * len(labels), {task.name: np.array(labels, task.dtype)})

    found = CLASSES.constant(labelled(CLASSES, [1] * 200 + [2] * 100 + [-1] * 7), labelled(CLASSES, [0, -1]))
    assert found.shape == (2, 3)
    shares = np.exp(found[0])
    np.testing.assert_allclose(shares / shares.sum(), [0, 2 / 3, 1 / 3], atol=3e-3)
    ratings = RATING.constant(labelled(RATING, [1.0, 3.0, np.nan]), labelled(RATING, [0.0]))
    np.testing.assert_array_equal(ratings * RATING.scale, [[2.0]])


@pytest.mark.parametrize("task", [CLASSES, RATING])
def test_probe_learns_what_is_linear(task):
    rng = np.random.default_rng(0)
    features = {split: rng.normal(size=(200, 5)).astype(np.float32) for split in ("train", "dev", "test")}
    if task.labels:
        labels = {split: (x[:, 0] > 0).astype(np.int32) for split, x in features.items()}  # z never occurs
    else:
        labels = {split: (x[:, 0] - x[:, 1]).astype(np.float32) for split, x in features.items()}
    found = task.scores(task.probe(features, labels), labels["test"])
    assert found[task.metric] > 0.9


def test_parsing_says_what_is_wrong():
    assert CLASSES.parse(row("y")) == 1
    with pytest.raises(ValueError, match=r"label 'w' is not in the label set \(x, y, z\)"):
        CLASSES.parse(row("w"))
    polarity = Classification(name="p", source="s", labels=("neg", "pos"), threshold=0.0)
    assert [polarity.parse(row(text)) for text in ("-0.1", "0", "0.1")] == [0, 0, 1]
    with pytest.raises(ValueError, match="'good' is not a number"):
        polarity.parse(row("good"))
    assert RATING.parse(row("-4")) == -4.0
    with pytest.raises(ValueError, match=r"label '5' is outside -4\.\.4"):
        RATING.parse(row("5"))
    for text in ("many", "nan", "-NaN"):
        with pytest.raises(ValueError, match=f"label '{text}' is not a number"):
            RATING.parse(row(text))
    with pytest.raises(ValueError, match="label '-inf' is not a finite number"):
        RATING.parse(row("-inf"))


def test_predictions_as_json():
    assert CLASSES.describe([np.array([0.0, np.log(2.0), 0.0])], (), row("y")) == {"label": "y", "probability": 0.5}
    assert RATING.describe([np.array([1.5])], (), row("3")) == {"value": 3.0}
