"""BGE, E5, GTE, mmBERT: config.json in the published form with smaller sizes, and a text's vector as the model's card has it.

The numbers are random; what their files say of activations, positions, padding, types and rotations is theirs.
"""

import functools
import json

import jax
import numpy as np
import pytest

from mtl_jax import pretrained

parity = pytest.importorskip("parity", exc_type=ImportError)

SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "torch_dtype": "float32",
    "vocab_size": parity.VOCAB,
}
BERT = SMALL | {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 24,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
}
# Positions begin behind the padding id, so the table has two rows more than a text has tokens.
XLM_R = BERT | {
    "model_type": "xlm-roberta",
    "architectures": ["XLMRobertaModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 26,
    "output_past": True,
    "type_vocab_size": 1,
}
# The form before transformers 5: numbers in place of lists, of one global layer in three.
MODERN = SMALL | {
    "model_type": "modernbert",
    "architectures": ["ModernBertModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 3,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 3,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 4,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "local_attention": 4,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 24,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_hidden_layers": 3,
    "pad_token_id": 5,
    "position_embedding_type": "absolute",
    "reference_compile": None,
    "repad_logits_with_grad": False,
    "sep_token_id": 4,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
}
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
# Name -> config.json, and the vector of a text: of its first token (cls) or the mean of all; "" for a score in its place.
PUBLISHED = {
    "BAAI/bge-small-en-v1.5": (BERT | ONE_LABEL, "cls"),
    "BAAI/bge-m3": (XLM_R, "cls"),
    "BAAI/bge-reranker-v2-m3": (XLM_R | ONE_LABEL | {"architectures": ["XLMRobertaForSequenceClassification"]}, ""),
    "intfloat/e5-base-v2": (BERT, "mean"),
    "intfloat/multilingual-e5-small": (BERT | {"tokenizer_class": "XLMRobertaTokenizer"}, "mean"),
    "intfloat/multilingual-e5-base": (XLM_R, "mean"),
    "thenlper/gte-base": (BERT, "mean"),
    "Alibaba-NLP/gte-modernbert-base": (MODERN, "cls"),
    "jhu-clsp/mmBERT-base": (
        MODERN
        | {"architectures": ["ModernBertForMaskedLM"], "local_rope_theta": 160000.0, "position_embedding_type": "sans_pos"}
        | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1, "mask_token_id": 4},
        "mean",
    ),
}


def vector(hidden, mask, pooling):
    """As the card computes it, of length 1."""
    x = hidden[:, 0] if pooling == "cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0, compiler_options=parity.QUICKLY)
def apply(model, params, inputs):
    """Compiled once for all names with the same configuration."""
    return model.apply({"params": params}, **inputs)


# Their files say what those of others above say.
SELDOM = ("intfloat/e5-base-v2", "intfloat/multilingual-e5-base", "thenlper/gte-base")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in SELDOM)) for name in PUBLISHED])
def test_vectors_and_logits(name, tmp_path):
    raw, pooling = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    parity.torch.manual_seed(0)
    config = parity.transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    model = getattr(parity.transformers, raw["architectures"][0])(config).eval()
    with parity.torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parity.torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")  # again in the published form
    loaded = pretrained.load(str(tmp_path))
    assert (loaded.unused, loaded.initialized) == ((), ())
    inputs = parity.batch(config)
    inputs = {key: value[:2] for key, value in inputs.items() if key != "token_type_ids"}  # full, and padded on the right
    with jax.default_matmul_precision("highest"):
        out = apply(loaded.model, loaded.params, inputs)
    ours = parity.Answer(*(None if x is None else np.asarray(x) for x in (out.hidden, out.logits, out.pooled)))
    theirs = parity.theirs(model, inputs)
    assert parity.difference(ours, theirs, inputs["attention_mask"]) <= 1e-5
    if pooling:
        found, expected = (vector(answer.hidden, inputs["attention_mask"], pooling) for answer in (ours, theirs))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        assert ours.logits.shape == (2, 1)
