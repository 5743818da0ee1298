"""Encoder-decoders of every family without torch: stored answers of transformers, and what config.json may say."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.models.seq2seq_layers import token_positions
from mtl_jax.pretrained import families

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("marian", "bart", "mbart", "pegasus", "m2m_100", "t5", "t5_untied", "umt5_untied")


def raw(name, **changes):
    return json.loads((FIXTURES / name / "config.json").read_text()) | changes


def config(raw):
    return families.of(raw, "config.json").config(raw, "config.json")


@pytest.mark.parametrize("name", NAMES)
def test_stored_answers(name):
    checkpoint = pretrained.load(str(FIXTURES / name))
    stored = dict(np.load(FIXTURES / name / "expected.npz"))
    hidden, logits = stored.pop("hidden"), stored.pop("logits")
    with jax.default_matmul_precision("highest"):
        found = jax.jit(checkpoint.model.apply)({"params": checkpoint.params}, **stored)
    real, real_targets = stored["attention_mask"] > 0, stored["decoder_attention_mask"] > 0
    np.testing.assert_allclose(found.hidden[real], hidden[real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.logits[real_targets], logits[real_targets], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_is_the_same(name, tmp_path):
    before = pretrained.load(str(FIXTURES / name))
    pretrained.save(tmp_path / "again", before)
    after = pretrained.load(str(tmp_path / "again"))
    assert after.config == before.config
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


@pytest.mark.parametrize("name", ["m2m_100", "umt5_untied"])
def test_packed_rows_are_separate_rows(name):
    """Positions count within an example, and each block's own bias is that of these positions."""
    checkpoint = pretrained.load(str(FIXTURES / name))
    apply = jax.jit(checkpoint.model.apply)
    rng = np.random.default_rng(0)
    sources, targets = (rng.integers(3, 40, (2, length)) for length in (5, 3))

    def packed(ids_BxT):
        rows, length = ids_BxT.shape
        segments_1xT = np.repeat(np.arange(1, rows + 1), length)[None]
        return ids_BxT.reshape(1, -1), np.tile(np.arange(length), rows)[None], segments_1xT

    (ids, positions, segments), (target_ids, target_positions, target_segments) = packed(sources), packed(targets)
    together = apply(
        {"params": checkpoint.params},
        ids,
        decoder_input_ids=target_ids,
        position_ids=positions,
        segment_ids=segments,
        decoder_position_ids=target_positions,
        decoder_segment_ids=target_segments,
    )
    apart = apply({"params": checkpoint.params}, sources, decoder_input_ids=targets)
    for field in ("hidden", "logits"):
        flat = np.asarray(getattr(apart, field)).reshape(np.asarray(getattr(together, field)).shape)
        np.testing.assert_allclose(getattr(together, field), flat, rtol=0, atol=1e-5)


def test_padding_takes_no_position_in_m2m_100():
    """As in RoBERTa: rows may be padded on the left. Padding is at -1, whose vector is zero."""
    ids = np.array([[5, 6, 7, 1, 1], [1, 1, 5, 6, 7]])
    positions = token_positions(config(raw("m2m_100")), ids)
    np.testing.assert_array_equal(positions, [[0, 1, 2, -1, -1], [-1, -1, 0, 1, 2]])
    np.testing.assert_array_equal(token_positions(config(raw("mbart")), ids), [[0, 1, 2, 3, 4]])


BART_FIELDS = (
    "vocab_size",
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "max_position_embeddings",
)
T5_FIELDS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *((name, field) for name in ("marian", "bart", "mbart") for field in BART_FIELDS),
        *(("t5", field) for field in T5_FIELDS),
    ],
)
def test_a_missing_field_is_named(name, field):
    without = {key: value for key, value in raw(name).items() if key != field}
    with pytest.raises(UserError, match=f"config.json: the field '{field}' is missing"):
        config(without)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bart", {"encoder_attention_heads": 3}, "config.json: the hidden size 16 is not a multiple of the 3 attention heads"),
        ("bart", {"activation_function": "mish"}, "unknown activation_function in config.json: 'mish'"),
        ("bart", {"dropout": 1.5}, "config.json: dropout is 1.5; a dropout rate is below 1"),
        ("marian", {"decoder_vocab_size": 50}, "config.json: decoder_vocab_size is 50 and vocab_size 40; they must be equal"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "unknown feed_forward_proj in config.json: 'gated-mish'"),
        ("t5", {"relative_attention_max_distance": 4}, "config.json: relative_attention_max_distance is 4; it must be above"),
    ],
)
def test_a_value_without_a_counterpart_is_named(name, changes, message):
    with pytest.raises(UserError, match=message):
        config(raw(name, **changes))


def test_t5_scales_its_output_unless_config_says_that_it_is_1_1():
    """transformers 5 has a field for it; before, an output of its own said so. mT5 never scales."""
    older = {key: value for key, value in raw("t5").items() if key not in ("scale_decoder_outputs", "tie_word_embeddings")}
    assert config(older).logit_scale == 16**-0.5
    assert config(older | {"tie_word_embeddings": False}).logit_scale == 1
    assert config(older | {"scale_decoder_outputs": False}).logit_scale == 1
    assert config(older | {"tie_word_embeddings": False, "scale_decoder_outputs": True}).logit_scale == 16**-0.5
    assert config(older | {"model_type": "mt5"}).logit_scale == 1


def test_t5_activations():
    for proj, activation, gated in (("relu", "relu", False), ("gated-gelu", "gelu_new", True), ("gated-silu", "silu", True)):
        found = config(raw("t5", feed_forward_proj=proj))
        assert (found.activation, found.gated) == (activation, gated)
    assert config({key: value for key, value in raw("t5").items() if key != "feed_forward_proj"}).activation == "relu"
    assert config(raw("t5", model_type="mt5", feed_forward_proj=None)).gated


def test_an_older_configuration_says_more_than_is_read():
    """As opus-mt's say it: what transformers no longer reads, how to generate, and no word on tying."""
    older = {key: value for key, value in raw("marian").items() if key != "tie_word_embeddings"}
    more = {
        "add_bias_logits": False,
        "bad_words_ids": [[39]],
        "extra_pos_embeddings": 40,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
        "normalize_before": False,
        "normalize_embedding": False,
        "num_beams": 6,
        "static_position_embeddings": True,
    }
    assert config(older | more) == config(raw("marian"))


def test_pegasus_files_hold_the_computed_positions(tmp_path):
    """Those of the real ones do, and transformers has them in its list of what a file must hold."""
    names = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    pretrained.save(tmp_path / "again", pretrained.load(str(FIXTURES / "pegasus")))
    before, after = load_file(FIXTURES / "pegasus" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for name in names:
        np.testing.assert_allclose(after[name], before[name], atol=1e-6)


def test_a_trunk_of_any_length_or_of_so_many_positions():
    assert config(raw("t5")).max_length is None
    assert config(raw("bart")).max_length == 16
