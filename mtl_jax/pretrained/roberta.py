"""RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2020), CamemBERT (Martin et al. 2020): other positions and heads."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mtl_jax.models.checkpoint_heads import EncoderModel, Pooler, SequenceHead
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.pretrained import bert
from mtl_jax.pretrained.family import Family, Fields, translate

HEADS: dict[str, str | tuple[str, ...]] = {
    "head/dense": "classifier.dense",
    "head/classifier": "classifier.out_proj",
    "head/tags": "classifier",
    "head/answers": "qa_outputs",
    "head/transform": "lm_head.dense",
    "head/norm": "lm_head.layer_norm",
    "head/decoder": "lm_head.decoder",
}


def config(raw: Mapping[str, Any], where: str) -> EncoderConfig:
    """config.json to EncoderConfig; the first token takes the row after the padding id's in the position table.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    pad = Fields(raw, where).integer("pad_token_id", 1, minimum=0)
    return bert.config(raw, where, pad_token_id=pad, first_position=pad + 1)


def build(cfg: EncoderConfig, kind: str | None, dtype: Any) -> EncoderModel:
    """RoBERTa with a head of the given kind; only the bare model has a pooler."""
    trunk, init = Encoder(cfg, dtype), nn.initializers.normal(cfg.initializer_range)
    if kind is None:
        return EncoderModel(trunk, Pooler(dtype, init))
    if kind == "sequence_classification":
        head = SequenceHead(cfg.num_labels, dtype, init, cfg.head_dropout, activation="tanh", drop_input=True)
        return EncoderModel(trunk, head=head)
    if kind == "masked_lm":
        return EncoderModel(trunk, head=bert.lm_head(cfg, "gelu", dtype))
    return EncoderModel(trunk, head=bert.token_head(cfg, kind, cfg.head_dropout, dtype))


def names(path: str, cfg: EncoderConfig) -> list[str]:
    """Tensor names of a parameter."""
    if path == "head/bias":
        return bert.lm_bias(cfg, "lm_head.bias", "lm_head.decoder.bias")
    return translate(path, bert.TRUNK | HEADS)


def _family(model_type: str, name: str) -> Family:
    return Family(
        model_types=(model_type,),
        config=config,
        build=build,
        names=names,
        heads={
            f"{name}ForSequenceClassification": "sequence_classification",
            f"{name}ForTokenClassification": "token_classification",
            f"{name}ForQuestionAnswering": "question_answering",
            f"{name}ForMaskedLM": "masked_lm",
        },
        base=f"{name}Model",
        prefix="roberta.",
        untied=("lm_head.decoder.weight",),
        ignored=r"(.*\.)?position_ids|lm_head\.(bias|decoder\.(weight|bias))",
        extra=functools.partial(bert.untied_bias, "lm_head.bias"),
    )


ROBERTA = _family("roberta", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta")
CAMEMBERT = _family("camembert", "Camembert")
