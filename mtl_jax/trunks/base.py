"""What a trunk is: its declaration, from which it is built and opened again, and the built trunk with its facts.

Shapes in names: B rows, T tokens a row, H width of the vectors.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import pretrained
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import write_json, writing
from mtl_jax.core.parts import Part, origin_of
from mtl_jax.data import vocabulary
from mtl_jax.data.coverage import Tables
from mtl_jax.models import traced
from mtl_jax.models.encoder import Encoder
from mtl_jax.models.llama import Llama
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.models.trunk_output import TrunkFacts, pooling_of, token_table
from mtl_jax.pretrained.locate import copy_files
from mtl_jax.pretrained.saving import Saved, write_safetensors
from mtl_jax.pretrained.tensor_files import Location
from mtl_jax.transfer import adapters as adapting
from mtl_jax.transfer.adapters import Adapted, Adapter
from mtl_jax.transfer.adapters.base import Inserted
from mtl_jax.transfer.adapters.routes import Routes

CARD = "README.md"  # of a checkpoint: its licence and languages
BESIDE = "beside.safetensors"  # parameters of a checkpoint that do not train
UNBOUNDED = 1_000_000  # tokens, without a position table
WORDS = 10_000  # in the vocabulary of a trunk that does not say how many


@dataclasses.dataclass(frozen=True)
class TrunkConfig(Part, abc.ABC):
    """The declaration of a trunk. A class of your own needs its fields and module(); the rest has defaults.

    Fields of two names are read here: `vocabulary`, the most words of the tokenizer (10,000 without it), and `max_length`, the
    longest text in tokens (no limit without it).

        @dataclasses.dataclass(frozen=True)
        class Bag(mtl_jax.trunks.TrunkConfig):
            width: int = 64

            def module(self, vocab_size, dtype):
                return BagModule(vocab_size, self.width, dtype)  # a linen module
    """

    door: ClassVar[str] = "trunk"

    @abc.abstractmethod
    def module(self, vocab_size: int, dtype: Any) -> nn.Module:
        """The network: a linen module that is called as models.encoder.Encoder is.

        Its arguments are input_ids i32[B, T], attention_mask [B, T], and by name position_ids i32[B, T], segment_ids i32[B, T]
        (the example of each token in a packed row, from 1; 0 is padding) and deterministic; all but input_ids need a default.
        An argument token_type_ids is passed where texts have types of tokens. The result has `hidden`, f[B, T, H].

        Args:
            vocab_size: The number of ids.
            dtype: The compute dtype; parameters are float32.
        """

    def tokenizer(self, texts: Sequence[str]) -> Any:
        """A transformers tokenizer; by default of the training texts' most frequent words, lower-cased."""
        return vocabulary.words(texts, getattr(self, "vocabulary", WORDS))

    def check(self) -> None:
        """Raises UserError if a field is refused; called before anything is read."""

    def build(self, texts: Sequence[str], dtype: Any, *, decodes: bool = False) -> Trunk:
        """The trunk before training; arguments as for trunks.build()."""
        return self._with_tokenizer(self.tokenizer(texts), dtype)

    def reopen(self, folder: Path, dtype: Any) -> Trunk:
        """The trunk of a workdir; arguments as for trunks.reopen()."""
        return self._with_tokenizer(pretrained.load_tokenizer(folder), dtype)

    def _with_tokenizer(self, tokenizer: Any, dtype: Any) -> Trunk:
        module = self.module(len(tokenizer), dtype)
        return Trunk(module, None, tokenizer, getattr(self, "max_length", UNBOUNDED), None, {})


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
        head: Parameters of the checkpoint's decoder, or of the LM head of a decoder-only one, or None.
        location: The directory of the checkpoint's generation_config.json, if it has one.
        declared: The declaration that it was built from.
        classifier: Parameters that the checkpoint has of its family's text classifier; None: no head begins as it.
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
    declared: TrunkConfig | None = None
    classifier: Mapping[str, Any] | None = None

    @property
    def is_users(self) -> bool:
        """Whether its declaration is a class of the user's."""
        return self.declared is not None and origin_of(type(self.declared)) is not None

    @property
    def sizes(self) -> Any:
        """The dataclass that decides the sizes of its module: the module's config, or the declaration."""
        config = getattr(self.module, "config", None)
        return config if dataclasses.is_dataclass(config) else self.declared


def adapt(
    trunk: Trunk,
    adapters: Sequence[Adapter],
    sources: int,
    *,
    sharing: Sequence[Inserted] = (),
    routes: Routes | None = None,
    owners: tuple[int, ...] = (),
) -> Trunk:
    """The trunk with adapters.

    Args:
        trunk: The trunk.
        adapters: The adapters to add; may be empty.
        sources: The number of the run's sources.
        sharing: As in transfer.adapters.adapt().
        routes: As there.
        owners: As there.

    Raises:
        UserError: An adapter or the sharing has no place in the trunk.
    """
    assert isinstance(trunk.module, nn.Module)  # no adapters yet
    if not (adapters or sharing):
        return trunk
    module = adapting.adapt(trunk.module, adapters, sources, sharing=sharing, routes=routes, owners=owners)
    length = trunk.max_length - sum(adapter.added_tokens for adapter in adapters)
    return trunk._replace(module=module, max_length=length)


def copies(trunk: Trunk) -> int:
    """How many copies of each row leave the trunk: more than one where tasks of one source have parameters of their own."""
    return trunk.module.copies if isinstance(trunk.module, Adapted) else 1


def facts(trunk: Trunk) -> TrunkFacts:
    """The facts about the trunk that tasks use."""
    params = shapes(trunk)
    try:
        rows, columns = token_table(params).shape
    except UserError:
        rows, columns = 0, 0
    start = None if trunk.raw is None else trunk.raw.get("decoder_start_token_id")
    module = trunk.module
    encoder = module.config if isinstance(module, Encoder) and module.config.is_plain else None
    causal = module.config if isinstance(module, Llama) else None
    return TrunkFacts(
        trunk.tokenizer,
        width(trunk),
        (rows, columns),
        trunk.decoder,
        trunk.head,
        start,
        encoder,
        causal,
        trunk.raw,
        getattr(trunk.declared, "dropout", None),
        pooling_of(module),
    )


def tables(trunk: Trunk, owner: str = "the trunk") -> Tables:
    """The rows of the trunk's embedding tables; `owner` names the trunk in errors."""
    if trunk.is_users and trunk.raw is None:  # its module may have no config
        return Tables(len(trunk.tokenizer), None, owner)
    return tables_of(trunk.module.config, owner)


def tables_of(sizes: Any, owner: str = "the trunk") -> Tables:
    """The rows of the embedding tables of a trunk with such sizes; `owner` names the trunk in errors."""
    return Tables(sizes.vocab_size, getattr(sizes, "type_vocab_size", 0) or None, owner)


def init_params(trunk: Trunk, key: jax.Array) -> Any:
    """The trunk's parameters: the pretrained ones, or fresh ones from the key; adapters are always fresh."""
    if trunk.params is None:
        return trunk.module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return trunk.module.add(trunk.params, key) if isinstance(trunk.module, Adapted) else trunk.params


def shapes(trunk: Trunk, make: Callable[[Trunk], Any] = lambda trunk: init_params(trunk, jax.random.key(0))) -> Any:
    """The shapes of what a function makes of the trunk, by default its parameters; nothing is computed."""
    params = traced.shapes(_base(trunk))[1]["params"] if trunk.params is None else trunk.params
    return jax.eval_shape(lambda params: make(trunk._replace(params=params)), params)


def draws_dropout(trunk: Trunk) -> bool:
    """Whether the trunk's module, without adapters, has dropout: whether it asks for random numbers while it trains."""
    module = _base(trunk)
    try:
        jax.eval_shape(
            lambda params: module.apply(params, jnp.zeros((1, 1), jnp.int32), deterministic=False), traced.shapes(module)[1]
        )
    except flax.errors.InvalidRngError:  # linen's, for a module that asks for them and is given none
        return True
    return False


def width(trunk: Trunk) -> int:
    """H, the size of the trunk's vectors."""
    size: int = traced.shapes(_base(trunk))[0].hidden.shape[-1]
    return size


def _base(trunk: Trunk) -> nn.Module:
    """The trunk's module without adapters, which change no size."""
    module: nn.Module = trunk.module.base if isinstance(trunk.module, Adapted) else trunk.module
    return module


def save(trunk: Trunk, folder: Path) -> None:
    """Writes the files that reopen() needs: configuration, tokenizer, parameters of the checkpoint that do not train.

    Raises:
        UserError: The folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trunk.tokenizer.save_pretrained(folder)
        if trunk.is_users and trunk.raw is None:
            return  # its sizes are those of the tokenizer and of the declaration in config.json
        if trunk.raw is None:
            name, sizes = "trunk.json", dataclasses.asdict(trunk.module.config)
        else:
            name, sizes = "config.json", dict(trunk.raw)
            flat = trees.flat(trunk.beside)
            write_safetensors(folder / BESIDE, {path: Saved(array, False) for path, array in flat.items()})
            if trunk.location is not None:
                copy_files(trunk.location, folder, ("generation_config.json", CARD))
        write_json(folder / name, sizes)
