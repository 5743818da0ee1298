"""T5 (Raffel et al. 2020), T5 1.1 and Flan (gated), mT5 (Xue et al. 2021) and UMT5 (Chung et al. 2023): config.json and tensor
names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder_decoder import Seq2Seq, Seq2SeqEncoder
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.models.seq2seq_decoder import Decoder
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.pretrained.family import MOST_COMPUTED, TABLE, Family, Fields, translate

_ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}


def _names(gated: bool) -> dict[str, str | tuple[str, ...]]:
    """Our module path to the file's; {} is the number of a layer."""
    table: dict[str, str | tuple[str, ...]] = {"head/lm_head": "lm_head"}
    for ours, theirs, sublayers in (("trunk", "encoder", 2), ("head", "decoder", 3)):
        layer, block = f"{ours}/layer_{{}}", f"{theirs}.block.{{}}.layer"
        for name, letter in _ATTENTION.items():
            table[f"{layer}/attention/{name}"] = f"{block}.0.SelfAttention.{letter}"
            table[f"{layer}/cross_attention/{name}"] = f"{block}.1.EncDecAttention.{letter}"
        feed_forward = f"{block}.{sublayers - 1}.DenseReluDense"
        table |= {
            # Only block 0 has the bias of relative positions, and the others share it; in UMT5 each block has one.
            f"{ours}/relative_bias/table": f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{layer}/relative_bias/table": f"{block}.0.SelfAttention.relative_attention_bias",
            f"{layer}/attention_norm": f"{block}.0.layer_norm",
            f"{layer}/cross_attention_norm": f"{block}.1.layer_norm",
            f"{layer}/feed_forward_in": f"{feed_forward}.wi_0" if gated else f"{feed_forward}.wi",
            f"{layer}/feed_forward_gate": f"{feed_forward}.wi_1",
            f"{layer}/feed_forward_out": f"{feed_forward}.wo",
            f"{layer}/feed_forward_norm": f"{block}.{sublayers - 1}.layer_norm",
            f"{ours}/norm": f"{theirs}.final_layer_norm",
        }
    return table


NAMES = {gated: _names(gated) for gated in (False, True)}


def _config(raw: Mapping[str, Any], where: str, activation: str, scaled: bool) -> Seq2SeqConfig:
    fields = Fields(raw, where)
    hidden, heads = fields.integer("d_model"), fields.integer("num_heads")
    layers, width = fields.layers("num_layers"), fields.integer("d_ff")
    vocab_size, dropout = fields.integer("vocab_size"), fields.rate("dropout_rate", 0.1)
    buckets = fields.integer("relative_attention_num_buckets", 32, minimum=4)
    distance = fields.integer("relative_attention_max_distance", 128, maximum=MOST_COMPUTED)
    if distance <= buckets // 2:
        raise UserError(
            f"{where}: relative_attention_max_distance is {distance}; it must be above half of the {buckets} buckets"
        )
    activation = fields.choice("feed_forward_proj", (*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)), activation)
    gated = activation.startswith("gated-")
    # "gated-gelu" has always meant the tanh form.
    activation = "gelu_new" if activation == "gated-gelu" else activation.removeprefix("gated-")
    return Seq2SeqConfig(
        vocab_size=vocab_size,
        decoder_vocab_size=vocab_size,
        hidden_size=hidden,
        encoder_layers=layers,
        decoder_layers=fields.layers("num_decoder_layers", layers),
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_feed_forward=width,
        decoder_feed_forward=width,
        max_positions=None,
        head_size=fields.integer("d_kv"),
        positions="relative",
        num_buckets=buckets,
        max_distance=distance,
        activation=activation,
        gated=gated,
        use_bias=False,
        norm="rms",
        layer_norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        pre_norm=True,
        embedding_norm=False,
        attention_scale=1.0,
        logit_scale=hidden**-0.5 if scaled else 1.0,
        logit_bias=False,
        # Published 1.1 and mT5 files have a separate output matrix and say so, but transformers 5 writes "tied" in any case:
        # the presence of the matrix in the file decides.
        tied=True,
        shared_if_untied=True,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        drop_output=True,
        initializer_range=fields.number("initializer_factor", 1.0),
        scaled_init=True,
        num_labels=fields.num_labels(),
    )


def t5_config(raw: Mapping[str, Any], where: str) -> Seq2SeqConfig:
    """config.json of T5 1.0, T5 1.1 and Flan.

    Args:
        raw: The parsed file.
        where: Its name, for errors.

    Raises:
        UserError: A field is missing, or its value has no counterpart here.
    """
    fields = Fields(raw, where)
    # Only T5 1.0 scales. transformers 5 has a field for it; in older files a separate output matrix means T5 1.1.
    scaled = fields.flag("scale_decoder_outputs", fields.flag("tie_word_embeddings", True))
    return _config(raw, where, "relu", scaled)


def mt5_config(raw: Mapping[str, Any], where: str) -> Seq2SeqConfig:
    """config.json of mT5: T5 1.1 over another vocabulary. Arguments and errors as for t5_config."""
    return _config(raw, where, "gated-gelu", scaled=False)


def umt5_config(raw: Mapping[str, Any], where: str) -> Seq2SeqConfig:
    """config.json of UMT5: mT5 with a bias of relative positions in each block. Arguments and errors as for t5_config.

    tie_word_embeddings says whether the output is scaled. The published files say false; transformers 5 scales them all the
    same, which changes no greedy search, but losses and beams.
    """
    config = _config(raw, where, "gated-gelu", Fields(raw, where).flag("tie_word_embeddings", True))
    return dataclasses.replace(config, positions="block_relative")


def build(cfg: Seq2SeqConfig, kind: str | None, dtype: Any) -> Seq2Seq:
    """The encoder, and for seq2seq_lm the decoder on it."""
    return Seq2Seq(Seq2SeqEncoder(cfg, dtype), Decoder(cfg, dtype) if kind == "seq2seq_lm" else None)


def names(path: str, cfg: Seq2SeqConfig) -> list[str]:
    """Tensor names of a parameter."""
    if path == TABLE:
        return ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    return translate(path, NAMES[cfg.gated])


def constants(cfg: Seq2SeqConfig) -> dict[str, Any]:
    """Without this field transformers 5 guesses from tie_word_embeddings whether the output is scaled."""
    return {"scale_decoder_outputs": cfg.logit_scale != 1.0}


T5 = Family(
    model_types=("t5",),
    config=t5_config,
    build=build,
    names=names,
    heads={"T5ForConditionalGeneration": "seq2seq_lm", "T5Model": "seq2seq_lm", "T5WithLMHeadModel": "seq2seq_lm"},
    base="T5EncoderModel",
    untied=("lm_head.weight",),
    # Copies of the tied table, and a bias that old files have for cross-attention, where there is none.
    ignored=r"lm_head\.weight|(shared|(en|de)coder\.embed_tokens)\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    constants=constants,
    inputs=("decoder_input_ids",),
)
MT5 = T5._replace(
    model_types=("mt5",),
    config=mt5_config,
    heads={"MT5ForConditionalGeneration": "seq2seq_lm", "MT5Model": "seq2seq_lm"},
    base="MT5EncoderModel",
    constants=lambda cfg: {},
)
UMT5 = T5._replace(
    model_types=("umt5",),
    config=umt5_config,
    heads={"UMT5ForConditionalGeneration": "seq2seq_lm", "UMT5Model": "seq2seq_lm"},
    base="UMT5EncoderModel",
    constants=lambda cfg: {"tie_word_embeddings": cfg.logit_scale != 1.0},
)
