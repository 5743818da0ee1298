"""ModernBERT (Warner et al. 2024): the configuration in its two forms, and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.models.checkpoint_heads import EncoderModel, MaskedLMHead
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.models.modernbert import LabelHead, MeanPooler, ModernBert, ModernBertConfig, output_init
from mtl_jax.pretrained.family import Family, Fields, translate

GLOBAL, LOCAL = "full_attention", "sliding_attention"

# Our module path to the file's; {} is the number of a layer.
NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk/embeddings/word": "embeddings.tok_embeddings",
    "trunk/embeddings/norm": "embeddings.norm",
    "trunk/layer_{}/attention_norm": "layers.{}.attn_norm",
    "trunk/layer_{}/attention/query_key_value": "layers.{}.attn.Wqkv",
    "trunk/layer_{}/attention/output": "layers.{}.attn.Wo",
    "trunk/layer_{}/feed_forward_norm": "layers.{}.mlp_norm",
    "trunk/layer_{}/feed_forward_in": "layers.{}.mlp.Wi",
    "trunk/layer_{}/feed_forward_out": "layers.{}.mlp.Wo",
    "trunk/final_norm": "final_norm",
    "head/transform": "head.dense",
    "head/norm": "head.norm",
    "head/classifier": "classifier",
    "head/decoder": "decoder",
}


def config(raw: Mapping[str, Any], where: str) -> ModernBertConfig:
    """config.json to ModernBertConfig, in the form of transformers 5 (layer_types, rope_parameters) or that before it.

    Args:
        raw: The parsed file.
        where: Its name, for errors.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.heads_divide(hidden, heads)
    if hidden // heads % 2:
        raise UserError(f"{where}: attention heads of size {hidden // heads}; rotary positions need an even size")
    return ModernBertConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=heads,
        intermediate_size=fields.integer("intermediate_size"),
        global_layers=_global_layers(fields),
        window=fields.integer("local_attention", 128) // 2,
        global_theta=_theta(fields, GLOBAL),
        local_theta=_theta(fields, LOCAL),
        max_length=fields.integer("max_position_embeddings", 8192),
        activation=fields.choice("hidden_activation", ACTIVATIONS, "gelu"),
        layer_norm_eps=fields.number("norm_eps", 1e-5),
        norm_bias=fields.flag("norm_bias", False),
        attention_bias=fields.flag("attention_bias", False),
        feed_forward_bias=fields.flag("mlp_bias", False),
        embedding_dropout=fields.rate("embedding_dropout", 0.0),
        attention_dropout=fields.rate("attention_dropout", 0.0),
        feed_forward_dropout=fields.rate("mlp_dropout", 0.0),
        initializer_range=fields.number("initializer_range", 0.02),
        mean_pooling=fields.choice("classifier_pooling", ("cls", "mean"), "cls") == "mean",
        head_activation=fields.choice("classifier_activation", ACTIVATIONS, "gelu"),
        head_bias=fields.flag("classifier_bias", False),
        head_dropout=fields.rate("classifier_dropout", 0.0),
        decoder_bias=fields.flag("decoder_bias", True),
        num_labels=fields.num_labels(),
        tied=fields.flag("tie_word_embeddings", True),
    )


def _global_layers(fields: Fields) -> tuple[bool, ...]:
    layers = fields.layers("num_hidden_layers")
    types = fields.get("layer_types", None)
    if types is None:
        every = fields.integer("global_attn_every_n_layers", 3)
        return tuple(i % every == 0 for i in range(layers))
    if not isinstance(types, list) or len(types) != layers or not all(kind in (GLOBAL, LOCAL) for kind in types):
        raise UserError(f"{fields.where}: layer_types must be {layers} times {GLOBAL} or {LOCAL}")
    return tuple(kind == GLOBAL for kind in types)


def _theta(fields: Fields, kind: str) -> float:
    older = {GLOBAL: fields.number("global_rope_theta", 160_000.0)}
    # null in the older form: local layers rotate as global ones do.
    unset = older[GLOBAL] if "local_rope_theta" in fields.raw else 10_000.0
    older[LOCAL] = fields.number("local_rope_theta", unset)
    parameters = fields.get("rope_parameters", {})
    if not isinstance(parameters, Mapping) or not isinstance(parameters.get(kind) or {}, Mapping):
        raise UserError(f"{fields.where}: rope_parameters must be an object with {GLOBAL} and {LOCAL}")
    scaling = fields.get("rope_scaling", {})
    nested = Fields(parameters.get(kind) or {}, f"{fields.where}, rope_parameters, {kind}")
    if scaling or nested.get("rope_type", "default") != "default":
        raise UserError(f"{fields.where}: scaled rotary positions (rope_scaling, rope_type) are not supported")
    theta = nested.number("rope_theta", older[kind])
    if theta <= 0:
        raise UserError(f"{nested.where}: rope_theta is {theta}; it must be above 0")
    return theta


def build(cfg: ModernBertConfig, kind: str | None, dtype: Any) -> EncoderModel:
    """ModernBERT with a head of the given kind."""
    trunk = ModernBert(cfg, dtype)
    if kind is None:
        return EncoderModel(trunk)
    if kind == "masked_lm":
        head = MaskedLMHead(
            cfg.vocab_size,
            cfg.hidden_size,
            cfg.head_activation,
            cfg.layer_norm_eps,
            dtype,
            output_init(cfg),
            tied=cfg.tied,
            use_bias=cfg.decoder_bias,
            transform_bias=cfg.head_bias,
            norm_bias=cfg.norm_bias,
        )
        return EncoderModel(trunk, head=head)
    per_row = kind == "sequence_classification"
    pooler = MeanPooler() if per_row and cfg.mean_pooling else None
    return EncoderModel(trunk, pooler, LabelHead(cfg, dtype, per_token=not per_row))


def text_vector(cfg: ModernBertConfig) -> str:
    """The vector of a text that its classifier reads."""
    return "mean" if cfg.mean_pooling else "first"


def names(path: str, cfg: ModernBertConfig) -> list[str]:
    """Tensor names of a parameter."""
    return ["decoder.bias"] if path == "head/bias" else translate(path, NAMES)


MODERNBERT = Family(
    model_types=("modernbert",),
    config=config,
    build=build,
    names=names,
    heads={
        "ModernBertForSequenceClassification": "sequence_classification",
        "ModernBertForTokenClassification": "token_classification",
        "ModernBertForQuestionAnswering": "question_answering",
        "ModernBertForMaskedLM": "masked_lm",
    },
    base="ModernBertModel",
    prefix="model.",
    untied=("decoder.weight",),
    ignored=r"(.*\.)?position_ids|(.*\.)?rotary_emb\..*|decoder\.weight",
    text_vector=text_vector,
)
