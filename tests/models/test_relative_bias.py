import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.encoder_decoder import Seq2SeqEncoder
from mtl_jax.models.layers import relative_buckets
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig

CONFIG = Seq2SeqConfig(
    vocab_size=20,
    decoder_vocab_size=20,
    hidden_size=8,
    encoder_layers=2,
    decoder_layers=2,
    encoder_heads=3,
    decoder_heads=3,
    encoder_feed_forward=12,
    decoder_feed_forward=12,
    max_positions=None,
    head_size=4,
    positions="relative",
    num_buckets=8,
    max_distance=6,
    activation="relu",
    use_bias=False,
    norm="rms",
    layer_norm_eps=1e-6,
    pre_norm=True,
    embedding_norm=False,
    attention_scale=1.0,
    logit_bias=False,
    scaled_init=True,
    initializer_range=1.0,
)
IDS = [3, 5, 7, 9, 11, 13, 15, 17, 2]


def bucket(relative: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """Raffel et al. 2020 for one number: half of the buckets exact, half logarithmic."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    # The small number is for distances where the logarithm is a whole number but for rounding.
    grown = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact) + 1e-6)
    return first + min(grown, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 6), (64, 200)])
def test_buckets_of_relative_positions(bidirectional, buckets, max_distance):
    relative = np.arange(-300, 301)
    expected = [bucket(int(r), bidirectional, buckets, max_distance) for r in relative]
    np.testing.assert_array_equal(relative_buckets(jnp.asarray(relative), bidirectional, buckets, max_distance), expected)


def numpy_t5(params, ids):
    """T5's encoder over one example, written out in float64: hidden [T, H]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, at):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * at["scale"]

    table = p["relative_bias"]["table"]["embedding"]
    bias = np.array([[table[bucket(s - t, True, 8, 6)] for s in range(len(ids))] for t in range(len(ids))])
    x = p["embeddings"]["word"]["embedding"][ids]
    for layer in (p["layer_0"], p["layer_1"]):
        y = norm(x, layer["attention_norm"])
        q, k, v = ((y @ layer["attention"][n]["kernel"]).reshape(len(ids), 3, 4) for n in ("query", "key", "value"))
        scores = np.einsum("tnd,snd->tsn", q, k) + bias  # no scaling
        probs = np.exp(scores - scores.max(1, keepdims=True))
        probs /= probs.sum(1, keepdims=True)
        x = x + np.einsum("tsn,snd->tnd", probs, v).reshape(len(ids), -1) @ layer["attention"]["output"]["kernel"]
        y = norm(x, layer["feed_forward_norm"]) @ layer["feed_forward_in"]["kernel"]
        x = x + np.maximum(y, 0) @ layer["feed_forward_out"]["kernel"]
    return norm(x, p["norm"])


@pytest.fixture(scope="module")
def encoder():
    module, rng = Seq2SeqEncoder(CONFIG), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.array([IDS]))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32), shapes)
    return jax.jit(module.apply), {"params": params}


def test_encoder_is_t5_written_out(encoder):
    apply, params = encoder
    np.testing.assert_allclose(apply(params, jnp.array([IDS])).hidden[0], numpy_t5(params["params"], IDS), atol=1e-5)


def test_only_distances_between_positions_count(encoder):
    apply, params = encoder
    positions = jnp.arange(len(IDS))[None]
    here, there = (apply(params, jnp.array([IDS]), position_ids=p).hidden for p in (positions, positions + 100))
    np.testing.assert_allclose(there, here, atol=1e-6)
    assert not jnp.allclose(apply(params, jnp.array([IDS]), position_ids=2 * positions).hidden, here, atol=1e-2)


def test_one_bias_table_serves_all_layers(encoder):
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(encoder[1]["params"])]
    assert [path for path in paths if "bias" in path] == ["relative_bias/table/embedding"]
