"""A checkpoint with adapters: a Checkpoint like any other, whose trunk, and decoder if it has one, have adapters inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.models.seq2seq_decoder import Decoder
from mtl_jax.pretrained.checkpoint import Checkpoint
from mtl_jax.transfer.adapters.adapted import ADAPTERS, Adapted
from mtl_jax.transfer.adapters.adapted_decoder import AdaptedDecoder, adapt_decoder, add_to_decoder, layers_of
from mtl_jax.transfer.adapters.adapting import OfSource, adapt
from mtl_jax.transfer.adapters.base import Adapter, Layer

TRUNK, HEAD = "trunk", "head"


def add_adapters(
    checkpoint: Checkpoint, adapters: Sequence[Adapter] = (), decoder_adapters: Sequence[Adapter] = (), seed: int = 0
) -> Checkpoint:
    """A checkpoint with new adapters; it is used as before, also by decoding.generate.

    Args:
        checkpoint: The checkpoint, without adapters.
        adapters: Adapters in the trunk; what they target are paths inside it.
        decoder_adapters: Adapters in the decoder of an encoder-decoder.
        seed: Seed of their parameters.

    Returns:
        The checkpoint whose model has them, and whose params have {"trunk": {"adapters": ...}, "head": {"adapters": ...}}.

    Raises:
        UserError: The checkpoint has adapters, or no decoder, or an adapter has no place in it.

    Examples:
        >>> checkpoint = mtl_jax.pretrained.load("PATH")
        >>> adapted = add_adapters(checkpoint, [Lora(name="lora")])
        >>> adapted.model.apply({"params": adapted.params}, input_ids, attention_mask).logits
    """
    parts = dict(adapters_of(checkpoint))
    if parts:
        raise UserError(f"the checkpoint has adapters in its {' and '.join(parts)}; combine() puts several together")
    model: Any = checkpoint.model
    key = jax.random.key(seed)
    changes: dict[str, Any] = {}
    params = dict(checkpoint.params)
    if adapters:
        adapted = adapt(model.trunk, adapters)
        changes[TRUNK] = OfSource(adapted)
        params[TRUNK] = adapted.add(params[TRUNK], key)
    if decoder_adapters:
        if not isinstance(model, Seq2Seq) or not isinstance(model.head, Decoder):
            raise UserError("the checkpoint has no decoder that adapters could be in; load it with its own head")
        changes[HEAD] = adapt_decoder(model.head, decoder_adapters)
        params[HEAD] = add_to_decoder(changes[HEAD], params[HEAD], key)
    return dataclasses.replace(checkpoint, model=model.clone(**changes), params=params)


def adapters_of(checkpoint: Checkpoint) -> dict[str, tuple[Adapter, ...]]:
    """{"trunk": its adapters, "head": those of the decoder}; parts without adapters are left out."""
    model: Any = checkpoint.model
    parts = {TRUNK: getattr(getattr(model.trunk, "adapted", None), "adapters", ())}
    head = getattr(model, HEAD, None)
    parts[HEAD] = head.adapters if isinstance(head, AdaptedDecoder) else ()
    return {part: adapters for part, adapters in parts.items() if adapters}


def layers(checkpoint: Checkpoint) -> dict[str, dict[str, Layer]]:
    """{part: {path inside it: layer}} of the layers of trunk and decoder that can be adapted."""
    model: Any = checkpoint.model
    trunk = model.trunk.adapted if isinstance(model.trunk, OfSource) else Adapted(model.trunk, ())
    head = getattr(model, HEAD, None)
    return {TRUNK: trunk.layers, HEAD: dict(layers_of(head.config)) if isinstance(head, Decoder) else {}}


def params_of(checkpoint: Checkpoint, part: str, adapter: Adapter) -> dict[str, dict[str, Any]]:
    """{path of a layer: the adapter's parameters there}."""
    by_layer: dict[str, dict[str, Any]] = {}
    for path, leaf in trees.flat(checkpoint.params[part][ADAPTERS][adapter.name]).items():
        layer, _, name = path.rpartition("/")
        by_layer.setdefault(layer, {})[name] = leaf
    return by_layer


def with_params(checkpoint: Checkpoint, values: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with some parameters replaced, {our path: array}."""
    flat = trees.flat(checkpoint.params)
    return dataclasses.replace(checkpoint, params=trees.nested({**flat, **values}))


def without_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it was before add_adapters()."""
    model: Any = checkpoint.model
    changes: dict[str, Any] = {}
    if isinstance(model.trunk, OfSource):
        changes[TRUNK] = model.trunk.adapted.base
    head = getattr(model, HEAD, None)
    if isinstance(head, AdaptedDecoder):
        changes[HEAD] = Decoder(head.config, head.dtype)
    params = {
        part: {name: leaf for name, leaf in tree.items() if name != ADAPTERS} if isinstance(tree, Mapping) else tree
        for part, tree in checkpoint.params.items()
    }
    return dataclasses.replace(checkpoint, model=model.clone(**changes), params=params)
