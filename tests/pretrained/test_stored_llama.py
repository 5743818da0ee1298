"""Decoder-only models without torch: stored answers of transformers, packed rows, and config.json in its forms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.decoding import generate
from mtl_jax.models.llama_config import Rope
from mtl_jax.pretrained.llama_family import gemma3_config, llama_config, qwen2_config, qwen3_config

FIXTURES = Path(__file__).parent / "fixtures"
# What published models say, apart from what this program has no use for.
BASE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
LLAMA = BASE | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 500000.0}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def opened(request):
    return pretrained.load(str(FIXTURES / request.param)), np.load(FIXTURES / request.param / "expected.npz")


@pytest.fixture(scope="module")
def apply(opened):
    """The model, compiled for two shapes at most."""

    @jax.jit
    def apply(ids, mask, **places):
        with jax.default_matmul_precision("highest"):
            return opened[0].model.apply({"params": opened[0].params}, ids, mask, **places)

    return apply


def test_stored_answers(opened, apply):
    _, stored = opened
    found, real = apply(stored["input_ids"], stored["attention_mask"]), stored["attention_mask"].astype(bool)
    np.testing.assert_allclose(found.hidden[real], stored["hidden"][real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.logits[real], stored["logits"][real], rtol=0, atol=1e-5)


def test_stored_texts(opened):
    checkpoint, stored = opened
    tokens, _ = generate(checkpoint, stored["input_ids"], stored["attention_mask"], max_new_tokens=8)
    np.testing.assert_array_equal(tokens, stored["generated"])


def test_packing_changes_nothing(opened, apply):
    _, stored = opened
    examples = [row[real.astype(bool)] for row, real in zip(stored["input_ids"], stored["attention_mask"], strict=True)]
    lengths = [len(example) for example in examples]
    segments = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    packed = apply(np.concatenate(examples)[None], np.ones_like(segments), segment_ids=segments, position_ids=positions)
    alone = apply(stored["input_ids"], stored["attention_mask"])
    real = stored["attention_mask"].astype(bool)
    np.testing.assert_allclose(packed.hidden[0], alone.hidden[real], rtol=0, atol=1e-5)


def test_rows_longer_than_dynamic_positions_are_refused(opened):
    model, params = opened[0].model, opened[0].params
    config = opened[0].config.__class__(**{**vars(opened[0].config), "rope": Rope(kind="dynamic"), "max_length": 8})
    with pytest.raises(UserError, match="a row of 9 tokens is too long: dynamic positions are read up to 8"):
        jax.eval_shape(model.trunk.clone(config=config).apply, {"params": params["trunk"]}, jnp.zeros((1, 9), jnp.int32))


def test_forms_of_the_configuration():
    older = llama_config(LLAMA, "config.json")
    assert older.rope == Rope(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert (older.head_size, older.kv_heads, older.tied) == (64, 8, True)
    assert llama_config(BASE | {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}}, "") == older
    linear = llama_config(BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "").rope
    np.testing.assert_allclose(linear.frequencies(8), Rope().frequencies(8) / 2)
    gemma = gemma3_config(BASE | {"rope_theta": 5e5, "rope_local_base_freq": 300.0, "sliding_window": 512}, "")
    assert gemma.global_layers == (*(False,) * 5, True) * 2 + (False,) * 4
    assert (gemma.rope.theta, gemma.local_rope.theta, gemma.head_size, gemma.window) == (5e5, 300.0, 256, 512)
    assert qwen3_config(BASE, "").query_key_norm
    assert qwen2_config(BASE | {"use_sliding_window": False, "sliding_window": 9}, "").global_layers == (True,) * 16


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (llama_config, {"num_key_value_heads": 5}, "num_key_value_heads is 5; it must divide the 32"),
        (llama_config, {"head_dim": 7}, "attention heads of size 7; rotary positions need an even size"),
        (llama_config, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters: 'yarn'"),
        (llama_config, {"rope_scaling": [2]}, r"rope_scaling is \[2\]; it must be an object"),
        (llama_config, {"rope_parameters": {"full_attention": {}}}, "rope_parameters has 'full_attention', which is not read"),
        (llama_config, {"pad_token_id": "x"}, "pad_token_id is 'x'"),
        (gemma3_config, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters must be an object with full_attention"),
        (llama_config, {"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        (llama_config, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        (llama_config, {"rope_theta": 0}, "rope_theta is 0"),
        (llama_config, {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 9.0}}, "low_freq_factor is 9"),
        (qwen2_config, {"layer_types": ["sliding_attention"] * 16}, "but use_sliding_window is false"),
        (qwen2_config, {"layer_types": ["linear_attention"] * 16}, "layer_types must be 16 times"),
        (gemma3_config, {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        (gemma3_config, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set"),
        (gemma3_config, {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0"),
        (gemma3_config, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    ],
)
def test_errors_name_the_field(config, change, message):
    with pytest.raises(UserError, match=rf"config\.json.*{message}|{message}.*config\.json"):
        config(BASE | change, "config.json")
