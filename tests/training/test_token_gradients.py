"""Task gradients of the token table by token and task, against whole tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import Batching, Phase, Transformer
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.models.encoder import EmbeddingConfig, Encoder, EncoderConfig, SharedEmbedding
from mtl_jax.models.modernbert import ModernBert, ModernBertConfig
from mtl_jax.models.trunk_output import token_table, with_token_table
from mtl_jax.training import token_gradients
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import prepare
from mtl_jax.training.train_state import StepInputs

V = 500


def whole_tables(gradients, tokens, tasks, V, K):
    """A table for each task: f64[K, V, E]."""
    tables = np.zeros((K, V, gradients.shape[1]))
    np.add.at(tables, (tasks, tokens), gradients)
    return tables


@pytest.mark.parametrize(("tokens", "V", "K"), [(1, 3, 2), (40, 12, 9), (60, 3, 5), (30, 1, 1)])
def test_products_and_sums_are_those_of_whole_tables(tokens, V, K):
    """With few tokens for the pairs that there could be, and with many; more tasks than are compared at once, too."""

    def compact(gradients, ids, tasks, weights):
        found = token_gradients.by_token_and_task(gradients, ids, tasks, V, K)
        gram, combined = token_gradients.gram_matrix(found, K), token_gradients.combine(found, weights, V)
        return found, gram, combined, token_gradients.rows_read(found, K, V)

    program = jax.jit(compact)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        gradients = rng.standard_normal((tokens, 4)).astype(np.float32)
        ids, tasks = rng.integers(0, rng.integers(1, V, endpoint=True), tokens), rng.integers(0, K, tokens)
        weights = rng.standard_normal(K).astype(np.float32)
        found, gram, combined, (rows_read, read) = program(gradients, ids, tasks, weights)
        tables = whole_tables(gradients, ids, tasks, V, K)
        flat = tables.reshape(K, -1)
        np.testing.assert_allclose(gram, flat @ flat.T, atol=1e-3)
        np.testing.assert_allclose(combined, np.tensordot(weights, tables, axes=1), atol=1e-4)
        assert len(found.values) == min(tokens, V * K)
        assert len(read) == min(tokens, V)
        whole = np.zeros((K, V + 1, 4))
        whole[:, read] = rows_read
        np.testing.assert_allclose(whole, np.pad(tables, ((0, 0), (0, 1), (0, 0))), atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        Encoder(EncoderConfig(16, 8, 1, 2, 16, 8)),
        ModernBert(ModernBertConfig(16, 8, 2, 16, (True,))),
        Transformer(layers=1, width=8, heads=2, feed_forward=16, dropout=0.0).module(16, jnp.float32),
        SharedEmbedding(EmbeddingConfig(16, 8)),
    ],
    ids=["bert", "modernbert", "encoder-decoder", "embedding"],
)
def test_every_trunk_takes_the_vectors_of_its_tokens_in_place_of_the_table(module):
    ids, rng = jnp.arange(12).reshape(2, 6), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ids)["params"])
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    vectors = with_token_table(params, token_table(params)[ids])
    by_table, by_vectors = (module.apply({"params": tree}, ids).hidden for tree in (params, vectors))
    np.testing.assert_array_equal(by_table, by_vectors)


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
    """The gradients of a step, and the shapes of all arrays in its program."""
    arguments = (prepared.params, jax.tree.map(lambda _: None, prepared.params), StepInputs(batch), initial_state(prepared))
    traced = jax.jit(gradient_fn(prepared, prepared.plans[0])).trace(*arguments)
    return traced.lower().compile()(*arguments), str(traced.jaxpr)


def test_no_task_has_a_whole_table(wide, monkeypatch):
    """A user's trunk may use its tokens for more than their vectors, so its tasks have whole tables: with the same result."""
    prepared, batch = wide
    compact, program = run(prepared, batch)
    monkeypatch.setattr(type(prepared.trunk), "is_users", True)
    whole, with_tables = run(prepared, batch)
    np.testing.assert_allclose(compact.gram, whole.gram, rtol=1e-5, atol=1e-6)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole.gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), compact.gradient, whole.gradient)
    table = token_table(compact.gradient["trunk"])
    assert table.shape == (V, tiny.HIDDEN)
    assert set(np.flatnonzero(np.abs(table).sum(axis=1))) <= set(np.unique(batch.tokens).tolist())
    tables = f"f32[2,{V},{tiny.HIDDEN}]"
    assert tables in with_tables
    assert tables not in program
