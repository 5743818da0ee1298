"""Encoders without torch: stored answers of transformers."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import pretrained

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["bert_rows", "bert_masked_lm", "roberta_tokens", "xlm_roberta_rows", "distilbert_masked_lm", "electra_replaced"]
NAMES += ["camembert_tokens", "mpnet_masked_lm", "albert_rows", "deberta_masked_lm", "deberta_rows"]


@pytest.mark.parametrize("name", NAMES)
def test_stored_answers(name):
    checkpoint = pretrained.load(str(FIXTURES / name))
    stored = np.load(FIXTURES / name / "expected.npz")
    with jax.default_matmul_precision("highest"):
        found = jax.jit(checkpoint.model.apply)({"params": checkpoint.params}, stored["input_ids"], stored["attention_mask"])
    real = stored["attention_mask"].astype(bool)
    np.testing.assert_allclose(found.hidden[real], stored["hidden"][real], rtol=0, atol=1e-5)
    where = real if stored["logits"].shape[:2] == real.shape else slice(None)
    np.testing.assert_allclose(found.logits[where], stored["logits"][where], rtol=0, atol=1e-5)
