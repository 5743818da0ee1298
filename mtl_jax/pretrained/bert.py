"""BERT (Devlin et al. 2019) and MiniLM, and what related families share with them: configuration and most names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.models.checkpoint_heads import EncoderModel, MaskedLMHead, Pooler, SequenceHead, TokenHead
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.pretrained.family import Family, Fields, translate

# Our module path to the file's; {} is the number of a layer.
TRUNK: dict[str, str | tuple[str, ...]] = {
    "trunk/embeddings/word": "embeddings.word_embeddings",
    "trunk/embeddings/position": "embeddings.position_embeddings",
    "trunk/embeddings/token_type": "embeddings.token_type_embeddings",
    "trunk/embeddings/norm": "embeddings.LayerNorm",
    "trunk/layer_{}/attention/query": "encoder.layer.{}.attention.self.query",
    "trunk/layer_{}/attention/key": "encoder.layer.{}.attention.self.key",
    "trunk/layer_{}/attention/value": "encoder.layer.{}.attention.self.value",
    "trunk/layer_{}/attention/output": "encoder.layer.{}.attention.output.dense",
    "trunk/layer_{}/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "trunk/layer_{}/feed_forward_in": "encoder.layer.{}.intermediate.dense",
    "trunk/layer_{}/feed_forward_out": "encoder.layer.{}.output.dense",
    "trunk/layer_{}/feed_forward_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler/dense": "pooler.dense",
}
LABELS: dict[str, str | tuple[str, ...]] = {
    "head/classifier": "classifier",
    "head/tags": "classifier",
    "head/answers": "qa_outputs",
}
LM: dict[str, str | tuple[str, ...]] = {
    "head/transform": "cls.predictions.transform.dense",
    "head/norm": "cls.predictions.transform.LayerNorm",
    "head/decoder": "cls.predictions.decoder",
}


def config(raw: Mapping[str, Any], where: str, **changes: Any) -> EncoderConfig:
    """config.json to EncoderConfig, for every family whose fields have the names of BERT's.

    Args:
        raw: The parsed file.
        where: Its name, for errors.
        changes: Fields of EncoderConfig that the family sets to other values.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    fields.choice("position_embedding_type", ("absolute",), "absolute")
    for name in ("is_decoder", "add_cross_attention"):
        if fields.flag(name, False):
            raise UserError(f"{where}: {name} is true; only encoders are read, not decoders of this family")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.heads_divide(hidden, heads)
    dropout = fields.rate("hidden_dropout_prob", 0.1)
    values: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": heads,
        "intermediate_size": fields.integer("intermediate_size"),
        "max_positions": fields.integer("max_position_embeddings"),
        "type_vocab_size": fields.integer("type_vocab_size", 2),
        "activation": fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        "layer_norm_eps": fields.number("layer_norm_eps", 1e-12),
        "dropout": dropout,
        "attention_dropout": fields.rate("attention_probs_dropout_prob", 0.1),
        "head_dropout": fields.rate("classifier_dropout", dropout),
        "initializer_range": fields.number("initializer_range", 0.02),
        "num_labels": fields.num_labels(),
        "tied": fields.flag("tie_word_embeddings", True),
    }
    return EncoderConfig(**(values | changes))


def lm_head(cfg: EncoderConfig, activation: str, dtype: Any) -> MaskedLMHead:
    """The masked-LM head of all these families."""
    width = cfg.embedding_size or cfg.hidden_size
    init = nn.initializers.normal(cfg.initializer_range)
    return MaskedLMHead(cfg.vocab_size, width, activation, cfg.layer_norm_eps, dtype, init, cfg.tied)


def token_head(cfg: EncoderConfig, kind: str, dropout: float, dtype: Any) -> TokenHead:
    """The head of all these families for tagging and for extractive answers."""
    init = nn.initializers.normal(cfg.initializer_range)
    if kind == "question_answering":
        return TokenHead(2, dtype, init, cfg.answer_dropout, "answers")
    return TokenHead(cfg.num_labels, dtype, init, dropout)


def build(cfg: EncoderConfig, kind: str | None, dtype: Any) -> EncoderModel:
    """BERT with a head of the given kind; the pooler is part of the bare model and of sequence classification."""
    trunk, init = Encoder(cfg, dtype), nn.initializers.normal(cfg.initializer_range)
    pooler = Pooler(dtype, init) if kind in (None, "sequence_classification") else None
    if kind is None:
        return EncoderModel(trunk, pooler)
    if kind == "sequence_classification":
        return EncoderModel(trunk, pooler, SequenceHead(cfg.num_labels, dtype, init, cfg.head_dropout))
    if kind == "masked_lm":
        return EncoderModel(trunk, pooler, lm_head(cfg, cfg.activation, dtype))
    return EncoderModel(trunk, pooler, token_head(cfg, kind, cfg.head_dropout, dtype))


def lm_bias(cfg: Any, bias: str, output: str) -> list[str]:
    """Names of a masked-LM head's bias: a tied head's output layer has a copy of it, an untied one a separate bias."""
    return [bias, output] if cfg.tied else [output, bias]


def untied_bias(bias: str, params: Any, cfg: EncoderConfig) -> Mapping[str, np.ndarray]:
    """transformers keeps an unused copy of an untied masked-LM head's bias."""
    head = params.get("head", {})
    return {bias: head["bias"]} if "bias" in head and not cfg.tied else {}


def names(path: str, cfg: EncoderConfig) -> list[str]:
    """Tensor names of a parameter of BERT."""
    if path == "head/bias":
        return lm_bias(cfg, "cls.predictions.bias", "cls.predictions.decoder.bias")
    return translate(path, TRUNK | LABELS | LM)


BERT = Family(
    model_types=("bert",),
    config=config,
    build=build,
    names=names,
    heads={
        "BertForSequenceClassification": "sequence_classification",
        "BertForTokenClassification": "token_classification",
        "BertForQuestionAnswering": "question_answering",
        "BertForMaskedLM": "masked_lm",
        "BertForPreTraining": "masked_lm",
    },
    base="BertModel",
    prefix="bert.",
    untied=("cls.predictions.decoder.weight",),
    ignored=r"(.*\.)?position_ids|cls\.predictions\.(bias|decoder\.(weight|bias))",
    extra=functools.partial(untied_bias, "cls.predictions.bias"),
)
