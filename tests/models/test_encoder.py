import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jitted import apply
from scipy.special import erf

from mtl_jax import pretrained
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.models.trunk_output import segment_mean


@pytest.fixture(scope="module")
def bert(deep):
    return deep


def numpy_bert(tensors: dict[str, np.ndarray], ids_T: list[int]) -> np.ndarray:
    """BERT over one example, written out in float64: hidden [T, H]."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: np.ndarray, at: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * t[f"{at}.weight"] + t[f"{at}.bias"]

    def dense(x: np.ndarray, at: str) -> np.ndarray:
        return x @ t[f"{at}.weight"].T + t[f"{at}.bias"]

    T, D = len(ids_T), tiny.HIDDEN // tiny.HEADS
    x = t["embeddings.word_embeddings.weight"][ids_T] + t["embeddings.position_embeddings.weight"][:T]
    x = norm(x + t["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(tiny.LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (dense(x, f"{at}.attention.self.{n}").reshape(T, -1, D) for n in ("query", "key", "value"))
        scores = np.einsum("tnd,snd->nts", q, k) / np.sqrt(D)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        attended = np.einsum("nts,snd->tnd", probs, v).reshape(T, -1)
        x = norm(x + dense(attended, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        y = dense(x, f"{at}.intermediate.dense")
        y = y * 0.5 * (1 + erf(y / np.sqrt(2)))
        x = norm(x + dense(y, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


def test_encoder_is_bert_written_out(bert):
    checkpoint = pretrained.load(str(bert))
    ids = [2, 5, 9, 14, 3]
    hidden = apply(checkpoint.model, checkpoint.params, jnp.array([ids])).hidden
    np.testing.assert_allclose(hidden[0], numpy_bert(tiny.bert_tensors(), ids), atol=1e-5)


def test_padding_changes_nothing(bert):
    checkpoint = pretrained.load(str(bert))
    ids = jnp.array([[2, 5, 9, 14, 3]])
    alone = apply(checkpoint.model, checkpoint.params, ids).hidden
    padded_ids = jnp.pad(ids, ((0, 0), (0, 4)))
    padded = apply(checkpoint.model, checkpoint.params, padded_ids, (padded_ids > 0).astype(int)).hidden
    np.testing.assert_allclose(padded[:, :5], alone, atol=1e-6)


def test_packed_examples_do_not_see_each_other(bert):
    checkpoint = pretrained.load(str(bert))
    first, second = [2, 5, 9, 14, 3], [2, 7, 3]
    packed = apply(
        checkpoint.model,
        checkpoint.params,
        jnp.array([[*first, *second, 0]]),
        jnp.array([[1] * 8 + [0]]),
        position_ids=jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 0]]),
        segment_ids=jnp.array([[1] * 5 + [2] * 3 + [0]]),
    ).hidden[0]
    for ids, rows in ((first, packed[:5]), (second, packed[5:8])):
        alone = apply(checkpoint.model, checkpoint.params, jnp.array([ids])).hidden[0]
        np.testing.assert_allclose(rows, alone, atol=1e-6)


def test_dropout_needs_a_key_and_changes_the_output():
    encoder = Encoder(EncoderConfig(10, 8, 1, 2, 16, 16, dropout=0.5))
    ids = jnp.ones((1, 4), jnp.int32)
    params = jax.jit(encoder.init)(jax.random.key(0), ids)["params"]

    @jax.jit
    def hidden(seed: int) -> jax.Array:
        rngs = {"dropout": jax.random.key(seed)}
        return encoder.apply({"params": params}, ids, deterministic=False, rngs=rngs).hidden

    assert jnp.array_equal(hidden(1), hidden(1))
    assert not jnp.allclose(hidden(1), hidden(2))
    with pytest.raises(Exception, match="dropout"):
        encoder.apply({"params": params}, ids, deterministic=False)


def test_segment_mean_is_a_mean_per_example():
    hidden = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    segments = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    pooled = segment_mean(hidden, segments, 3)
    np.testing.assert_allclose(pooled[0, 0], hidden[0, :2].mean(0))
    np.testing.assert_allclose(pooled[0, 1], hidden[0, 2:4].mean(0))
    np.testing.assert_allclose(pooled[0, 2], 0)
    np.testing.assert_allclose(pooled[1, 0], hidden[1].mean(0))


def test_layer_norm_is_right_on_near_constant_rows(bert):
    """E[x^2] - E[x]^2 in float32 loses every digit here; the norm must not use it."""
    import flax.linen as nn

    from mtl_jax.models.norms import layer_norm

    row = 1000 + 1e-2 * np.arange(16, dtype=np.float64)
    norm = layer_norm(1e-12, jnp.float32, "norm")
    params = nn.LayerNorm().init(jax.random.key(0), jnp.ones((1, 16)))
    as_float32 = row.astype(np.float32).astype(np.float64)
    expected = (as_float32 - as_float32.mean()) / as_float32.std()
    np.testing.assert_allclose(norm.apply(params, jnp.asarray(row, jnp.float32)[None])[0], expected, atol=2e-2)
