"""Trunks from scratch: a table of word vectors, and a transformer encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cattrs
import flax.linen as nn

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import reason
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.data import vocabulary
from mtl_jax.models.encoder import EmbeddingConfig, SharedEmbedding
from mtl_jax.models.encoder_decoder import Seq2SeqEncoder
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.pretrained.tensor_files import read_json
from mtl_jax.trunks.base import UNBOUNDED, Trunk, TrunkConfig


@dataclasses.dataclass(frozen=True)
class Embedding(TrunkConfig):
    """A shared embedding from scratch over a vocabulary of the training texts' most frequent words.

    Attributes:
        vocabulary: Most words in the vocabulary, padding and unknown included.
        dimension: Width of the embedding.

    Examples:
        >>> mtl_jax.Embedding(vocabulary=5000, dimension=100).dimension
        100
    """

    vocabulary: int = 10_000
    dimension: int = 100

    def module(self, vocab_size: int, dtype: Any) -> nn.Module:
        return SharedEmbedding(EmbeddingConfig(vocab_size, self.dimension), dtype)

    def reopen(self, folder: Path, dtype: Any) -> Trunk:
        tokenizer = pretrained.load_tokenizer(folder)
        return Trunk(SharedEmbedding(_sizes(EmbeddingConfig, folder), dtype), None, tokenizer, UNBOUNDED, None, {})


@dataclasses.dataclass(frozen=True)
class Transformer(TrunkConfig):
    """A transformer encoder from scratch (Vaswani et al., 2017), as Marian and Pegasus have it, over a vocabulary of sub-words.

    The vocabulary is made from the training texts, those of sources and those that tasks generate. A decoder on this encoder
    has the same architecture and sizes.

    Attributes:
        vocabulary: Most sub-words, 4 special tokens and 256 bytes included.
        pieces: bpe or unigram.
        layers: Blocks.
        width: Size of the vectors.
        heads: Attention heads; they divide the width, unless head_size is set.
        feed_forward: Width inside the feed-forward sublayers.
        pre_norm: Whether norms stand before each sublayer, as in Pegasus, not after it; deep models train more easily then.
        activation: Activation inside the feed-forward sublayers.
        dropout: Dropout rate after embeddings and after each sublayer.
        attention_dropout: Dropout rate of the attention probabilities.
        activation_dropout: Dropout rate inside the feed-forward sublayers.
        max_length: Longest text in tokens.
        head_size: Width of a head, as in T5, where heads together are wider than the vectors; 0: width / heads.

    Examples:
        >>> mtl_jax.Transformer(vocabulary=8000, layers=2, width=64, heads=4, feed_forward=128).layers
        2
    """

    vocabulary: int = 8000
    pieces: str = "bpe"
    layers: int = 4
    width: int = 256
    heads: int = 4
    feed_forward: int = 1024
    pre_norm: bool = False
    activation: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    max_length: int = 512
    head_size: int = dataclasses.field(default=0, metadata=ONLY_IF_SET)

    def check(self) -> None:
        for field in ("layers", "width", "heads", "feed_forward", "max_length"):
            if getattr(self, field) < 1:
                raise UserError(f"trunk.{field} is {getattr(self, field)}; it must be at least 1")
        if self.head_size < 0:
            raise UserError(f"trunk.head_size is {self.head_size}; it must not be negative")
        if self.width % self.heads and not self.head_size:
            raise UserError(f"trunk.heads is {self.heads}; it must divide trunk.width, {self.width}")
        for field in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"trunk.{field} is {getattr(self, field)}; it must be at least 0 and below 1")
        for field, choices in (("pieces", vocabulary.KINDS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, field) not in choices:
                raise unknown(f"trunk.{field}", getattr(self, field), choices)

    def module(self, vocab_size: int, dtype: Any) -> nn.Module:
        return Seq2SeqEncoder(_transformer(self, vocab_size), dtype)

    def tokenizer(self, texts: Sequence[str]) -> Any:
        return vocabulary.train(texts, self.pieces, self.vocabulary)

    def build(self, texts: Sequence[str], dtype: Any, *, decodes: bool = False) -> Trunk:
        trunk = super().build(texts, dtype)
        return trunk._replace(decoder=trunk.module.config)

    def reopen(self, folder: Path, dtype: Any) -> Trunk:
        tokenizer = pretrained.load_tokenizer(folder)
        sizes = _sizes(Seq2SeqConfig, folder)
        return Trunk(Seq2SeqEncoder(sizes, dtype), None, tokenizer, self.max_length, None, {}, sizes)


def _transformer(config: Transformer, vocab_size: int) -> Seq2SeqConfig:
    """Sizes with Marian's constants and T5's initialisation, which scales with the width."""
    return Seq2SeqConfig(
        vocab_size=vocab_size,
        decoder_vocab_size=vocab_size,
        hidden_size=config.width,
        encoder_layers=config.layers,
        decoder_layers=config.layers,
        encoder_heads=config.heads,
        decoder_heads=config.heads,
        encoder_feed_forward=config.feed_forward,
        decoder_feed_forward=config.feed_forward,
        max_positions=config.max_length,
        head_size=config.head_size or None,
        positions="sinusoidal",
        position_offset=0,
        activation=config.activation,
        pre_norm=config.pre_norm,
        embedding_norm=False,
        embedding_scale=config.width**0.5,
        embedding_range=config.width**-0.5,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        initializer_range=1.0,
        scaled_init=True,
    )


def _sizes(kind: type[Any], folder: Path) -> Any:
    """The sizes in trunk.json.

    Raises:
        UserError: The file is damaged or is not that of such a trunk.
    """
    try:
        return cattrs.Converter(forbid_extra_keys=True).structure(read_json(folder, "trunk.json"), kind)
    except (cattrs.BaseValidationError, TypeError, ValueError) as error:
        problem = cattrs.transform_error(error)[0] if isinstance(error, cattrs.BaseValidationError) else reason(error)
        raise UserError(
            f"{folder / 'trunk.json'}: not what mtl_jax wrote ({problem.replace(' @ $.', ' at ')[:200]})"
        ) from error
