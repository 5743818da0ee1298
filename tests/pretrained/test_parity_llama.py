"""Llama, Qwen2, Qwen3 and Gemma 3 beside transformers, in both directions."""

import pytest

parity = pytest.importorskip("parity", exc_type=ImportError)
cases = pytest.importorskip("parity_llama", exc_type=ImportError)


@pytest.mark.parametrize("case", cases.CASES, ids=parity.name_of)
def test_both_ways(case, tmp_path):
    differences = parity.both_ways(case, tmp_path)
    assert max(differences) <= 1e-5, differences
