"""Task gradients that hold the rows of the token table that a batch reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import Batching, Phase
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.models.trunk_output import token_table, with_token_table
from mtl_jax.training import gram_gradient
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.setup import initial_state, prepare
from mtl_jax.training.train_state import StepInputs

V = 500


@pytest.fixture(scope="module")
def wide(shallow, data):
    """A prepared run whose token table has 500 rows, and a batch of 8 rows of 24 tokens all over them."""
    batching = Batching(rows=8, row_length=24, examples_per_row=6)
    prepared = prepare(tiny.experiment(shallow, data, phases=(Phase("everything", 4),), weighting="upgrad", batch=batching))
    table = jax.random.normal(jax.random.key(0), (V, tiny.HIDDEN)) / 5
    prepared.params["trunk"] = with_token_table(prepared.params["trunk"], table)
    batches = stream(prepared.corpus, batching, 0, single_phase(batching, 100))
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()
    return prepared, batch._replace(tokens=batch.tokens * 19 + 3)


def run(prepared, batch):
    """What the only phase measures, and the shapes of all that its program holds."""
    found = gradient_fn(prepared, prepared.plans[0])
    given = (prepared.params, jax.tree.map(lambda _: None, prepared.params), StepInputs(batch), initial_state(prepared))
    traced = jax.jit(found).trace(*given)
    return traced.lower().compile()(*given), str(traced.jaxpr)


def test_the_result_is_that_of_whole_tables_which_no_task_has(wide, monkeypatch):
    prepared, batch = wide
    narrow, program = run(prepared, batch)
    monkeypatch.setattr(gram_gradient, "only_read", lambda found: found)
    whole, with_tables = run(prepared, batch)
    np.testing.assert_allclose(narrow.gram, whole.gram, rtol=1e-5, atol=1e-6)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole.gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), narrow.gradient, whole.gradient)
    table = token_table(narrow.gradient["trunk"])
    assert table.shape == (V, tiny.HIDDEN)
    assert set(np.flatnonzero(np.abs(table).sum(axis=1))) <= set(np.unique(batch.tokens).tolist())
    blocks = f"f32[2,{V},{tiny.HIDDEN}]"
    assert blocks in with_tables
    assert blocks not in program


def test_a_frozen_table_and_a_small_one_stay_as_they_are(wide):
    prepared, batch = wide
    seen = []

    def backward(trained, frozen, inputs, keys):
        seen.append((trained, inputs.batch))

    for table in (None, jnp.zeros((batch.tokens.size, 1))):
        trained = {"trunk": with_token_table(prepared.params["trunk"], table), "heads": {}}
        gram_gradient.only_read(backward)(trained, None, StepInputs(batch), None)
        assert token_table(seen[-1][0]["trunk"]) is table
        assert seen[-1][1] is batch
