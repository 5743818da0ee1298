"""ModernBERT without torch: stored answers of transformers, and config.json in its two forms.

The form before transformers 5 is the one that the hub's checkpoints have.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.pretrained.modernbert_family import config

FIXTURES = Path(__file__).parent / "fixtures"

# What the published base model says, apart from what this program has no use for.
BASE = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "embedding_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "position_embedding_type": "absolute",
    "vocab_size": 50368,
}
LAYERS = ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(22)]


def newer(**rotations: object) -> dict:
    return {name: value for name, value in BASE.items() if "rope" not in name and "every" not in name} | {
        "layer_types": LAYERS,
        "rope_parameters": rotations,
    }


@pytest.mark.parametrize("name", ["modernbert_masked_lm", "modernbert_rows"])
def test_stored_answers(name):
    checkpoint = pretrained.load(str(FIXTURES / name))
    stored = np.load(FIXTURES / name / "expected.npz")
    with jax.default_matmul_precision("highest"):
        found = jax.jit(checkpoint.model.apply)({"params": checkpoint.params}, stored["input_ids"], stored["attention_mask"])
    real = stored["attention_mask"].astype(bool)
    np.testing.assert_allclose(found.hidden[real], stored["hidden"][real], rtol=0, atol=1e-5)
    where = real if stored["logits"].ndim == 3 else slice(None)
    np.testing.assert_allclose(found.logits[where], stored["logits"][where], rtol=0, atol=1e-5)


def test_both_forms_say_the_same():
    older = config(BASE, "config.json")
    assert older.global_layers[:4] == (True, False, False, True)
    assert (older.window, older.global_theta, older.local_theta) == (64, 160_000.0, 10_000.0)
    rotations = {
        "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert config(newer(**rotations), "config.json") == older
    assert config(newer(), "config.json") == older


def test_a_local_theta_of_null_is_the_global_one():
    assert config(BASE | {"local_rope_theta": None}, "config.json").local_theta == 160_000.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_attention_heads": 7}, "768 is not a multiple of the 7"),
        ({"hidden_size": 36}, "attention heads of size 3; rotary positions need an even size"),
        ({"layer_types": LAYERS[:3]}, "layer_types must be 22 times"),
        ({"layer_types": ["linear_attention"] * 22}, "layer_types must be 22 times"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "scaled rotary positions"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, "scaled rotary positions"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 0}}}, "rope_theta is 0"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"classifier_pooling": "max"}, "classifier_pooling"),
        ({"hidden_activation": "relu6"}, "hidden_activation"),
        ({"mlp_dropout": 1.5}, "mlp_dropout is 1.5"),
    ],
)
def test_errors_name_the_field(change, message):
    with pytest.raises(UserError, match=rf"config\.json.*{message}|{message}.*config\.json"):
        config(BASE | change, "config.json")
