"""Answers of transformers' generate() that were stored: see fixtures/make_generated.py."""

import json
from pathlib import Path

import numpy as np
import pytest

import mtl_jax
from mtl_jax.decoding import generate

STORED = json.loads((Path(__file__).parent / "fixtures" / "generated.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["marian", "bart", "t5"])
def checkpoint(request):
    return mtl_jax.pretrained.load(str(Path(__file__).parents[1] / "pretrained" / "fixtures" / request.param))


def test_stored_answers(checkpoint):
    cases = [case for case in STORED["cases"] if case["model"] == checkpoint.raw["model_type"]]
    assert len(cases) == 5
    ends = set()
    for case in cases:
        tokens, scores = generate(checkpoint, STORED["input_ids"], STORED["attention_mask"], **case["options"])
        np.testing.assert_array_equal(tokens, case["tokens"], err_msg=str(case["options"]))
        if case["scores"] is not None:
            np.testing.assert_allclose(scores, case["scores"], atol=1e-4, rtol=1e-5)
        ends.add(tokens.shape[1])
    assert len(ends) > 1
