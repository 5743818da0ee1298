"""MPNet (Song et al. 2020): RoBERTa's positions and heads, no token types, and T5's biases for relative positions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder import EncoderConfig
from mtl_jax.pretrained import bert, roberta
from mtl_jax.pretrained.family import Family, Fields, translate

# Constants of transformers' class, whatever config.json says.
BUCKETS = 32
PADDING_ROW = 1

NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/layer_{}/attention/query": "encoder.layer.{}.attention.attn.q",
    "trunk/layer_{}/attention/key": "encoder.layer.{}.attention.attn.k",
    "trunk/layer_{}/attention/value": "encoder.layer.{}.attention.attn.v",
    "trunk/layer_{}/attention/output": "encoder.layer.{}.attention.attn.o",
    "trunk/layer_{}/attention_norm": "encoder.layer.{}.attention.LayerNorm",
    "trunk/relative_bias/table": "encoder.relative_attention_bias",
}


def config(raw: Mapping[str, Any], where: str) -> EncoderConfig:
    """config.json to EncoderConfig.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    buckets = Fields(raw, where).integer("relative_attention_num_buckets", BUCKETS)
    if buckets != BUCKETS:
        raise UserError(f"{where}: relative_attention_num_buckets is {buckets}; only {BUCKETS} is supported")
    positions = {"pad_token_id": PADDING_ROW, "first_position": PADDING_ROW + 1}
    return bert.config(raw, where, type_vocab_size=0, relative_buckets=buckets, **positions)


def names(path: str, cfg: EncoderConfig) -> list[str]:
    """Tensor names of a parameter."""
    if path == "head/bias":
        return bert.lm_bias(cfg, "lm_head.bias", "lm_head.decoder.bias")
    return translate(path, bert.TRUNK | roberta.HEADS | NAMES)


MPNET = Family(
    model_types=("mpnet",),
    config=config,
    build=roberta.build,
    names=names,
    heads={
        "MPNetForSequenceClassification": "sequence_classification",
        "MPNetForTokenClassification": "token_classification",
        "MPNetForQuestionAnswering": "question_answering",
        "MPNetForMaskedLM": "masked_lm",
    },
    base="MPNetModel",
    prefix="mpnet.",
    untied=("lm_head.decoder.weight",),
    ignored=r"(.*\.)?position_ids|lm_head\.(bias|decoder\.(weight|bias))",
    extra=functools.partial(bert.untied_bias, "lm_head.bias"),
)
