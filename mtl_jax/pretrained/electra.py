"""ELECTRA (Clark et al. 2020): BERT with narrow embeddings and no pooler; mostly discriminators; generators are masked LMs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mtl_jax.models.checkpoint_heads import EncoderModel, ReplacedTokenHead, SequenceHead
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.pretrained import bert
from mtl_jax.pretrained.family import Family, Fields, translate

NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/embeddings/project": "embeddings_project",
    "head/dense": "classifier.dense",
    "head/classifier": "classifier.out_proj",
    "head/tags": "classifier",
    "head/answers": "qa_outputs",
    "head/replaced_dense": "discriminator_predictions.dense",
    "head/replaced": "discriminator_predictions.dense_prediction",
    "head/transform": "generator_predictions.dense",
    "head/norm": "generator_predictions.LayerNorm",
    "head/decoder": "generator_lm_head",
    "head": "generator_lm_head",
}


def config(raw: Mapping[str, Any], where: str) -> EncoderConfig:
    """config.json to EncoderConfig.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    return bert.config(raw, where, embedding_size=Fields(raw, where).integer("embedding_size", 128))


def build(cfg: EncoderConfig, kind: str | None, dtype: Any) -> EncoderModel:
    """ELECTRA with a head of the given kind."""
    trunk, init = Encoder(cfg, dtype), nn.initializers.normal(cfg.initializer_range)
    if kind is None:
        return EncoderModel(trunk)
    if kind == "sequence_classification":
        head = SequenceHead(cfg.num_labels, dtype, init, cfg.head_dropout, activation="gelu", drop_input=True)
        return EncoderModel(trunk, head=head)
    if kind == "replaced_token":
        return EncoderModel(trunk, head=ReplacedTokenHead(cfg.activation, dtype, init))
    if kind == "masked_lm":
        return EncoderModel(trunk, head=bert.lm_head(cfg, "gelu", dtype))
    return EncoderModel(trunk, head=bert.token_head(cfg, kind, cfg.head_dropout, dtype))


def names(path: str, cfg: EncoderConfig) -> list[str]:
    """Tensor names of a parameter."""
    return translate(path, bert.TRUNK | NAMES)


ELECTRA = Family(
    model_types=("electra",),
    config=config,
    build=build,
    names=names,
    heads={
        "ElectraForPreTraining": "replaced_token",
        "ElectraForSequenceClassification": "sequence_classification",
        "ElectraForTokenClassification": "token_classification",
        "ElectraForQuestionAnswering": "question_answering",
        "ElectraForMaskedLM": "masked_lm",
    },
    base="ElectraModel",
    prefix="electra.",
    untied=("generator_lm_head.weight",),
    ignored=r"(.*\.)?position_ids|generator_lm_head\.weight",
)
