"""The encoder-decoder as every family configures it, with random parameters; test_parity_seq2seq.py compares with torch."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder_decoder import Seq2Seq, Seq2SeqEncoder, Seq2SeqOutput
from mtl_jax.models.seq2seq_decoder import Decoder
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig, sinusoidal_table

BART = Seq2SeqConfig(
    vocab_size=30,
    decoder_vocab_size=30,
    hidden_size=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_heads=2,
    decoder_heads=4,
    encoder_feed_forward=24,
    decoder_feed_forward=20,
    max_positions=16,
    initializer_range=0.3,
)
CONFIGS = {
    "mbart": dataclasses.replace(BART, pre_norm=True, tied=False),
    "marian": dataclasses.replace(
        BART, positions="sinusoidal", embedding_norm=False, embedding_scale=4.0, shared_table=False, decoder_vocab_size=20
    ),
    "t5": dataclasses.replace(
        BART,
        encoder_layers=2,
        decoder_layers=2,
        max_positions=None,
        positions="relative",
        num_buckets=8,
        max_distance=10,
        head_size=6,
        gated=True,
        use_bias=False,
        norm="rms",
        pre_norm=True,
        embedding_norm=False,
        attention_scale=1.0,
        logit_scale=0.25,
        logit_bias=False,
        shared_if_untied=True,
    ),
}
SOURCES, TARGETS = ([3, 5, 7, 9, 11], [4, 6, 8]), ([2, 13, 15, 17], [2, 14, 16, 18, 19, 12])


class Case(NamedTuple):
    """A model with random parameters, and what it makes of SOURCES and TARGETS, one a row."""

    model: Seq2Seq
    params: Any
    compiled: Any
    output: Seq2SeqOutput

    def apply(self, *args, **kwargs):
        return self.model.apply({"params": self.params}, *args, **kwargs)

    def trace(self, *args, **kwargs):
        return jax.eval_shape(lambda: self.apply(*args, **kwargs))

    def run(self, *args, **kwargs):
        return self.compiled({"params": self.params}, *args, **kwargs)


def random_model(config, dtype=jnp.float32):
    """A model with random parameters, biases and norms too: zeros and ones hide mistakes."""
    model = Seq2Seq(Seq2SeqEncoder(config, dtype), Decoder(config, dtype))
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(functools.partial(model.init, decoder_input_ids=ids), jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        mean = 1 if path[-1].key == "scale" else 0
        return jnp.asarray(rng.normal(mean, 0.3, shape.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(leaf, shapes)


def pad(rows, length):
    """Ids and mask [B, length] of lists of ids."""
    ids = np.array([row + [0] * (length - len(row)) for row in rows])
    return jnp.array(ids), jnp.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def pack(rows, length):
    """One row with all examples in it: ids, mask, positions, segments, each [1, length]."""
    positions = [place for row in rows for place in range(len(row))]
    segments = [number for number, row in enumerate(rows, start=1) for _ in row]
    ids, mask = pad([[token for row in rows for token in row]], length)
    return ids, mask, pad([positions], length)[0], pad([segments], length)[0]


INPUTS = (*pad(SOURCES, 7), *pad(TARGETS, 8))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    model, params = random_model(CONFIGS[request.param])
    compiled = jax.jit(model.apply)
    return Case(model, params, compiled, compiled({"params": params}, *INPUTS))


@pytest.fixture(scope="module")
def source(case):
    """What the decoder sees of SOURCES."""
    return case.apply(case.output.hidden, INPUTS[1], method="source")


@pytest.fixture(scope="module")
def decode(case):
    """(tokens, source, cache, step) -> logits, cache; compiled once for each number of tokens."""

    @jax.jit
    def decode(params, tokens, source, cache, step):
        output = case.model.apply({"params": params}, tokens, source, cache=cache, step=step, method="decode")
        return output.logits, output.cache

    return functools.partial(decode, case.params)


def test_parameters_are_a_trunk_and_a_head(case):
    assert set(case.params) == {"trunk", "head"}
    assert case.output.logits.shape == (2, 8, case.model.trunk.config.decoder_vocab_size)
    trunk = {"params": case.params["trunk"]}
    for output in (
        jax.jit(case.model.trunk.apply)(trunk, *INPUTS[:2]),
        jax.jit(Seq2Seq(case.model.trunk).apply)({"params": {"trunk": case.params["trunk"]}}, *INPUTS),
    ):
        assert output.logits is None
        np.testing.assert_allclose(output.hidden, case.output.hidden, atol=1e-6)
    assert case.run(*INPUTS[:2]).logits is None


def test_a_model_without_a_decoder_does_not_decode(case):
    with pytest.raises(ValueError, match="no decoder"):
        Seq2Seq(case.model.trunk).apply({"params": case.params}, case.output.hidden, method="source")


def test_padding_changes_nothing(case):
    longer = case.run(*pad(SOURCES, 9), *pad(TARGETS, 11))
    for i, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        np.testing.assert_allclose(longer.hidden[i, : len(source)], case.output.hidden[i, : len(source)], atol=1e-5)
        np.testing.assert_allclose(longer.logits[i, : len(target)], case.output.logits[i, : len(target)], atol=1e-5)


def test_packed_examples_do_not_see_each_other(case):
    ids, mask, positions, segments = pack(SOURCES, 10)
    target_ids, target_mask, target_positions, target_segments = pack(TARGETS, 11)
    packed = case.run(
        ids,
        mask,
        target_ids,
        target_mask,
        position_ids=positions,
        segment_ids=segments,
        decoder_position_ids=target_positions,
        decoder_segment_ids=target_segments,
    )
    at = target_at = 0
    for i, (T, U) in enumerate(zip(map(len, SOURCES), map(len, TARGETS), strict=True)):
        np.testing.assert_allclose(packed.hidden[0, at : at + T], case.output.hidden[i, :T], atol=1e-5)
        np.testing.assert_allclose(packed.logits[0, target_at : target_at + U], case.output.logits[i, :U], atol=1e-5)
        at, target_at = at + T, target_at + U


def test_no_token_sees_its_future(case):
    ids, mask, targets, target_mask = INPUTS
    logits, other = case.output.logits, case.run(ids, mask, targets.at[1, 4:].set(3), target_mask).logits
    np.testing.assert_array_equal(logits[1, :4], other[1, :4])
    assert not jnp.allclose(logits[1, 4:6], other[1, 4:6])


def test_decoding_step_by_step_is_teacher_forcing(case, source, decode):
    """The position is traced, the cache longer than needed; the first three tokens go in at once."""
    targets, cache = INPUTS[2], case.model.init_cache(2, 9)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(cache))
    first, cache = decode(targets[:, :3], source, cache, 0)
    logits = [first]
    for step in range(3, 6):
        more, cache = decode(targets[:, step : step + 1], source, cache, step)
        logits.append(more)
    logits = jnp.concatenate(logits, axis=1)
    for i, target in enumerate(TARGETS):
        np.testing.assert_allclose(logits[i, : len(target)], case.output.logits[i, : len(target)], atol=1e-5)


def test_reordering_beams_is_gathering_the_cache(case, source, decode):
    beams = jax.tree.map(lambda leaf: leaf[:1].repeat(2, axis=0), source)
    prefixes, order = jnp.array([[2, 13, 5], [2, 14, 6]]), jnp.array([1, 0])
    _, cache = decode(prefixes, beams, case.model.init_cache(2, 9), 0)
    last = jnp.array([[7], [8]])
    logits, _ = decode(last, beams, cache, 3)
    swapped, _ = decode(last[order], beams, jax.tree.map(lambda leaf: leaf[order], cache), 3)
    np.testing.assert_allclose(swapped, logits[order], atol=1e-6)


def test_every_parameter_has_a_finite_gradient(case):
    @jax.jit
    @jax.grad
    def gradient(params):
        logits = case.model.apply({"params": params}, *INPUTS).logits
        return (jax.nn.log_softmax(logits)[..., 1] * INPUTS[3]).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(case.params)):
        assert np.isfinite(leaf).all(), path
        # The bias of all keys alike moves every score of a query by the same.
        if not jax.tree_util.keystr(path).endswith("['key']['bias']"):
            assert np.abs(leaf).max() > 1e-6, path


def test_wrong_combinations_are_refused(case, source):
    ids, mask, positions, segments = pack(SOURCES, 10)
    with pytest.raises(ValueError, match="both sides"):
        case.trace(ids, mask, INPUTS[2][:1], position_ids=positions, segment_ids=segments)
    with pytest.raises(ValueError, match="one example a row"):
        case.trace(INPUTS[2], source, cache=case.model.init_cache(2, 9), decoder_segment_ids=INPUTS[3], method="decode")
    with pytest.raises(ValueError, match="8 tokens after 2 do not fit into a cache of 9"):
        case.trace(INPUTS[2], source, cache=case.model.init_cache(2, 9), step=2, method="decode")


def test_a_row_that_is_too_long_is_refused():
    model = Seq2Seq(Seq2SeqEncoder(BART), Decoder(BART))
    message = "a row of 17 tokens is too long for this model; it has 16 positions"
    with pytest.raises(UserError, match=message):
        model.init_cache(2, 17)
    with pytest.raises(UserError, match=message):
        model.init(jax.random.key(0), jnp.ones((1, 17), jnp.int32))


@pytest.mark.parametrize("case", ["t5"], indirect=True)
def test_dropout_needs_a_key_and_changes_the_output(case):
    compiled = jax.jit(functools.partial(case.model.apply, deterministic=False))

    def logits(seed):
        return compiled({"params": case.params}, *INPUTS, rngs={"dropout": jax.random.key(seed)}).logits

    assert jnp.array_equal(logits(1), logits(1))
    assert not jnp.allclose(logits(1), logits(2))
    with pytest.raises(Exception, match="dropout"):
        case.trace(*INPUTS, deterministic=False)


@pytest.mark.parametrize("case", ["t5"], indirect=True)
def test_bfloat16_is_near_float32(case):
    half = jax.jit(random_model(case.model.trunk.config, jnp.bfloat16)[0].apply)({"params": case.params}, *INPUTS)
    assert (half.hidden.dtype, half.logits.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(half.logits, case.output.logits, atol=0.2)


def test_sinusoidal_positions_are_all_sines_then_all_cosines():
    table = sinusoidal_table(40, 6)
    for position, i in ((0, 0), (1, 0), (7, 1), (39, 2)):
        angle = position / 10000 ** (2 * i / 6)
        np.testing.assert_allclose(table[position, [i, 3 + i]], [np.sin(angle), np.cos(angle)], atol=1e-7)
