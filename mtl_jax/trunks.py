"""The trunk of an experiment: declared, loaded, written into a workdir, opened again from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import pretrained
from mtl_jax.errors import UserError
from mtl_jax.models.embedding import EmbeddingConfig, SharedEmbedding
from mtl_jax.models.encoder import Encoder, EncoderConfig


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A Hugging Face encoder checkpoint.

    Attributes:
        path: Its directory: a local path, or "pip:ASSET/MEMBER".
        dropout: Dropout rate, hidden and attention, while the trunk trains; None: what the checkpoint's config says.
    """

    path: str
    dropout: float | None = None


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A shared embedding from scratch over a vocabulary of the training texts' most frequent words.

    Attributes:
        vocabulary: Most words in the vocabulary, padding and unknown included.
        dimension: Width of the embedding.
    """

    vocabulary: int = 10_000
    dimension: int = 100


class Trunk(NamedTuple):
    """A trunk, ready to train.

    Attributes:
        module: A linen module; apply({"params": ...}, ids, mask, position_ids=, segment_ids=, deterministic=).hidden.
        params: Pretrained parameters, or None: initialise them.
        tokenizer: A transformers fast tokenizer.
        max_length: Longest example in tokens that the module can take.
    """

    module: nn.Module
    params: Any
    tokenizer: Any
    max_length: int


def build(config: Pretrained | Embedding, texts: Sequence[str], dtype: Any) -> Trunk:
    """Loads or creates the trunk.

    Args:
        config: The declaration.
        texts: Training texts, from which a vocabulary is made where the trunk has none.
        dtype: Compute dtype.

    Raises:
        UserError: The checkpoint cannot be loaded.
    """
    if isinstance(config, Pretrained):
        checkpoint = pretrained.load(config.path, dtype=dtype)
        sizes = checkpoint.config
        if config.dropout is not None:
            if not 0 <= config.dropout < 1:
                raise UserError(f"trunk.dropout is {config.dropout}; it must be at least 0 and below 1")
            sizes = dataclasses.replace(sizes, dropout=config.dropout, attention_dropout=config.dropout)
        return Trunk(Encoder(sizes, dtype), checkpoint.params, checkpoint.tokenizer, sizes.max_positions)
    tokenizer = _word_tokenizer(texts, config.vocabulary)
    module = SharedEmbedding(EmbeddingConfig(len(tokenizer), config.dimension), dtype)
    return Trunk(module, None, tokenizer, 1_000_000)


def init_params(trunk: Trunk, key: jax.Array) -> Any:
    """The trunk's parameters: the pretrained ones, or fresh ones from the key."""
    if trunk.params is not None:
        return trunk.params
    return trunk.module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def width(trunk: Trunk, params: Any) -> int:
    """H, the size of the trunk's vectors."""

    def hidden(params: Any) -> Any:
        return trunk.module.apply({"params": params}, jnp.zeros((1, 1), jnp.int32)).hidden  # type: ignore[union-attr]

    return jax.eval_shape(hidden, params).shape[-1]


def save(trunk: Trunk, folder: Path) -> None:
    """Writes what opening the trunk again needs, except the parameters: sizes and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    trunk.tokenizer.save_pretrained(folder)
    sizes = dataclasses.asdict(trunk.module.config)
    (folder / "trunk.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def reopen(config: Pretrained | Embedding, folder: Path, dtype: Any) -> Trunk:
    """The trunk that save() wrote; params is None, they are in the run's checkpoint."""
    sizes = json.loads((folder / "trunk.json").read_text(encoding="utf-8"))
    tokenizer = pretrained.load_tokenizer(folder)
    if isinstance(config, Pretrained):
        encoder = EncoderConfig(**sizes)
        return Trunk(Encoder(encoder, dtype), None, tokenizer, encoder.max_positions)
    return Trunk(SharedEmbedding(EmbeddingConfig(**sizes), dtype), None, tokenizer, 1_000_000)


def _word_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Lower-cased words and punctuation marks, the most frequent first; id 0 pads, id 1 stands for unknown words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 3:
        raise UserError(f"trunk.vocabulary is {vocabulary}; it must be at least 3")
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
