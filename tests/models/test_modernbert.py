import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jitted import apply
from scipy.special import erf

from mtl_jax.models.modernbert import ModernBert, ModernBertConfig

WINDOW = 2
CONFIG = ModernBertConfig(
    vocab_size=30,
    hidden_size=16,
    num_heads=2,
    intermediate_size=12,
    global_layers=(True, False, False),
    window=WINDOW,
    global_theta=1000.0,
    local_theta=20.0,
    norm_bias=True,
    attention_bias=True,
    feed_forward_bias=True,
)
IDS = [3, 7, 12, 9, 25, 4, 18, 11, 2, 6, 14]  # longer than the window on both sides together


@pytest.fixture(scope="module")
def params():
    """Random everywhere, norms and biases included."""
    shapes = jax.eval_shape(lambda: ModernBert(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0.3 * (leaf.ndim == 1), 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def encode(params):
    @jax.jit
    def encode(ids, mask=None, **places):
        with jax.default_matmul_precision("highest"):
            return ModernBert(CONFIG).apply({"params": params}, ids, mask, **places).hidden

    return encode


def numpy_modernbert(params, ids_T: list[int]) -> np.ndarray:
    """ModernBERT over one example, written out token by token in float64: hidden [T, H]."""
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    T, N, D = len(ids_T), CONFIG.num_heads, CONFIG.head_size

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * at["scale"] + at["bias"]

    def dense(x, at):
        return x @ at["kernel"] + at["bias"]

    def turn(x_D, position, theta):
        pairs = x_D[: D // 2] + 1j * x_D[D // 2 :]
        pairs = pairs * np.exp(1j * position * theta ** (-np.arange(D // 2) / (D // 2)))
        return np.concatenate([pairs.real, pairs.imag])

    def attend(x, at, is_global):
        q, k, v = np.split(dense(x, at["query_key_value"]), 3, axis=-1)
        theta = CONFIG.global_theta if is_global else CONFIG.local_theta
        out = np.zeros_like(x)
        for n in range(N):
            part = slice(n * D, (n + 1) * D)
            for t in range(T):
                seen = [s for s in range(T) if is_global or abs(s - t) <= WINDOW]
                scores = [turn(q[t, part], t, theta) @ turn(k[s, part], s, theta) / np.sqrt(D) for s in seen]
                weights = np.exp(scores - np.max(scores))
                out[t, part] = weights @ v[seen, part] / weights.sum()
        return dense(out, at["output"])

    x = norm(p["embeddings"]["word"]["embedding"][ids_T], p["embeddings"]["norm"])
    for i, is_global in enumerate(CONFIG.global_layers):
        at = p[f"layer_{i}"]
        x = x + attend(norm(x, at["attention_norm"]) if i else x, at["attention"], is_global)
        y, gate = np.split(dense(norm(x, at["feed_forward_norm"]), at["feed_forward_in"]), 2, axis=-1)
        x = x + dense(y * 0.5 * (1 + erf(y / np.sqrt(2))) * gate, at["feed_forward_out"])
    return norm(x, p["final_norm"])


def test_modernbert_is_modernbert_written_out(params, encode):
    np.testing.assert_allclose(encode(jnp.array([IDS]))[0], numpy_modernbert(params, IDS), atol=1e-5)


def test_parameters_have_no_norm_before_the_first_attention(params):
    assert "attention_norm" not in params["layer_0"]
    assert "attention_norm" in params["layer_1"]


def test_local_layers_see_the_window_and_no_further():
    """With one local layer, what a change of token 5 reaches is the window around it."""
    config = ModernBertConfig(30, 16, 2, 12, global_layers=(False,), window=WINDOW, initializer_range=0.3)
    model, ids = ModernBert(config), jnp.array([IDS])
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    changed = apply(model, params, ids.at[0, 5].set(20)).hidden - apply(model, params, ids).hidden
    reached = np.flatnonzero(np.abs(changed[0]).max(-1) > 1e-6)
    np.testing.assert_array_equal(reached, np.arange(5 - WINDOW, 5 + WINDOW + 1))


def test_padding_changes_nothing(encode):
    alone = encode(jnp.array([IDS]))
    padded_ids = jnp.pad(jnp.array([IDS]), ((0, 0), (0, 4)))
    padded = encode(padded_ids, (padded_ids > 0).astype(int))
    np.testing.assert_allclose(padded[:, : len(IDS)], alone, atol=1e-5)
    assert np.isfinite(padded).all()


def test_packed_examples_do_not_see_each_other(encode):
    """Nor does the window of an example's last tokens reach into the next one."""
    first, second = IDS, IDS[3:9]
    a, b = len(first), len(second)
    packed = encode(
        jnp.array([[*first, *second, 0]]),
        jnp.array([[1] * (a + b) + [0]]),
        position_ids=jnp.array([[*range(a), *range(b), 0]]),
        segment_ids=jnp.array([[1] * a + [2] * b + [0]]),
    )[0]
    for ids, rows in ((first, packed[:a]), (second, packed[a : a + b])):
        np.testing.assert_allclose(rows, encode(jnp.array([ids]))[0], atol=1e-5)


def test_only_differences_of_positions_matter(encode):
    ids = jnp.array([IDS])
    places = jnp.arange(len(IDS))[None]
    np.testing.assert_allclose(encode(ids, position_ids=places + 40), encode(ids, position_ids=places), atol=1e-4)
    assert not np.allclose(encode(ids, position_ids=2 * places), encode(ids, position_ids=places), atol=1e-2)


def test_half_precision_stays_near(params, encode):
    hidden = apply(ModernBert(CONFIG, jnp.bfloat16), params, jnp.array([IDS])).hidden
    assert hidden.dtype == jnp.bfloat16
    assert np.abs(hidden.astype(np.float32) - encode(jnp.array([IDS]))).mean() < 0.05


@pytest.mark.parametrize("rate", ["embedding_dropout", "attention_dropout", "feed_forward_dropout"])
def test_dropout_needs_a_key_and_changes_the_output(rate):
    model = ModernBert(ModernBertConfig(30, 8, 2, 8, (True,), **{rate: 0.5}))
    ids = jnp.array([IDS])
    params = jax.jit(model.init)(jax.random.key(0), ids)

    @jax.jit
    def hidden(seed: int) -> jax.Array:
        return model.apply(params, ids, deterministic=False, rngs={"dropout": jax.random.key(seed)}).hidden

    assert jnp.array_equal(hidden(1), hidden(1))
    assert not jnp.allclose(hidden(1), hidden(2))
    with pytest.raises(Exception, match="dropout"):
        model.apply(params, ids, deterministic=False)
