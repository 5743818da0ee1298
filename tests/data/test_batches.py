import numpy as np
import pytest
from two_sources import BATCHING, TASKS, corpus

from mtl_jax.data.batches import eval_batches


@pytest.mark.parametrize("sizes", [(40, 17), (1, 1), (2, 50)])
def test_evaluation_sees_every_example_once(sizes):
    data = corpus(sizes)
    batches = list(eval_batches(list(data.splits["train"].values()), BATCHING, TASKS))
    assert all(batch.tokens.shape == (6, 16) for batch in batches)
    seen = np.concatenate([batch.index.ravel() for batch in batches])
    assert sorted(seen[seen >= 0]) == list(range(sum(sizes)))
