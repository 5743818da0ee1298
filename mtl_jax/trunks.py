"""The trunk of an experiment: its declaration, how it is built, saved in a workdir, and opened again from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cattrs
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import pretrained
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import reason, write_json, writing
from mtl_jax.core.parts import Part
from mtl_jax.data import vocabulary
from mtl_jax.data.coverage import Tables
from mtl_jax.models.encoder import EmbeddingConfig, Encoder, SharedEmbedding
from mtl_jax.models.encoder_decoder import Seq2SeqEncoder
from mtl_jax.models.layers import ACTIVATIONS
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.models.trunk_output import TrunkFacts, token_table
from mtl_jax.pretrained import families
from mtl_jax.pretrained.checkpoint import AUTO
from mtl_jax.pretrained.locate import copy_files
from mtl_jax.pretrained.saving import Saved, write_safetensors
from mtl_jax.pretrained.tensor_files import Location, open_safetensors, read_json
from mtl_jax.transfer import adapters as adapting
from mtl_jax.transfer.adapters import Adapted, Adapter

DECODER = "seq2seq_lm"  # the kind of head that decodes
BESIDE = "beside.safetensors"  # parameters of a checkpoint that do not train
UNBOUNDED = 1_000_000  # tokens, without a position table


@dataclasses.dataclass(frozen=True)
class TrunkConfig(Part):
    """The declaration of a trunk."""

    door: ClassVar[str] = "trunk"


@dataclasses.dataclass(frozen=True)
class Pretrained(TrunkConfig):
    """A Hugging Face checkpoint: an encoder, or an encoder-decoder, from whose decoder seq2seq heads start.

    Attributes:
        path: Its directory: a local path, "pip:ASSET/MEMBER", or a hub id "ORG/NAME" or "ORG/NAME@REVISION".
        dropout: Dropout rate, hidden and attention, while the trunk trains; None: the rates of the checkpoint's config.json.
        fresh: Whether only the sizes and the vocabulary are the checkpoint's and the parameters start at random, as a
            baseline for the pretrained ones.
    """

    path: str
    dropout: float | None = None
    fresh: bool = False


@dataclasses.dataclass(frozen=True)
class Embedding(TrunkConfig):
    """A shared embedding from scratch over a vocabulary of the training texts' most frequent words.

    Attributes:
        vocabulary: Most words in the vocabulary, padding and unknown included.
        dimension: Width of the embedding.
    """

    vocabulary: int = 10_000
    dimension: int = 100


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
        heads: Attention heads; they divide the width.
        feed_forward: Width inside the feed-forward sublayers.
        pre_norm: Whether norms stand before each sublayer, as in Pegasus, not after it; deep models train more easily then.
        activation: Activation inside the feed-forward sublayers.
        dropout: Dropout rate after embeddings and after each sublayer.
        attention_dropout: Dropout rate of the attention probabilities.
        activation_dropout: Dropout rate inside the feed-forward sublayers.
        max_length: Longest text in tokens.
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


class Trunk(NamedTuple):
    """A trunk, ready to train.

    Attributes:
        module: A linen module or one with adapters; apply({"params": ...}, ids, mask, position_ids=, segment_ids=,
            deterministic=).hidden.
        params: Pretrained parameters; None: they are to be initialised.
        tokenizer: A transformers tokenizer.
        max_length: Longest example in tokens that the module can read.
        raw: The checkpoint's config.json; None for a trunk from scratch.
        beside: Parameters of the checkpoint's bare model that do not train here (BERT's pooler), or {}.
        decoder: Sizes of the checkpoint's decoder, or of a decoder on a trunk from scratch; None: without a decoder.
        head: Parameters of the checkpoint's decoder, or None.
        location: The directory of the checkpoint's generation_config.json, if it has one.
    """

    module: nn.Module | Adapted
    params: Any
    tokenizer: Any
    max_length: int
    raw: Mapping[str, Any] | None
    beside: Mapping[str, Any]
    decoder: Seq2SeqConfig | None = None
    head: Any = None
    location: Location | None = None


def build(config: TrunkConfig, texts: Sequence[str], dtype: Any, *, decodes: bool = False) -> Trunk:
    """Loads or creates the trunk.

    Args:
        config: The declaration.
        texts: Training texts, from which the vocabulary of a trunk from scratch is made.
        dtype: Compute dtype.
        decodes: Whether a checkpoint's decoder is loaded, if it has one.

    Raises:
        UserError: The checkpoint cannot be loaded, or a size of a trunk from scratch is out of range.
    """
    if isinstance(config, Pretrained):
        checkpoint = pretrained.load(config.path, head=AUTO if decodes else None, dtype=dtype)
        has_decoder = checkpoint.head == DECODER
        if checkpoint.head is not None and not has_decoder:
            checkpoint = pretrained.load(config.path, head=None, dtype=dtype)
        module = _encoder(checkpoint.raw, config.path, dtype, config.dropout)
        length = checkpoint.config.max_length or UNBOUNDED
        beside = {name: params for name, params in checkpoint.params.items() if name not in ("trunk", "head")}
        decoder = _with_dropout(checkpoint.config, config.dropout) if has_decoder else None
        head = checkpoint.params["head"] if has_decoder else None
        trunk = None if config.fresh else checkpoint.params["trunk"]
        head = None if config.fresh else head
        return Trunk(module, trunk, checkpoint.tokenizer, length, checkpoint.raw, beside, decoder, head, checkpoint.location)
    if isinstance(config, Transformer):
        _check_transformer(config)
        tokenizer = vocabulary.train(texts, config.pieces, config.vocabulary)
        sizes = _transformer(config, len(tokenizer))
        return Trunk(Seq2SeqEncoder(sizes, dtype), None, tokenizer, config.max_length, None, {}, sizes)
    tokenizer = _word_tokenizer(texts, config.vocabulary)
    module = SharedEmbedding(EmbeddingConfig(len(tokenizer), config.dimension), dtype)
    return Trunk(module, None, tokenizer, UNBOUNDED, None, {})


def adapt(trunk: Trunk, adapters: Sequence[Adapter], sources: int) -> Trunk:
    """The trunk with adapters.

    Args:
        trunk: The trunk.
        adapters: The adapters to add; may be empty.
        sources: The number of the run's sources.

    Raises:
        UserError: An adapter has no place in the trunk.
    """
    assert isinstance(trunk.module, nn.Module)  # no adapters yet
    return trunk._replace(module=adapting.adapt(trunk.module, adapters, sources)) if adapters else trunk


def _encoder(raw: Mapping[str, Any], where: str, dtype: Any, dropout: float | None = None) -> nn.Module:
    """The module of a checkpoint's trunk, with every dropout rate set to `dropout` unless that is None."""
    family = families.of(raw, where)
    return family.build(_with_dropout(family.config(raw, where), dropout), None, dtype).trunk


def _with_dropout(sizes: Any, dropout: float | None) -> Any:
    if dropout is None:
        return sizes
    if not 0 <= dropout < 1:
        raise UserError(f"trunk.dropout is {dropout}; it must be at least 0 and below 1")
    return dataclasses.replace(sizes, **{field.name: dropout for field in dataclasses.fields(sizes) if "dropout" in field.name})


def _check_transformer(config: Transformer) -> None:
    """Raises UserError if a field of Transformer is out of range."""
    for field in ("layers", "width", "heads", "feed_forward", "max_length"):
        if getattr(config, field) < 1:
            raise UserError(f"trunk.{field} is {getattr(config, field)}; it must be at least 1")
    if config.width % config.heads:
        raise UserError(f"trunk.heads is {config.heads}; it must divide trunk.width, {config.width}")
    for field in ("dropout", "attention_dropout", "activation_dropout"):
        if not 0 <= getattr(config, field) < 1:
            raise UserError(f"trunk.{field} is {getattr(config, field)}; it must be at least 0 and below 1")
    for field, choices in (("pieces", vocabulary.KINDS), ("activation", tuple(ACTIVATIONS))):
        if getattr(config, field) not in choices:
            raise unknown(f"trunk.{field}", getattr(config, field), choices)


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


def facts(trunk: Trunk) -> TrunkFacts:
    """The facts about the trunk that tasks use."""
    params = jax.eval_shape(lambda: init_params(trunk, jax.random.key(0)))
    try:
        rows, columns = token_table(params).shape
    except UserError:
        rows, columns = 0, 0
    start = None if trunk.raw is None else trunk.raw.get("decoder_start_token_id")
    encoder = trunk.module.config if isinstance(trunk.module, Encoder) else None
    return TrunkFacts(trunk.tokenizer, width(trunk, params), (rows, columns), trunk.decoder, trunk.head, start, encoder)


def tables(trunk: Trunk) -> Tables:
    """The rows of the trunk's embedding tables."""
    return tables_of(trunk.module.config)


def tables_of(sizes: Any, owner: str = "the trunk") -> Tables:
    """The rows of the embedding tables of a trunk with such sizes; `owner` names the trunk in errors."""
    return Tables(sizes.vocab_size, getattr(sizes, "type_vocab_size", 0) or None, owner)


def init_params(trunk: Trunk, key: jax.Array) -> Any:
    """The trunk's parameters: the pretrained ones, or fresh ones from the key; adapters are always fresh."""
    if trunk.params is None:
        return trunk.module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return trunk.module.add(trunk.params, key) if isinstance(trunk.module, Adapted) else trunk.params


def width(trunk: Trunk, params: Any) -> int:
    """H, the size of the trunk's vectors."""
    module, params = trunk.module, dict(params)
    if isinstance(module, Adapted):  # adapters change no size
        module = module.base
        del params[adapting.ADAPTERS]

    def hidden(params: Any) -> Any:
        return module.apply({"params": params}, jnp.zeros((1, 1), jnp.int32)).hidden  # type: ignore[union-attr]

    return jax.eval_shape(hidden, params).shape[-1]


def save(trunk: Trunk, folder: Path) -> None:
    """Writes the files that reopen() needs: configuration, tokenizer, parameters of the checkpoint that do not train.

    Raises:
        UserError: The folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trunk.tokenizer.save_pretrained(folder)
        if trunk.raw is None:
            name, sizes = "trunk.json", dataclasses.asdict(trunk.module.config)
        else:
            name, sizes = "config.json", dict(trunk.raw)
            flat = trees.flat(trunk.beside)
            write_safetensors(folder / BESIDE, {path: Saved(array, False) for path, array in flat.items()})
            if trunk.location is not None:
                copy_files(trunk.location, folder, ("generation_config.json",))
        write_json(folder / name, sizes)


def reopen(config: TrunkConfig, folder: Path, dtype: Any) -> Trunk:
    """Opens a trunk that save() wrote; params is None, because the run's checkpoint has them."""
    if isinstance(config, Pretrained):
        raw = read_json(folder, "config.json")
        module = _encoder(
            raw, f"{folder}/config.json", dtype
        )  # checked before transformers reads config.json for the tokenizer
        tokenizer = pretrained.load_tokenizer(folder)
        tensors = open_safetensors(folder / BESIDE)
        beside = trees.nested({path: np.array(tensor.read()) for path, tensor in tensors.items()})
        return Trunk(module, None, tokenizer, UNBOUNDED, raw, beside, location=folder)
    tokenizer = pretrained.load_tokenizer(folder)
    if isinstance(config, Transformer):
        sizes = _sizes(Seq2SeqConfig, folder)
        return Trunk(Seq2SeqEncoder(sizes, dtype), None, tokenizer, UNBOUNDED, None, {}, sizes)
    words = _sizes(EmbeddingConfig, folder)
    return Trunk(SharedEmbedding(words, dtype), None, tokenizer, UNBOUNDED, None, {})


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


def _word_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A tokenizer of lower-cased words and punctuation marks, most frequent first; id 0 is padding, id 1 unknown words."""
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
