"""What is ModernBERT's own beside transformers; its heads are among the cases of test_parity_encoders."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import pretrained
from mtl_jax.models.modernbert import rotation

parity = pytest.importorskip("parity", exc_type=ImportError)


def test_the_older_form_of_the_configuration(tmp_path):
    """What ModernBERT's checkpoints on the hub have: numbers in place of lists."""
    changes = {"rope_parameters": parity.ROTATIONS, "global_attn_every_n_layers": 2}
    model = parity.reference("ModernBert", "ModernBertModel", changes)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_types", "rope_parameters"):
        del config[name]
    config |= {"global_attn_every_n_layers": 2, "global_rope_theta": 500.0, "local_rope_theta": 20.0}
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded = pretrained.load(str(tmp_path))
    assert loaded.config.global_layers == (True, False, True, False)
    inputs = parity.batch(model.config)
    found = parity.ours(loaded, inputs)
    assert parity.difference(found, parity.theirs(model, inputs), inputs["attention_mask"]) <= 1e-5
    pretrained.save(tmp_path / "ours", loaded)
    back = parity.opened_without_a_word(tmp_path / "ours", "ModernBertModel")
    assert parity.difference(found, parity.theirs(back, inputs), inputs["attention_mask"]) <= 1e-5


def test_frequencies_are_those_of_torch():
    """At long positions a last place of a frequency is many of an angle."""
    from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

    config = parity.transformers.ModernBertConfig()
    positions = np.array([[0, 1, 511, 8191]])
    for kind, theta in (("full_attention", 160_000.0), ("sliding_attention", 10_000.0)):
        cos, sin = ModernBertRotaryEmbedding(config)(parity.torch.zeros(1), parity.torch.from_numpy(positions), kind)
        found = rotation(jnp.asarray(positions), 64, theta)
        np.testing.assert_allclose(found.cos[:, :, 0], cos[..., :32], atol=1e-6)
        np.testing.assert_allclose(found.sin[:, :, 0], sin[..., :32], atol=1e-6)
