"""The classifier of a family without its trunk: on the vector that it reads it says what the whole checkpoint says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.pretrained import text_classifier
from mtl_jax.pretrained.text_classifier import FamilyClassifier

FIXTURES = Path(__file__).parent / "fixtures"


def eurobert(folder: Path, pooling: str) -> str:
    """EuroBERT's classifier of the dense layer that all its poolings share."""
    shutil.copytree(FIXTURES / "eurobert_rows", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"classifier_pooling": pooling}))
    return str(folder)


@pytest.mark.parametrize(("pooling", "reads"), [("bos", "first"), ("mean", "mean")])
def test_the_head_of_eurobert_reads_one_vector(tmp_path, pooling, reads):
    checkpoint = pretrained.load(eurobert(tmp_path / "eurobert", pooling))
    ids, mask = np.arange(5, 17).reshape(2, 6), np.array([[1] * 6, [1, 1, 1, 1, 0, 0]])
    output = checkpoint.model.apply({"params": checkpoint.params}, ids, mask)
    hidden = np.asarray(output.hidden)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    vectors = (hidden[:, 0] if reads == "first" else mean).astype(np.float32)
    classifier = text_classifier.declared(checkpoint.raw, None)
    assert classifier.reads == reads
    logits = classifier.module(3).apply({"params": {"head": checkpoint.params["head"]}}, vectors)
    np.testing.assert_allclose(logits, output.logits, atol=1e-5)


def test_a_classifier_of_all_tokens_is_refused(tmp_path):
    """The mean of the logits of all tokens is no head of one vector."""
    raw = pretrained.load(eurobert(tmp_path / "eurobert", "late")).raw
    assert FamilyClassifier(dict(raw)).reads == ""
    with pytest.raises(UserError, match=r"the classifier of this eurobert checkpoint reads every token of a text"):
        text_classifier.declared(raw, None)
