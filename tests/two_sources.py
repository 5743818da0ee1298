"""Random examples of two sources with three tasks, for tests of batches."""

import numpy as np

from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.examples import Examples
from mtl_jax.tasks import Classification, Regression

TASKS = (
    Classification(name="a", source="first", labels=("x", "y")),
    Regression(name="b", source="second"),
    Classification(name="c", source="second", labels=("x", "y")),
)


def corpus(sizes=(40, 17), seed=0):
    rng = np.random.default_rng(seed)
    train, next_id = {}, 0
    for source, size in zip(("first", "second"), sizes, strict=True):
        tokens = [rng.integers(1, 100, rng.integers(1, 9)).astype(np.int32) for _ in range(size)]
        # Labels follow from the id, so that a test can tell whether they stay with their example.
        ids = next_id + np.arange(size)
        labels = {t.name: (ids % 2 if t.labels else ids / 7).astype(t.dtype) for t in TASKS if t.source == source}
        train[source] = Examples(source, next_id, tokens, labels)
        next_id += size
    return Corpus({"train": train}, TASKS, [])


BATCHING = Batching(rows=6, row_length=16, examples_per_row=4)
