"""A decoder that starts as an encoder: its layers are initialised with the encoder's.

Reference: S. Rothe et al., Leveraging Pre-trained Checkpoints for Sequence Generation Tasks, 2020.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.models.encoder import EncoderConfig
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig


def decoder_like(cfg: EncoderConfig, layers: int, positions: int, dropout: float) -> Seq2SeqConfig:
    """Sizes and constants of a decoder with an encoder's blocks, and cross-attention in each.

    Args:
        cfg: The encoder's configuration; its token vectors are as wide as its layers.
        layers: Number of the decoder's layers.
        positions: Most tokens that it reads; not more than the encoder's.
        dropout: Rate after embeddings and after each part of a block.
    """
    return Seq2SeqConfig(
        vocab_size=cfg.vocab_size,
        decoder_vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        encoder_layers=1,
        decoder_layers=layers,
        encoder_heads=cfg.num_heads,
        decoder_heads=cfg.num_heads,
        encoder_feed_forward=cfg.intermediate_size,
        decoder_feed_forward=cfg.intermediate_size,
        max_positions=positions,
        position_offset=0,
        activation=cfg.activation,
        layer_norm_eps=cfg.layer_norm_eps,
        dropout=dropout,
        initializer_range=cfg.initializer_range,
    )


def spread_layers(layers: int, encoder_layers: int) -> list[int]:
    """The numbers of the encoder's layers that become the decoder's, evenly from the first to the last.

    Args:
        layers: Number of the decoder's layers, at most encoder_layers.
        encoder_layers: Number of the encoder's layers.
    """
    return [round(i * (encoder_layers - 1) / max(layers - 1, 1)) for i in range(layers)]


def decoder_params(fresh: Any, trunk: Any, cfg: EncoderConfig) -> Any:
    """The parameters of a decoder_like() decoder that starts as the encoder.

    Self-attention, feed-forward and their norms are those of the encoder's layers, and cross-attention starts as their
    self-attention. The encoder's vector of token type 0 is added to the position vectors.

    Args:
        fresh: The decoder's parameters: their shapes are kept, and the values of those that an encoder does not have.
        trunk: The encoder's parameters.
        cfg: The encoder's configuration.

    Returns:
        A tree of the shapes of fresh.
    """
    layers = sum(name.startswith("layer_") for name in fresh)
    embeddings, positions = trunk["embeddings"], len(fresh["embeddings"]["position"]["embedding"])
    first = cfg.first_position
    position_PxH = embeddings["position"]["embedding"][first : first + positions]
    if "token_type" in embeddings:
        position_PxH = position_PxH + embeddings["token_type"]["embedding"][0]
    params = dict(fresh)
    params["embeddings"] = {"position": {"embedding": position_PxH}, "norm": embeddings["norm"]}
    for number, layer in enumerate(spread_layers(layers, cfg.num_layers)):
        block = trunk[f"layer_{layer}"]
        cross = {"cross_attention": block["attention"], "cross_attention_norm": block["attention_norm"]}
        params[f"layer_{number}"] = {**block, **cross}
    return jax.tree.map(jnp.array, params)  # copies: the step donates its buffers
