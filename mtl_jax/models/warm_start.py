"""A decoder that starts as an encoder: its layers are the encoder's (Rothe et al., 2020: Leveraging Pre-trained Checkpoints for
Sequence Generation Tasks).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.models.encoder import EncoderConfig
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig


def decoder_like(cfg: EncoderConfig, layers: int, positions: int, dropout: float) -> Seq2SeqConfig:
    """Sizes and constants of a decoder whose blocks are those of an encoder, with cross-attention in between.

    Args:
        cfg: The encoder's; its token vectors are as wide as its layers.
        layers: Of the decoder.
        positions: Most tokens that it reads; no more than the encoder's.
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


def chosen(layers: int, of: int) -> list[int]:
    """The numbers of the encoder's layers that become the decoder's, evenly from the first to the last.

    Args:
        layers: Of the decoder, at most as many as the encoder has.
        of: Of the encoder.
    """
    return [round(i * (of - 1) / max(layers - 1, 1)) for i in range(layers)]


def decoder_params(fresh: Any, trunk: Any, cfg: EncoderConfig) -> Any:
    """The parameters of a decoder_like() decoder that starts as the encoder.

    Self-attention, feed-forward and their norms are those of the encoder's layers, and cross-attention starts as their
    self-attention; positions have the encoder's vectors for the first kind of token added.

    Args:
        fresh: The decoder's parameters, of which shapes are taken, and what an encoder has not.
        trunk: The encoder's.
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
    found = dict(fresh)
    found["embeddings"] = {"position": {"embedding": position_PxH}, "norm": embeddings["norm"]}
    for number, layer in enumerate(chosen(layers, cfg.num_layers)):
        block = trunk[f"layer_{layer}"]
        across = {"cross_attention": block["attention"], "cross_attention_norm": block["attention_norm"]}
        found[f"layer_{number}"] = {**block, **across}
    return jax.tree.map(jnp.array, found)  # copies: the step donates its buffers
