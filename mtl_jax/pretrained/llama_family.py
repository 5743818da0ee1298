"""Llama and SmolLM (Touvron et al. 2023), Qwen2, Qwen3 and Gemma 3 without images: config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.models.causal_model import CausalModel, LMHead, ScoreHead
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.models.llama import Llama
from mtl_jax.models.llama_config import LlamaConfig, Rope
from mtl_jax.pretrained.family import Family, Fields, brief, translate

LEAST = 1e-6  # of numbers that are divided by
ROPE_FIELDS = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"}
ROPE_FIELDS |= {"original_max_position_embeddings", "partial_rotary_factor"}
GLOBAL, LOCAL = "full_attention", "sliding_attention"
ROPES = ("default", "linear", "dynamic", "llama3")

# Our module path to the file's; {} is the number of a layer.
NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/embeddings/word": "embed_tokens",
    "trunk/layer_{}/attention_norm": "layers.{}.input_layernorm",
    "trunk/layer_{}/attention/query": "layers.{}.self_attn.q_proj",
    "trunk/layer_{}/attention/key": "layers.{}.self_attn.k_proj",
    "trunk/layer_{}/attention/value": "layers.{}.self_attn.v_proj",
    "trunk/layer_{}/attention/output": "layers.{}.self_attn.o_proj",
    "trunk/layer_{}/attention/query_norm": "layers.{}.self_attn.q_norm",
    "trunk/layer_{}/attention/key_norm": "layers.{}.self_attn.k_norm",
    "trunk/layer_{}/feed_forward_norm": "layers.{}.post_attention_layernorm",
    "trunk/layer_{}/feed_forward_in": "layers.{}.mlp.gate_proj",
    "trunk/layer_{}/feed_forward_gate": "layers.{}.mlp.up_proj",
    "trunk/layer_{}/feed_forward_out": "layers.{}.mlp.down_proj",
    "trunk/final_norm": "norm",
    "head/lm_head": "lm_head",
    "head/score": "score",
}
# Gemma's blocks have norms before and after each part.
GEMMA_NAMES = NAMES | {
    "trunk/layer_{}/attention_post_norm": "layers.{}.post_attention_layernorm",
    "trunk/layer_{}/feed_forward_norm": "layers.{}.pre_feedforward_layernorm",
    "trunk/layer_{}/feed_forward_post_norm": "layers.{}.post_feedforward_layernorm",
}


def _config(raw: Mapping[str, Any], where: str, **changes: Any) -> LlamaConfig:
    """The fields that all of these families have; `changes` are those that a family sets itself."""
    fields = Fields(raw, where)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_size = changes.pop("head_size", None) or fields.integer("head_dim", 0, minimum=0) or hidden // heads
    if head_size % 2 or not head_size:
        raise UserError(f"{where}: attention heads of size {head_size}; rotary positions need an even size")
    kv_heads = changes.pop("kv_heads", None) or fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads is {kv_heads}; it must divide the {heads} attention heads")
    padding = fields.integer("pad_token_id", -1, minimum=-1)
    dropout = fields.rate("classifier_dropout", fields.rate("hidden_dropout", 0.1))
    values: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "max_length": fields.integer("max_position_embeddings", 2048),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "attention_dropout": fields.rate("attention_dropout", 0.0),
        "head_dropout": dropout,
        "initializer_range": fields.number("initializer_range", 0.02),
        "num_labels": fields.num_labels(),
        "tied": fields.flag("tie_word_embeddings", False),
        "pad_token_id": padding if padding >= 0 else None,
    }
    if "activation" not in changes:
        values["activation"] = fields.choice("hidden_act", ACTIVATIONS, "silu")
    return LlamaConfig(**(values | changes))


def _rope(fields: Fields, parameters: Any, theta: float, scaling: Any = None) -> Rope:
    """Rotary positions from rope_parameters (transformers 5), or from rope_theta and rope_scaling before it."""
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"{fields.where}: {name} is {brief(value)}; it must be an object")
        if unread := sorted({*(value or {})} - ROPE_FIELDS):
            raise UserError(f"{fields.where}: {name} has {brief(unread[0])}, which is not read here")
    nested = Fields({**(scaling or {}), **(parameters or {})}, f"{fields.where}, rope_parameters")
    kind = nested.choice("rope_type", ROPES, nested.raw.get("type", "default"))
    if nested.number("partial_rotary_factor", 1.0) != 1.0 or fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{fields.where}: partial_rotary_factor is not 1, which is not supported")
    rope = Rope(theta=nested.number("rope_theta", theta), kind=kind)
    if rope.theta < LEAST:
        raise UserError(f"{nested.where}: rope_theta is {rope.theta}; it must be above 0")
    if kind in ("default", "dynamic"):
        return rope
    factor = nested.number("factor")
    if factor < LEAST:
        raise UserError(f"{nested.where}: factor is {factor}; it must be above 0")
    if kind == "linear":
        return Rope(rope.theta, kind, factor)
    low, high = nested.number("low_freq_factor"), nested.number("high_freq_factor")
    if not 0 < low < high:
        raise UserError(f"{nested.where}: low_freq_factor is {low} and high_freq_factor {high}; the first must be smaller")
    length = fields.integer("max_position_embeddings", 2048)
    return Rope(rope.theta, kind, factor, low, high, nested.integer("original_max_position_embeddings", length))


def _rope_of_all(fields: Fields) -> Rope:
    theta = fields.number("rope_theta", 10_000.0)
    return _rope(fields, fields.get("rope_parameters", None), theta, fields.get("rope_scaling", None))


def _layers(fields: Fields, default: tuple[bool, ...]) -> tuple[bool, ...]:
    types = fields.get("layer_types", None)
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != len(default) or not all(kind in (GLOBAL, LOCAL) for kind in types):
        raise UserError(f"{fields.where}: layer_types must be {len(default)} times {GLOBAL} or {LOCAL}")
    return tuple(kind == GLOBAL for kind in types)


def llama_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """config.json of Llama 1 to 3.2 and SmolLM.

    Args:
        raw: The parsed file.
        where: Its name, for errors.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    rope, bias = _rope_of_all(fields), fields.flag("attention_bias", False)
    return _config(
        raw,
        where,
        global_layers=(True,) * fields.layers("num_hidden_layers"),
        rope=rope,
        local_rope=rope,
        attention_bias=bias,
        output_bias=bias,
        feed_forward_bias=fields.flag("mlp_bias", False),
    )


def _qwen_config(raw: Mapping[str, Any], where: str, **changes: Any) -> LlamaConfig:
    fields = Fields(raw, where)
    layers, rope = fields.layers("num_hidden_layers"), _rope_of_all(fields)
    window = fields.get("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    first_local = fields.integer("max_window_layers", 28, minimum=0)
    global_layers = _layers(fields, tuple(window is None or number < first_local for number in range(layers)))
    if not all(global_layers):
        if window is None:
            raise UserError(f"{where}: layer_types has {LOCAL}, but use_sliding_window is false")
        changes["window"] = fields.integer("sliding_window", 4096)
    return _config(raw, where, global_layers=global_layers, rope=rope, local_rope=rope, **changes)


def qwen2_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """config.json of Qwen2 and Qwen2.5. Arguments and errors as for llama_config."""
    return _qwen_config(raw, where, attention_bias=True, kv_heads=Fields(raw, where).integer("num_key_value_heads", 32))


def qwen3_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """config.json of Qwen3 without experts. Arguments and errors as for llama_config."""
    fields = Fields(raw, where)
    bias, size = fields.flag("attention_bias", False), fields.integer("head_dim", 128)
    return _qwen_config(raw, where, attention_bias=bias, output_bias=bias, query_key_norm=True, head_size=size)


def gemma3_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """config.json of Gemma 3's text models. Arguments and errors as for llama_config."""
    fields = Fields(raw, where)
    if fields.flag("use_bidirectional_attention", False):
        raise UserError(f"{where}: use_bidirectional_attention is true; only decoders are read, whose tokens see no later ones")
    layers, every = fields.layers("num_hidden_layers"), fields.integer("sliding_window_pattern", 6)
    parameters = fields.get("rope_parameters", {})
    if not isinstance(parameters, Mapping) or {*parameters} - {GLOBAL, LOCAL}:
        raise UserError(f"{where}: rope_parameters must be an object with {GLOBAL} and {LOCAL}")
    theta, local_theta = fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4)
    bias, scalar = fields.flag("attention_bias", False), fields.number("query_pre_attn_scalar", 256)
    if scalar < LEAST:
        raise UserError(f"{where}: query_pre_attn_scalar is {scalar}; it must be above 0")
    if fields.get("attn_logit_softcapping", None) is not None:
        raise UserError(
            f"{where}: attn_logit_softcapping is set; transformers reads it and its Gemma 3 does not apply it: set it to null"
        )
    return _config(
        raw,
        where,
        global_layers=_layers(fields, tuple((number + 1) % every == 0 for number in range(layers))),
        window=fields.integer("sliding_window", 4096),
        rope=_rope(fields, parameters.get(GLOBAL), theta, fields.get("rope_scaling", None)),
        local_rope=_rope(fields, parameters.get(LOCAL), local_theta),
        kv_heads=fields.integer("num_key_value_heads", 4),
        head_size=fields.integer("head_dim", 256),
        activation=fields.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        norm_offset=1.0,
        query_key_norm=True,
        post_norms=True,
        attention_bias=bias,
        output_bias=bias,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        attention_scale=scalar**-0.5,
        logit_cap=_cap(fields, "final_logit_softcapping"),
        max_length=fields.integer("max_position_embeddings", 131_072),
        tied=fields.flag("tie_word_embeddings", True),
        pad_token_id=fields.integer("pad_token_id", 0, minimum=0),
    )


def _cap(fields: Fields, name: str) -> float | None:
    cap = fields.get(name, None)
    if cap is None:
        return None
    if fields.number(name) < LEAST:
        raise UserError(f"{fields.where}: {name} is {cap}; it must be above 0, or null for no cap")
    return fields.number(name)


def build(cfg: LlamaConfig, kind: str | None, dtype: Any) -> CausalModel:
    """The trunk with a head of the given kind."""
    trunk = Llama(cfg, dtype)
    if kind is None:
        return CausalModel(trunk)
    if kind == "causal_lm":
        return CausalModel(trunk, LMHead(cfg.vocab_size, cfg.tied, cfg.logit_cap, dtype, cfg.initializer_range))
    per_token = kind == "token_classification"
    rate = cfg.head_dropout if per_token else 0.0
    return CausalModel(trunk, ScoreHead(cfg.num_labels, per_token, dtype, rate, cfg.initializer_range), cfg.pad_token_id)


def names(path: str, cfg: LlamaConfig) -> list[str]:
    """Tensor names of a parameter."""
    return translate(path, GEMMA_NAMES if cfg.post_norms else NAMES)


def text_vector(cfg: LlamaConfig) -> str:
    """The vector of a text that its classifier reads: only the last token sees the whole text."""
    return "last"


def _heads(prefix: str) -> dict[str, str]:
    return {
        f"{prefix}ForCausalLM": "causal_lm",
        f"{prefix}ForSequenceClassification": "sequence_classification",
        f"{prefix}ForTokenClassification": "token_classification",
    }


LLAMA = Family(
    model_types=("llama",),
    config=llama_config,
    build=build,
    names=names,
    heads=_heads("Llama"),
    base="LlamaModel",
    prefix="model.",
    untied=("lm_head.weight",),
    ignored=r"(.*\.)?rotary_emb\..*|lm_head\.weight",
    text_vector=text_vector,
)
QWEN2 = LLAMA._replace(model_types=("qwen2",), config=qwen2_config, heads=_heads("Qwen2"), base="Qwen2Model")
QWEN3 = LLAMA._replace(model_types=("qwen3",), config=qwen3_config, heads=_heads("Qwen3"), base="Qwen3Model")
GEMMA3 = LLAMA._replace(
    model_types=("gemma3_text",),
    config=gemma3_config,
    heads={"Gemma3ForCausalLM": "causal_lm", "Gemma3TextForSequenceClassification": "sequence_classification"},
    base="Gemma3TextModel",
)
