"""NomicBERT (Nussbaum et al. 2024) and GTE (Zhang et al. 2024): the configuration, and tensor names.

Names are those of the published files, which transformers writes, too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mtl_jax.core.errors import UserError
from mtl_jax.models.checkpoint_heads import EncoderModel, MaskedLMHead, Pooler, SequenceHead, TokenHead
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.models.rotary_encoder import RotaryEncoder, RotaryEncoderConfig
from mtl_jax.pretrained import bert
from mtl_jax.pretrained.family import Family, Fields, brief, translate

NOMIC_NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/embeddings/norm": ("emb_ln", "embeddings.LayerNorm"),
    "trunk/layer_{}/attention/query_key_value": "encoder.layers.{}.attn.Wqkv",
    "trunk/layer_{}/attention/output": "encoder.layers.{}.attn.out_proj",
    "trunk/layer_{}/attention_norm": "encoder.layers.{}.norm1",
    "trunk/layer_{}/feed_forward_in": "encoder.layers.{}.mlp.fc11",
    "trunk/layer_{}/feed_forward_gate": "encoder.layers.{}.mlp.fc12",
    "trunk/layer_{}/feed_forward_out": "encoder.layers.{}.mlp.fc2",
    "trunk/layer_{}/feed_forward_norm": "encoder.layers.{}.norm2",
    "head/norm": ("cls.predictions.transform.layer_norm", "cls.predictions.transform.LayerNorm"),
}
GTE_NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/layer_{}/attention/query_key_value": "encoder.layer.{}.attention.qkv_proj",
    "trunk/layer_{}/attention/output": "encoder.layer.{}.attention.o_proj",
    "trunk/layer_{}/attention_norm": "encoder.layer.{}.attn_ln",
    "trunk/layer_{}/feed_forward_in": "encoder.layer.{}.mlp.up_gate_proj",
    "trunk/layer_{}/feed_forward_out": "encoder.layer.{}.mlp.down_proj",
    "trunk/layer_{}/feed_forward_norm": "encoder.layer.{}.mlp_ln",
    "head/transform": "lm_head.dense",
    "head/norm": "lm_head.norm",
    "head/decoder": "lm_head.decoder",
    "head": "lm_head.decoder",
}
# Fields of NomicBERT's published config.json -> their names in transformers.
OLDER = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
}
# The only values of further such fields that have a counterpart here.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("swiglu",),
    "prenorm": (False,),
    "parallel_block": (False,),
    "causal": (False,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "use_rms_norm": (False,),
    "rotary_emb_fraction": (1, 1.0),
    "rotary_emb_interleaved": (False,),
    "rotary_scaling_factor": (),
    "rotary_emb_scale_base": (),
}


def nomic_config(raw: Mapping[str, Any], where: str) -> RotaryEncoderConfig:
    """NomicBERT's config.json, in the form of transformers or that of the published files.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    if "n_embd" in raw:
        for name, allowed in FIXED.items():
            if raw.get(name) is not None and raw[name] not in allowed:
                raise UserError(f"{where}: {name} is {brief(raw[name])}; {allowed[0] if allowed else 'none'} is supported")
        raw = {OLDER.get(name, name): value for name, value in raw.items()}
    return _config(raw, where, theta=1000.0, types=2, activation="silu", dropout=0.0)


def gte_config(raw: Mapping[str, Any], where: str) -> RotaryEncoderConfig:
    """GTE's config.json.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    return _config(
        raw,
        where,
        theta=160_000.0,
        types=1,
        activation="gelu",
        dropout=0.1,
        feed_forward_dropout=Fields(raw, where).rate("hidden_dropout_prob", 0.1),
        joined_gate=True,
        attention_bias=True,
        output_bias=True,
    )


def _config(
    raw: Mapping[str, Any], where: str, *, theta: float, types: int, activation: str, dropout: float, **further: Any
) -> RotaryEncoderConfig:
    """A config.json with the family's defaults."""
    fields = Fields(raw, where)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.heads_divide(hidden, heads)
    size = hidden // heads
    if size % 2:
        raise UserError(f"{where}: attention heads of size {size}; rotary positions need an even size")
    if fields.integer("head_dim", size) != size:
        raise UserError(f"{where}: head_dim is {raw['head_dim']}; it must be {size}, as hidden_size and the heads say")
    dropout = fields.rate("hidden_dropout_prob", dropout)
    return RotaryEncoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=heads,
        intermediate_size=fields.integer("intermediate_size"),
        max_length=fields.integer("max_position_embeddings"),
        theta=_theta(fields, theta),
        type_vocab_size=fields.integer("type_vocab_size", types, minimum=0),
        activation=fields.choice("hidden_act", ACTIVATIONS, activation),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-12),
        dropout=dropout,
        attention_dropout=fields.rate("attention_probs_dropout_prob", 0.0),
        head_dropout=fields.rate("classifier_dropout", dropout),
        initializer_range=fields.number("initializer_range", 0.02),
        num_labels=fields.num_labels(),
        tied=fields.flag("tie_word_embeddings", True),
        **further,
    )


def _theta(fields: Fields, default: float) -> float:
    parameters = fields.get("rope_parameters", {})
    if not isinstance(parameters, Mapping):
        raise UserError(f"{fields.where}: rope_parameters is {brief(parameters)}; it must be an object")
    nested = Fields(parameters, f"{fields.where}, rope_parameters")
    if fields.get("rope_scaling", {}) or nested.get("rope_type", "default") != "default":
        raise UserError(f"{fields.where}: scaled rotary positions (rope_scaling, rope_type) are not supported")
    theta = nested.number("rope_theta", fields.number("rope_theta", default))
    if theta <= 0:
        raise UserError(f"{fields.where}: rope_theta is {theta}; it must be above 0")
    return theta


def build(cfg: RotaryEncoderConfig, kind: str | None, dtype: Any, *, lm_activation: str | None = None) -> EncoderModel:
    """An encoder with a head of the given kind; only sequence classification has a pooler."""
    trunk, init = RotaryEncoder(cfg, dtype), nn.initializers.normal(cfg.initializer_range)
    if kind is None:
        return EncoderModel(trunk)
    if kind == "sequence_classification":
        return EncoderModel(trunk, Pooler(dtype, init), SequenceHead(cfg.num_labels, dtype, init, cfg.head_dropout))
    if kind == "masked_lm":
        activation = lm_activation or cfg.activation
        head = MaskedLMHead(cfg.vocab_size, cfg.hidden_size, activation, cfg.layer_norm_eps, dtype, init, cfg.tied)
        return EncoderModel(trunk, head=head)
    return EncoderModel(trunk, head=TokenHead(cfg.num_labels, dtype, init, cfg.head_dropout))


def nomic_names(path: str, cfg: RotaryEncoderConfig) -> list[str]:
    """Tensor names of a parameter of NomicBERT."""
    if path == "head/bias":
        return bert.lm_bias(cfg, "cls.predictions.bias", "cls.predictions.decoder.bias")
    return translate(path, bert.TRUNK | bert.LABELS | bert.LM | NOMIC_NAMES)


def gte_names(path: str, cfg: RotaryEncoderConfig) -> list[str]:
    """Tensor names of a parameter of GTE."""
    return translate(path, bert.TRUNK | bert.LABELS | GTE_NAMES)


def nomic_fields(cfg: RotaryEncoderConfig) -> dict[str, Any]:
    """The fields of config.json by the names that transformers reads, for files with the older names."""
    return {
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_length,
        "layer_norm_eps": cfg.layer_norm_eps,
        "hidden_act": cfg.activation,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.theta},
    }


NOMIC_BERT = Family(
    model_types=("nomic_bert",),
    config=nomic_config,
    build=build,
    names=nomic_names,
    heads={
        "NomicBertForSequenceClassification": "sequence_classification",
        "NomicBertForTokenClassification": "token_classification",
        "NomicBertForMaskedLM": "masked_lm",
    },
    base="NomicBertModel",
    prefix="nomic_bert.",
    untied=("cls.predictions.decoder.weight",),
    ignored=r"(.*\.)?position_ids|(.*\.)?inv_freq|cls\.predictions\.(bias|decoder\.(weight|bias))",
    extra=functools.partial(bert.untied_bias, "cls.predictions.bias"),
    constants=nomic_fields,
)
GTE = Family(
    model_types=("gte",),
    config=gte_config,
    build=functools.partial(build, lm_activation="gelu"),
    names=gte_names,
    heads={
        "GteForSequenceClassification": "sequence_classification",
        "GteForTokenClassification": "token_classification",
        "GteForMaskedLM": "masked_lm",
    },
    base="GteModel",
    prefix="gte.",
    untied=("lm_head.decoder.weight",),
    ignored=r"(.*\.)?position_ids|(.*\.)?inv_freq|lm_head\.decoder\.weight",
)
