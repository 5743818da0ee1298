"""Marian (Junczys-Dowmunt et al. 2018), BART (Lewis et al. 2020), mBART (Liu et al. 2020), Pegasus (Zhang et al. 2020), M2M100
(Fan et al. 2021) and NLLB (NLLB Team 2022): config.json and tensor names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder_decoder import Seq2Seq, Seq2SeqEncoder
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.models.seq2seq_decoder import Decoder, RowClassifier
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig, sinusoidal_table
from mtl_jax.pretrained.family import MOST_COMPUTED, TABLE, Family, Fields, translate

# Our module path to the file's inside the encoder or the decoder; {} is the number of a layer.
_SIDE = {
    "embeddings/position": "embed_positions",
    "embeddings/norm": "layernorm_embedding",
    "layer_{}/attention/query": "layers.{}.self_attn.q_proj",
    "layer_{}/attention/key": "layers.{}.self_attn.k_proj",
    "layer_{}/attention/value": "layers.{}.self_attn.v_proj",
    "layer_{}/attention/output": "layers.{}.self_attn.out_proj",
    "layer_{}/attention_norm": "layers.{}.self_attn_layer_norm",
    "layer_{}/cross_attention/query": "layers.{}.encoder_attn.q_proj",
    "layer_{}/cross_attention/key": "layers.{}.encoder_attn.k_proj",
    "layer_{}/cross_attention/value": "layers.{}.encoder_attn.v_proj",
    "layer_{}/cross_attention/output": "layers.{}.encoder_attn.out_proj",
    "layer_{}/cross_attention_norm": "layers.{}.encoder_attn_layer_norm",
    "layer_{}/feed_forward_in": "layers.{}.fc1",
    "layer_{}/feed_forward_out": "layers.{}.fc2",
    "layer_{}/feed_forward_norm": "layers.{}.final_layer_norm",
    "norm": "layer_norm",
}
# Files of the bare model have no prefix; that of the trunk's names is handled in placing.py and saving.py.
NAMES: dict[str, str | tuple[str, ...]] = {
    **{f"trunk/{ours}": f"encoder.{theirs}" for ours, theirs in _SIDE.items()},
    **{f"head/{ours}": (f"model.decoder.{theirs}", f"decoder.{theirs}") for ours, theirs in _SIDE.items()},
    "head/embeddings/word": ("model.decoder.embed_tokens", "decoder.embed_tokens", "model.shared", "shared"),
    "head/lm_head": "lm_head",
    "head/dense": "classification_head.dense",
    "head/classifier": "classification_head.out_proj",
}


def _config(raw: Mapping[str, Any], where: str, **changes: Any) -> Seq2SeqConfig:
    fields = Fields(raw, where)
    hidden = fields.integer("d_model")
    fields.heads_divide(hidden, fields.integer("encoder_attention_heads"))
    fields.heads_divide(hidden, fields.integer("decoder_attention_heads"))
    values: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "decoder_vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "encoder_layers": fields.layers("encoder_layers"),
        "decoder_layers": fields.layers("decoder_layers"),
        "encoder_heads": fields.integer("encoder_attention_heads"),
        "decoder_heads": fields.integer("decoder_attention_heads"),
        "encoder_feed_forward": fields.integer("encoder_ffn_dim"),
        "decoder_feed_forward": fields.integer("decoder_ffn_dim"),
        "max_positions": fields.integer("max_position_embeddings"),
        "activation": fields.choice("activation_function", ACTIVATIONS, "gelu"),
        "embedding_scale": hidden**0.5 if fields.flag("scale_embedding", False) else 1.0,
        "tied": fields.flag("tie_word_embeddings", True),
        "dropout": fields.rate("dropout", 0.1),
        "attention_dropout": fields.rate("attention_dropout", 0.0),
        "activation_dropout": fields.rate("activation_dropout", 0.0),
        "initializer_range": fields.number("init_std", 0.02),
    }
    if changes.get("positions") in ("sinusoidal", "fairseq"):
        fields.integer("max_position_embeddings", maximum=MOST_COMPUTED)
    return Seq2SeqConfig(**(values | changes))


def bart_config(raw: Mapping[str, Any], where: str) -> Seq2SeqConfig:
    """config.json of BART.

    Args:
        raw: The parsed file.
        where: Its name, for errors.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    return _config(
        raw,
        where,
        num_labels=fields.num_labels(default=3),
        head_dropout=fields.rate("classifier_dropout", 0.0),
        decoder_start_token_id=fields.integer("decoder_start_token_id", 2, minimum=0),
        eos_token_id=fields.integer("eos_token_id", 2, minimum=0),
    )


def mbart_config(raw: Mapping[str, Any], where: str) -> Seq2SeqConfig:
    """config.json of mBART: BART with pre-norm. Arguments and errors as for bart_config."""
    return _config(raw, where, pre_norm=True)


def marian_config(raw: Mapping[str, Any], where: str) -> Seq2SeqConfig:
    """config.json of Marian: computed positions, no norm after the embeddings. Arguments and errors as for bart_config."""
    fields = Fields(raw, where)
    vocab_size = fields.integer("vocab_size")
    decoder_vocab_size = fields.integer("decoder_vocab_size", vocab_size)
    shared = fields.flag("share_encoder_decoder_embeddings", True)
    if shared and decoder_vocab_size != vocab_size:
        raise UserError(
            f"{where}: decoder_vocab_size is {decoder_vocab_size} and vocab_size {vocab_size}; "
            "they must be equal where share_encoder_decoder_embeddings is true"
        )
    return _config(
        raw,
        where,
        decoder_vocab_size=decoder_vocab_size,
        shared_table=shared,
        positions="sinusoidal",
        position_offset=0,
        embedding_norm=False,
    )


def pegasus_config(raw: Mapping[str, Any], where: str) -> Seq2SeqConfig:
    """config.json of Pegasus: Marian with pre-norm. Arguments and errors as for bart_config."""
    return _config(raw, where, positions="sinusoidal", position_offset=0, embedding_norm=False, pre_norm=True)


def m2m_config(raw: Mapping[str, Any], where: str) -> Seq2SeqConfig:
    """config.json of M2M100 and NLLB: mBART with computed positions, no norm after the embeddings and no bias of the logits.

    Arguments and errors as for bart_config.
    """
    fields = Fields(raw, where)
    return _config(
        raw,
        where,
        positions="fairseq",
        position_offset=fields.integer("pad_token_id", 1, minimum=0, maximum=MOST_COMPUTED) + 1,
        embedding_norm=False,
        pre_norm=True,
        logit_bias=False,
        activation=fields.choice("activation_function", ACTIVATIONS, "relu"),
        embedding_scale=fields.integer("d_model") ** 0.5 if fields.flag("scale_embedding", True) else 1.0,
        attention_dropout=fields.rate("attention_dropout", 0.1),
    )


def fields_of(cfg: Seq2SeqConfig) -> dict[str, Any] | None:
    """The config.json of a model that was not loaded from a file: Marian's, or with pre-norm Pegasus'.

    The inverse of marian_config and pegasus_config, except for initialisation; None where neither family has such a model.
    """
    fields: dict[str, Any] = {
        "is_encoder_decoder": True,
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tied,
        "d_model": cfg.hidden_size,
        "encoder_layers": cfg.encoder_layers,
        "num_hidden_layers": cfg.encoder_layers,
        "decoder_layers": cfg.decoder_layers,
        "encoder_attention_heads": cfg.encoder_heads,
        "decoder_attention_heads": cfg.decoder_heads,
        "encoder_ffn_dim": cfg.encoder_feed_forward,
        "decoder_ffn_dim": cfg.decoder_feed_forward,
        "max_position_embeddings": cfg.max_positions,
        "activation_function": cfg.activation,
        "scale_embedding": cfg.embedding_scale != 1.0,
        "dropout": cfg.dropout,
        "attention_dropout": cfg.attention_dropout,
        "activation_dropout": cfg.activation_dropout,
        "static_position_embeddings": True,
        "normalize_before": cfg.pre_norm,
    }
    if cfg.pre_norm:
        fields["model_type"] = "pegasus"
        config = pegasus_config(fields, "config.json")
    else:
        tables = {"decoder_vocab_size": cfg.decoder_vocab_size, "share_encoder_decoder_embeddings": cfg.shared_table}
        fields |= {"model_type": "marian", **tables}
        config = marian_config(fields, "config.json")
    return fields if dataclasses.replace(config, **_UNTRAINED) == dataclasses.replace(cfg, **_UNTRAINED) else None


# Fields without an effect on a model that already has its parameters.
_UNTRAINED: dict[str, Any] = {
    "initializer_range": 0.02,
    "scaled_init": False,
    "embedding_range": None,
    "num_labels": 2,
    "decoder_start_token_id": 0,
    "eos_token_id": 0,
}


def build(cfg: Seq2SeqConfig, kind: str | None, dtype: Any) -> Seq2Seq:
    """The encoder, with the decoder or classifier of the given kind, if any."""
    trunk = Seq2SeqEncoder(cfg, dtype)
    if kind == "sequence_classification":
        return Seq2Seq(trunk, RowClassifier(cfg, dtype))
    return Seq2Seq(trunk, Decoder(cfg, dtype) if kind == "seq2seq_lm" else None)


def names(path: str, cfg: Seq2SeqConfig) -> list[str]:
    """Tensor names of a parameter."""
    if path == TABLE:
        shared, separate = "shared.weight", "encoder.embed_tokens.weight"
        return [shared, separate] if cfg.reads_trunk_table else [separate, shared]
    if path == "head/final_logits_bias":
        return ["final_logits_bias"]
    return translate(path.replace("head/decoder/", "head/"), NAMES)


def table(cfg: Seq2SeqConfig) -> str:
    """Our path of the table that a tied output reads."""
    return TABLE if cfg.reads_trunk_table else "head/embeddings/word/embedding"


def spare_table(params: Any, cfg: Seq2SeqConfig) -> Mapping[str, np.ndarray]:
    """The further table that transformers 5 expects, but never reads, where the output is not tied."""
    if "head" not in params or cfg.reads_trunk_table or not cfg.shared_table:
        return {}
    return {"model.shared.weight": params["trunk"]["embeddings"]["word"]["embedding"]}


def with_positions(params: Any, cfg: Seq2SeqConfig) -> Mapping[str, np.ndarray]:
    """Pegasus' files contain the computed positions; transformers reports them as missing otherwise."""
    sides = ("encoder", "decoder") if "head" in params else ("encoder",)
    table_PxH = sinusoidal_table(cfg.max_positions or 0, cfg.hidden_size)
    return {f"model.{side}.embed_positions.weight": table_PxH for side in sides} | dict(spare_table(params, cfg))


BART = Family(
    model_types=("bart",),
    config=bart_config,
    build=build,
    names=names,
    heads={
        "BartForConditionalGeneration": "seq2seq_lm",
        "BartModel": "seq2seq_lm",
        "BartForSequenceClassification": "sequence_classification",
    },
    base=None,
    prefix="model.",
    untied=("lm_head.weight",),
    table=table,
    # Copies of the tied table, and version numbers of fairseq.
    ignored=r"lm_head\.weight|(model\.)?(shared|(en|de)coder\.embed_tokens)\.weight|(model\.)?(en|de)coder\.version",
    defaults={"head/final_logits_bias": 0.0},
    extra=spare_table,
    inputs=("decoder_input_ids",),
)
MBART = BART._replace(
    model_types=("mbart",),
    config=mbart_config,
    heads={"MBartForConditionalGeneration": "seq2seq_lm", "MBartModel": "seq2seq_lm"},
)
MARIAN = BART._replace(
    model_types=("marian",),
    config=marian_config,
    heads={"MarianMTModel": "seq2seq_lm", "MarianModel": "seq2seq_lm"},
    ignored=rf"{BART.ignored}|(model\.)?(en|de)coder\.embed_positions\.weight",
)
PEGASUS = BART._replace(
    model_types=("pegasus",),
    config=pegasus_config,
    heads={"PegasusForConditionalGeneration": "seq2seq_lm", "PegasusModel": "seq2seq_lm"},
    ignored=MARIAN.ignored,
    extra=with_positions,
)
M2M = BART._replace(
    model_types=("m2m_100",),
    config=m2m_config,
    heads={"M2M100ForConditionalGeneration": "seq2seq_lm", "M2M100Model": "seq2seq_lm"},
    ignored=rf"{BART.ignored}|(model\.)?(en|de)coder\.embed_positions\.weights?",
    defaults={},
)
