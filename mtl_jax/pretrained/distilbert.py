"""DistilBERT (Sanh et al. 2019): BERT without token types and pooler, with other tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mtl_jax.models.checkpoint_heads import EncoderModel, SequenceHead
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.pretrained import bert
from mtl_jax.pretrained.family import Family, Fields, translate

NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/embeddings/word": "embeddings.word_embeddings",
    "trunk/embeddings/position": "embeddings.position_embeddings",
    "trunk/embeddings/norm": "embeddings.LayerNorm",
    "trunk/layer_{}/attention/query": "transformer.layer.{}.attention.q_lin",
    "trunk/layer_{}/attention/key": "transformer.layer.{}.attention.k_lin",
    "trunk/layer_{}/attention/value": "transformer.layer.{}.attention.v_lin",
    "trunk/layer_{}/attention/output": "transformer.layer.{}.attention.out_lin",
    "trunk/layer_{}/attention_norm": "transformer.layer.{}.sa_layer_norm",
    "trunk/layer_{}/feed_forward_in": "transformer.layer.{}.ffn.lin1",
    "trunk/layer_{}/feed_forward_out": "transformer.layer.{}.ffn.lin2",
    "trunk/layer_{}/feed_forward_norm": "transformer.layer.{}.output_layer_norm",
    "head/dense": "pre_classifier",
    "head/classifier": "classifier",
    "head/tags": "classifier",
    "head/answers": "qa_outputs",
    "head/transform": "vocab_transform",
    "head/norm": "vocab_layer_norm",
    "head/decoder": "vocab_projector",
    "head": "vocab_projector",
}


def config(raw: Mapping[str, Any], where: str) -> EncoderConfig:
    """config.json to EncoderConfig.

    Sinusoidal position tables (sinusoidal_pos_embds) are stored like learned ones and read like them.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    hidden, heads = fields.integer("dim"), fields.integer("n_heads")
    fields.heads_divide(hidden, heads)
    return EncoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers("n_layers"),
        num_heads=heads,
        intermediate_size=fields.integer("hidden_dim"),
        max_positions=fields.integer("max_position_embeddings"),
        type_vocab_size=0,
        activation=fields.choice("activation", ACTIVATIONS, "gelu"),
        layer_norm_eps=1e-12,
        dropout=fields.rate("dropout", 0.1),
        attention_dropout=fields.rate("attention_dropout", 0.1),
        head_dropout=fields.rate("seq_classif_dropout", 0.2),
        answer_dropout=fields.rate("qa_dropout", 0.1),
        initializer_range=fields.number("initializer_range", 0.02),
        num_labels=fields.num_labels(),
        tied=fields.flag("tie_word_embeddings", True),
    )


def build(cfg: EncoderConfig, kind: str | None, dtype: Any) -> EncoderModel:
    """DistilBERT with a head of the given kind."""
    trunk, init = Encoder(cfg, dtype), nn.initializers.normal(cfg.initializer_range)
    if kind is None:
        return EncoderModel(trunk)
    if kind == "sequence_classification":
        return EncoderModel(trunk, head=SequenceHead(cfg.num_labels, dtype, init, cfg.head_dropout, activation="relu"))
    if kind == "masked_lm":
        return EncoderModel(trunk, head=bert.lm_head(cfg, cfg.activation, dtype))
    return EncoderModel(trunk, head=bert.token_head(cfg, kind, cfg.dropout, dtype))


def names(path: str, cfg: EncoderConfig) -> list[str]:
    """Tensor names of a parameter."""
    return translate(path, NAMES)


DISTILBERT = Family(
    model_types=("distilbert",),
    config=config,
    build=build,
    names=names,
    heads={
        "DistilBertForSequenceClassification": "sequence_classification",
        "DistilBertForTokenClassification": "token_classification",
        "DistilBertForQuestionAnswering": "question_answering",
        "DistilBertForMaskedLM": "masked_lm",
    },
    base="DistilBertModel",
    prefix="distilbert.",
    untied=("vocab_projector.weight",),
    ignored=r"(.*\.)?position_ids|vocab_projector\.weight",
)
