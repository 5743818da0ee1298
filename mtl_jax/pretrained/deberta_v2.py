"""DeBERTa-v2, DeBERTa-v3 and mDeBERTa (He et al. 2021, 2023): the configuration, and tensor names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.models.checkpoint_heads import EncoderModel, MaskedLMHead, SequenceHead, TokenHead
from mtl_jax.models.deberta import Deberta, DebertaConfig
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.pretrained import bert
from mtl_jax.pretrained.family import Family, Fields, brief, translate

NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/embeddings/project": "embeddings.embed_proj",
    "trunk/embeddings/distance": "encoder.rel_embeddings",
    "trunk/embeddings/distance_norm": "encoder.LayerNorm",
    "trunk/layer_{}/attention/query": "encoder.layer.{}.attention.self.query_proj",
    "trunk/layer_{}/attention/key": "encoder.layer.{}.attention.self.key_proj",
    "trunk/layer_{}/attention/value": "encoder.layer.{}.attention.self.value_proj",
    "trunk/layer_{}/attention/position_key": "encoder.layer.{}.attention.self.pos_key_proj",
    "trunk/layer_{}/attention/position_query": "encoder.layer.{}.attention.self.pos_query_proj",
    "trunk/layer_{}/convolution": "encoder.conv.conv",
    "trunk/layer_{}/convolution_norm": "encoder.conv.LayerNorm",
    "head/dense": "pooler.dense",
}
# The two names of one masked-LM head. Published files have the newer ones, whatever config.json says.
LEGACY = {"head/transform": "cls.predictions.transform.dense", "head/norm": "cls.predictions.transform.LayerNorm"}
NEWER = {"head/transform": "lm_predictions.lm_head.dense", "head/norm": "lm_predictions.lm_head.LayerNorm"}


def config(raw: Mapping[str, Any], where: str) -> DebertaConfig:
    """config.json to DebertaConfig.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.heads_divide(hidden, heads)
    for name, value in (("attention_head_size", hidden // heads), ("pooler_hidden_size", hidden)):
        if fields.integer(name, value) != value:
            raise UserError(f"{where}: {name} is {raw[name]}; it must be {value}, as hidden_size and the heads say")
    if fields.integer("z_steps", 0, minimum=0) > 1:
        raise UserError(f"{where}: z_steps is {raw['z_steps']}; further runs of the last layer are not supported")
    width = fields.integer("embedding_size", hidden)
    legacy = fields.flag("legacy", True)
    if not legacy and width != hidden:
        raise UserError(f"{where}: legacy is false and embedding_size {width}; then it must be hidden_size, {hidden}")
    terms, dropout = _terms(fields), fields.rate("hidden_dropout_prob", 0.1)
    span, longest = _distances(fields)
    convolution = fields.integer("conv_kernel_size", 0, minimum=0)
    groups = fields.integer("conv_groups", 1)
    if convolution and convolution % 2 == 0:
        raise UserError(f"{where}: conv_kernel_size is {convolution}; it must be odd")
    if convolution and hidden % groups:
        raise UserError(f"{where}: conv_groups is {groups}; it must divide hidden_size, {hidden}")
    return DebertaConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=heads,
        intermediate_size=fields.integer("intermediate_size"),
        max_positions=fields.integer("max_position_embeddings", 512),
        type_vocab_size=fields.integer("type_vocab_size", 0, minimum=0),
        embedding_size=width,
        absolute_positions=fields.flag("position_biased_input", True),
        content_to_position="c2p" in terms,
        position_to_content="p2c" in terms,
        span=span,
        longest_distance=longest,
        shared_projections=fields.flag("share_att_key", False),
        norm_distances="layer_norm" in _parts(fields, "norm_rel_ebd", ("layer_norm",)),
        convolution=convolution,
        convolution_groups=groups,
        convolution_activation=fields.choice("conv_act", ACTIVATIONS, "tanh"),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-7),
        dropout=dropout,
        attention_dropout=fields.rate("attention_probs_dropout_prob", 0.1),
        pooler_dropout=fields.rate("pooler_dropout", 0.0),
        head_dropout=fields.rate("cls_dropout", dropout),
        pooler_activation=fields.choice("pooler_hidden_act", ACTIVATIONS, "gelu"),
        legacy_head=legacy,
        initializer_range=fields.number("initializer_range", 0.02),
        num_labels=fields.num_labels(),
        # The newer form of the head has no weight of its own.
        tied=fields.flag("tie_word_embeddings", True) or not legacy,
    )


def _parts(fields: Fields, name: str, choices: tuple[str, ...]) -> list[str]:
    """A field that is a list of words, or one text with "|" between them; "none" stands for no word.

    Raises:
        UserError: It is something else, or has a word that is not a choice.
    """
    value = fields.get(name, "none")
    words = value.lower().split("|") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{fields.where}: {name} is {brief(value)}; it must be a list of words, or words with '|' between them")
    words = [word.strip() for word in words if word.strip() not in ("", "none")]
    for word in words:
        if word not in choices:
            raise unknown(f"{name} in {fields.where}:", word, (*choices, "none"))
    return words


def _terms(fields: Fields) -> list[str]:
    return _parts(fields, "pos_att_type", ("c2p", "p2c"))


def _distances(fields: Fields) -> tuple[int, int]:
    """DebertaConfig.span and .longest_distance.

    Raises:
        UserError: The fields do not fit each other.
    """
    if not fields.flag("relative_attention", False):
        return 0, 0
    longest = fields.integer("max_relative_positions", -1, minimum=-1)
    longest = longest if longest > 0 else fields.integer("max_position_embeddings", 512)
    buckets = fields.integer("position_buckets", -1, minimum=-1)
    if buckets < 1:
        return longest, 0
    if buckets == 1 or longest - 1 <= buckets // 2:
        raise UserError(
            f"{fields.where}: position_buckets is {buckets}; it must be at least 2, and half of it below the longest distance "
            f"(max_relative_positions, or else max_position_embeddings), {longest}, less 1"
        )
    return buckets, longest


def build(cfg: DebertaConfig, kind: str | None, dtype: Any) -> EncoderModel:
    """DeBERTa with a head of the given kind; the pooler is a part of the head over whole rows."""
    trunk, init = Deberta(cfg, dtype), nn.initializers.normal(cfg.initializer_range)
    if kind is None:
        return EncoderModel(trunk)
    if kind == "sequence_classification":
        activation, before = cfg.pooler_activation, cfg.pooler_dropout
        head = SequenceHead(cfg.num_labels, dtype, init, cfg.head_dropout, activation, input_dropout=before)
        return EncoderModel(trunk, head=head)
    if kind == "masked_lm":
        width = cfg.embedding_size or cfg.hidden_size
        lm_head = MaskedLMHead(cfg.vocab_size, width, cfg.activation, cfg.layer_norm_eps, dtype, init, cfg.tied)
        return EncoderModel(trunk, head=lm_head)
    if kind == "question_answering":
        return EncoderModel(trunk, head=TokenHead(2, dtype, init, layer="answers"))
    return EncoderModel(trunk, head=TokenHead(cfg.num_labels, dtype, init, cfg.dropout))


def names(path: str, cfg: DebertaConfig) -> list[str]:
    """Tensor names of a parameter."""
    if path == "head/bias":
        legacy = bert.lm_bias(cfg, "cls.predictions.bias", "cls.predictions.decoder.bias")
        newer = ["lm_predictions.lm_head.bias"]
        return [*legacy, *newer] if cfg.legacy_head else [*newer, *legacy]
    if path.rsplit("/", 1)[0] in LEGACY:
        legacy, newer = translate(path, LEGACY), translate(path, NEWER)
        return [*legacy, *newer] if cfg.legacy_head else [*newer, *legacy]
    return translate(path, bert.TRUNK | bert.LABELS | bert.LM | NAMES)


DEBERTA_V2 = Family(
    model_types=("deberta-v2",),
    config=config,
    build=build,
    names=names,
    heads={
        "DebertaV2ForSequenceClassification": "sequence_classification",
        "DebertaV2ForTokenClassification": "token_classification",
        "DebertaV2ForQuestionAnswering": "question_answering",
        "DebertaV2ForMaskedLM": "masked_lm",
    },
    base="DebertaV2Model",
    prefix="deberta.",
    untied=("cls.predictions.decoder.weight",),
    ignored=r"(.*\.)?position_ids|cls\.predictions\.(bias|decoder\.(weight|bias))",
    extra=functools.partial(bert.untied_bias, "cls.predictions.bias"),
)
