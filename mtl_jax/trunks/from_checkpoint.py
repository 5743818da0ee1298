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
from mtl_jax.core.errors import UserError
from mtl_jax.pretrained import families, locate
from mtl_jax.pretrained.checkpoint import AUTO
from mtl_jax.pretrained.tensor_files import open_safetensors, read_json
from mtl_jax.trunks.base import BESIDE, UNBOUNDED, Trunk, TrunkConfig

DECODER = "seq2seq_lm"  # the kind of head that decodes


@dataclasses.dataclass(frozen=True)
class Pretrained(TrunkConfig):
    """A Hugging Face checkpoint: an encoder, or an encoder-decoder, from whose decoder seq2seq heads start.

    Attributes:
        path: Its directory: a local path, "pip:ASSET/MEMBER", or a hub id "ORG/NAME" or "ORG/NAME@REVISION".
        dropout: Dropout rate, hidden and attention, while the trunk trains; None: the rates of the checkpoint's config.json.
        fresh: Whether only the sizes and the vocabulary are the checkpoint's and the parameters start at random, as a
            baseline for the pretrained ones.

    Examples:
        >>> mtl_jax.Pretrained("bert", dropout=0.1).path
        'bert'
    """

    path: str
    dropout: float | None = None
    fresh: bool = False

    def check(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"trunk.dropout is {self.dropout}; it must be at least 0 and below 1")

    def module(self, vocab_size: int, dtype: Any) -> nn.Module:
        """The encoder of the checkpoint, which has its own vocab_size."""
        return _encoder(read_json(locate.locate(self.path), "config.json"), self.path, dtype, self.dropout)

    def build(self, texts: Sequence[str], dtype: Any, *, decodes: bool = False) -> Trunk:
        checkpoint = pretrained.load(self.path, head=AUTO if decodes else None, dtype=dtype)
        has_decoder = checkpoint.head == DECODER
        if checkpoint.head is not None and not has_decoder:
            checkpoint = pretrained.load(self.path, head=None, dtype=dtype)
        module = _encoder(checkpoint.raw, self.path, dtype, self.dropout)
        length = checkpoint.config.max_length or UNBOUNDED
        beside = {name: params for name, params in checkpoint.params.items() if name not in ("trunk", "head")}
        decoder = _with_dropout(checkpoint.config, self.dropout) if has_decoder else None
        head = checkpoint.params["head"] if has_decoder else None
        trunk = None if self.fresh else checkpoint.params["trunk"]
        head = None if self.fresh else head
        return Trunk(module, trunk, checkpoint.tokenizer, length, checkpoint.raw, beside, decoder, head, checkpoint.location)

    def reopen(self, folder: Path, dtype: Any) -> Trunk:
        raw = read_json(folder, "config.json")
        module = _encoder(raw, f"{folder}/config.json", dtype)  # checked before transformers reads it for the tokenizer
        tokenizer = pretrained.load_tokenizer(folder)
        tensors = open_safetensors(folder / BESIDE)
        beside = trees.nested({path: np.array(tensor.read()) for path, tensor in tensors.items()})
        length = getattr(module.config, "max_length", None) or UNBOUNDED
        return Trunk(module, None, tokenizer, length, raw, beside, location=folder)


def _encoder(raw: Mapping[str, Any], where: str, dtype: Any, dropout: float | None = None) -> nn.Module:
    """The module of a checkpoint's trunk, with every dropout rate set to `dropout` unless that is None."""
    family = families.of(raw, where)
    return family.build(_with_dropout(family.config(raw, where), dropout), None, dtype).trunk


def _with_dropout(sizes: Any, dropout: float | None) -> Any:
    if dropout is None:
        return sizes
    return dataclasses.replace(sizes, **{field.name: dropout for field in dataclasses.fields(sizes) if "dropout" in field.name})
