"""BERT-family checkpoints: config.json and tensor names to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_jax.errors import UserError, unknown
from mtl_jax.models.encoder import ACTIVATIONS, EncoderConfig

MODEL_TYPES = ("bert",)
PREFIXES = ("", "bert.")

# Our module path to the checkpoint's, inside one layer and outside.
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward_in": "intermediate.dense",
    "feed_forward_out": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
}
# Our leaf name to the checkpoint's; older files say gamma and beta.
_LEAVES = {"embedding": ("weight",), "kernel": ("weight",), "scale": ("weight", "gamma"), "bias": ("bias", "beta")}


def config(raw: Mapping[str, Any], where: str) -> EncoderConfig:
    """config.json to EncoderConfig.

    Args:
        raw: The parsed file.
        where: Its name, for errors.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    if raw.get("model_type") not in MODEL_TYPES:
        raise unknown(f"model_type in {where}:", str(raw.get("model_type")), MODEL_TYPES)
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{where}: position_embedding_type {raw['position_embedding_type']!r} is not supported")
    if raw.get("hidden_act", "gelu") not in ACTIVATIONS:
        raise unknown(f"hidden_act in {where}:", raw["hidden_act"], ACTIVATIONS)
    try:
        return EncoderConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            intermediate_size=raw["intermediate_size"],
            max_positions=raw["max_position_embeddings"],
            type_vocab_size=raw.get("type_vocab_size", 2),
            activation=raw.get("hidden_act", "gelu"),
            layer_norm_eps=raw.get("layer_norm_eps", 1e-12),
            dropout=raw.get("hidden_dropout_prob", 0.1),
            attention_dropout=raw.get("attention_probs_dropout_prob", 0.1),
            initializer_range=raw.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise UserError(f"{where}: the field {error} is missing") from error


def candidates(path: str) -> list[str]:
    """The names a parameter of ours may have in a checkpoint, the usual one first.

    Args:
        path: For example "layer_0/attention/query/kernel".
    """
    module, leaf = path.rsplit("/", 1)
    if module in _EMBEDDINGS:
        stem = _EMBEDDINGS[module]
    else:
        layer, _, rest = module.partition("/")
        stem = f"encoder.layer.{layer.removeprefix('layer_')}.{_LAYER[rest]}"
    return [f"{prefix}{stem}.{name}" for prefix in PREFIXES for name in _LEAVES[leaf]]
