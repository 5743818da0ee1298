"""The trunk of an experiment: declared, loaded, written into a workdir, opened again from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mtl_jax import pretrained
from mtl_jax.errors import UserError
from mtl_jax.models.embedding import EmbeddingConfig, SharedEmbedding
from mtl_jax.pretrained import families
from mtl_jax.pretrained.safetensors_file import open_safetensors
from mtl_jax.pretrained.saving import Saved, write_safetensors
from mtl_jax.pretrained.tensors import read_json
from mtl_jax.transfer import adapters as adapting
from mtl_jax.transfer.adapters import Adapted, AnyAdapter

BESIDE = "beside.safetensors"
UNBOUNDED = 1_000_000  # tokens; a trunk without a position table takes any length


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A Hugging Face encoder checkpoint.

    Attributes:
        path: Its directory: a local path, "pip:ASSET/MEMBER", or a hub id "ORG/NAME" or "ORG/NAME@REVISION".
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
        module: A linen module or one with adapters; apply({"params": ...}, ids, mask, position_ids=, segment_ids=,
            deterministic=).hidden.
        params: Pretrained parameters, or None: initialise them.
        tokenizer: A transformers fast tokenizer.
        max_length: Longest example in tokens that the module can take.
        raw: The checkpoint's config.json; None for a trunk from scratch.
        beside: Parameters of the checkpoint's bare model that do not train here (BERT's pooler), or {}.
    """

    module: nn.Module | Adapted
    params: Any
    tokenizer: Any
    max_length: int
    raw: Mapping[str, Any] | None
    beside: Mapping[str, Any]


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
        checkpoint = pretrained.load(config.path, head=None, dtype=dtype)
        module = _encoder(checkpoint.raw, config.path, dtype, config.dropout)
        length = checkpoint.config.max_length or UNBOUNDED
        beside = {name: params for name, params in checkpoint.params.items() if name != "trunk"}
        return Trunk(module, checkpoint.params["trunk"], checkpoint.tokenizer, length, checkpoint.raw, beside)
    tokenizer = _word_tokenizer(texts, config.vocabulary)
    module = SharedEmbedding(EmbeddingConfig(len(tokenizer), config.dimension), dtype)
    return Trunk(module, None, tokenizer, UNBOUNDED, None, {})


def adapt(trunk: Trunk, adapters: Sequence[AnyAdapter], sources: int) -> Trunk:
    """The trunk with adapters in it.

    Args:
        trunk: The trunk.
        adapters: What is added; may be nothing.
        sources: The number of the run's sources.

    Raises:
        UserError: An adapter has no place in the trunk.
    """
    assert isinstance(trunk.module, nn.Module)  # no adapters yet
    return trunk._replace(module=adapting.adapt(trunk.module, adapters, sources)) if adapters else trunk


def _encoder(raw: Mapping[str, Any], where: str, dtype: Any, dropout: float | None = None) -> nn.Module:
    """The trunk of a checkpoint as a module of its own, with every dropout rate set to `dropout` unless that is None."""
    family = families.of(raw, where)
    sizes = family.config(raw, where)
    if dropout is not None:
        if not 0 <= dropout < 1:
            raise UserError(f"trunk.dropout is {dropout}; it must be at least 0 and below 1")
        rates = {field.name: dropout for field in dataclasses.fields(sizes) if "dropout" in field.name}
        sizes = dataclasses.replace(sizes, **rates)
    return family.build(sizes, None, dtype).trunk


def init_params(trunk: Trunk, key: jax.Array) -> Any:
    """The trunk's parameters: the pretrained ones, or fresh ones from the key; adapters are always fresh."""
    if trunk.params is None:
        return trunk.module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return trunk.module.add(trunk.params, key) if isinstance(trunk.module, Adapted) else trunk.params


def width(trunk: Trunk, params: Any) -> int:
    """H, the size of the trunk's vectors."""
    module, params = trunk.module, dict(params)
    if isinstance(module, Adapted):  # which change no size
        module = module.base
        del params[adapting.ADAPTERS]

    def hidden(params: Any) -> Any:
        return module.apply({"params": params}, jnp.zeros((1, 1), jnp.int32)).hidden  # type: ignore[union-attr]

    return jax.eval_shape(hidden, params).shape[-1]


def token_table(params: Any) -> jax.Array:
    """The trunk's token table f32[V, E]: every trunk calls it word/embedding, on top or under embeddings.

    Raises:
        UserError: There is none.
    """
    for found in (params, params.get("embeddings", {})):
        if "word" in found:
            return found["word"]["embedding"]
    raise UserError("the trunk has no token table that a head could share")


def save(trunk: Trunk, folder: Path) -> None:
    """Writes what opening the trunk again needs, except what trains: configuration, tokenizer, parameters beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    trunk.tokenizer.save_pretrained(folder)
    if trunk.raw is None:
        name, sizes = "trunk.json", dataclasses.asdict(trunk.module.config)
    else:
        name, sizes = "config.json", dict(trunk.raw)
        flat = traverse_util.flatten_dict(trunk.beside, sep="/")
        write_safetensors(folder / BESIDE, {path: Saved(array, False) for path, array in flat.items()})
    (folder / name).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def reopen(config: Pretrained | Embedding, folder: Path, dtype: Any) -> Trunk:
    """The trunk that save() wrote; params is None, they are in the run's checkpoint."""
    tokenizer = pretrained.load_tokenizer(folder)
    if isinstance(config, Pretrained):
        raw = read_json(folder, "config.json")
        module = _encoder(raw, f"{folder}/config.json", dtype)
        flat = {path: np.array(tensor.read()) for path, tensor in open_safetensors(folder / BESIDE).items()}
        return Trunk(module, None, tokenizer, UNBOUNDED, raw, traverse_util.unflatten_dict(flat, sep="/"))
    sizes = EmbeddingConfig(**read_json(folder, "trunk.json"))
    return Trunk(SharedEmbedding(sizes, dtype), None, tokenizer, UNBOUNDED, None, {})


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
