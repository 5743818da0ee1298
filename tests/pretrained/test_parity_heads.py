"""Heads of the checkpoint's family beside transformers, in both directions, from packed rows."""

import pytest

from mtl_jax import Multilabel, Regression

pytest.importorskip("parity", exc_type=ImportError)
cases = pytest.importorskip("parity_heads", exc_type=ImportError)

OFTEN = ("Llama",)  # the last token; BERT is in test_family_heads, and the heads of all classes are cases of parity.py
CASES = [case if case[0] in OFTEN else pytest.param(case, marks=pytest.mark.long) for case in cases.CASES]


@pytest.mark.parametrize("case", CASES, ids=cases.name_of)
def test_both_ways(case, tmp_path):
    found = cases.both_ways(case, tmp_path)
    assert max(found.inwards, found.outwards) <= 1e-5, found
    assert found.same


@pytest.mark.long
@pytest.mark.parametrize("family", ["Roberta", "Qwen2"])
def test_the_scale_of_a_regression_is_a_part_of_the_last_layer(family, tmp_path):
    task = Regression(name="stars", source="texts", scale=4.0, head="family")
    found = cases.both_ways((family, {}), tmp_path, task)
    assert max(found.inwards, found.outwards) <= 1e-5, found
    assert found.same  # 4 is a power of 2


@pytest.mark.long
def test_several_labels(tmp_path):
    task = Multilabel(name="topics", source="texts", labels=cases.LABELS, head="family")
    found = cases.both_ways(("XLMRoberta", {}), tmp_path, task)
    assert max(found.inwards, found.outwards) <= 1e-5, found
    assert found.same
