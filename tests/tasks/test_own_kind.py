"""A task kind of one's own, as a user writes it: grades in order, each decided by thresholds."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import eval_batches
from mtl_jax.data.examples import read_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.pretrained import load_tokenizer
from mtl_jax.tasks import Task
from mtl_jax.tasks.reading import labelled, text_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grades(Task):
    """A grade 0, 1, ... for each text; output i is the logit of "above i" (Frank and Hall, 2001).

    Attributes:
        column: The column of the source with the grade.
        grades: How many grades there are.
        metric: The main metric: within_one or accuracy.
    """

    column: str = "grade"
    grades: int = 5
    metric: str = "within_one"

    @property
    def outputs(self):
        return self.grades - 1

    def parse(self, row):
        text = text_of(row, self.column, self)
        return int(text) if text else None

    def loss(self, outputs, labels, batch):
        known = labels != self.missing
        above = (labels[..., None] > jnp.arange(self.outputs)).astype(jnp.float32)
        losses = optax.sigmoid_binary_cross_entropy(outputs, above).mean(axis=-1)
        return jnp.where(known, losses, 0.0).sum(), known.sum().astype(jnp.float32)

    def metrics(self, outputs, examples):
        outputs, labels = labelled(self, outputs, examples)
        error = np.abs((outputs > 0).sum(axis=1) - labels)
        return {"accuracy": float((error == 0).mean()), "within_one": float((error <= 1).mean())}


TASK = Grades(name="stars", source="reviews", grades=4)
SOURCE = Source(name="reviews", path="")
GRADES = ["0", "3", "", "2"]


@pytest.fixture(scope="module")
def examples(bert):
    rows = [Row({"text": "good film " * (n + 1), "grade": grade}, f"file:{n + 1}") for n, grade in enumerate(GRADES)]
    return read_examples(SOURCE, [TASK], rows, load_tokenizer(bert), 8, "the rows").examples


def test_it_has_under_40_lines():
    assert len(inspect.getsource(Grades).splitlines()) < 40


def test_what_it_does_not_declare_has_a_default():
    TASK.check()
    TASK.check_source(SOURCE)
    assert (TASK.level, TASK.label_level, TASK.needs, TASK.missing) == ("example", "example", ("pooled",), -1)
    assert (TASK.label_shape, TASK.labels, TASK.compared_as) == ((), (), "")
    assert not any((TASK.words, TASK.windows, TASK.needs_offsets, TASK.shift_free, TASK.decodes, TASK.large, TASK.corrupts))
    with pytest.raises(UserError, match="'stars'"):
        dataclasses.replace(TASK, metric="").check()


def test_labels_from_rows(examples):
    assert examples.labels["stars"].tolist() == [0, 3, -1, 2]
    assert examples.labels["stars"].dtype == np.int32
    with pytest.raises(UserError, match=r"file:1: .* no column 'grade'"):
        TASK.parse(Row({"text": "x"}, "file:1"))


def test_one_step_on_a_batch_and_metrics(examples):
    batching = Batching(rows=2, row_length=16, examples_per_row=3)
    (batch,) = eval_batches([examples], batching, [TASK])
    params = TASK.init(jax.random.key(0), 8)
    pooled = jax.random.normal(jax.random.key(1), (*batch.index.shape, 8))

    def mean_loss(params):
        total, count = TASK.loss(TASK.apply(params, Encoded(pooled=pooled), batch, None), batch.labels["stars"], batch)
        return total / count, count

    (loss, count), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    assert count == 3
    smaller, _ = mean_loss(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
    assert smaller < loss
    outputs = np.array([[-1, -1, -1], [1, -1, -1], [1, 1, 1], [1, 1, 1]], np.float32)  # grades 0, 1, 3, 3
    assert TASK.metrics(outputs, examples) == {"accuracy": pytest.approx(1 / 3), "within_one": pytest.approx(2 / 3)}
    window = examples.window(0, 0)
    assert TASK.describe([outputs[1]], [window], examples.data[0]) == {"outputs": [1.0, -1.0, -1.0]}


def test_the_loss_by_hand(examples):
    (batch,) = eval_batches([examples], Batching(rows=1, row_length=64, examples_per_row=4), [TASK])
    outputs = np.random.default_rng(0).normal(size=(1, 4, 3))
    total, count = TASK.loss(jnp.asarray(outputs), batch.labels["stars"], batch)
    expected = [
        np.mean([np.log1p(np.exp(-x if label > i else x)) for i, x in enumerate(row)])
        for row, label in zip(outputs[0], batch.labels["stars"][0].tolist(), strict=True)
        if label >= 0
    ]
    assert count == len(expected) == 3
    np.testing.assert_allclose(total, np.sum(expected), rtol=1e-5)
