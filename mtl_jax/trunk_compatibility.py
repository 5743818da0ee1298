"""Whether trunks are of one family and read the same tokens, beyond what the shapes of their parameters say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.core.errors import UserError
from mtl_jax.pretrained import Checkpoint, families
from mtl_jax.pretrained.locate import VOCABULARIES
from mtl_jax.transfer.adapters import Adapted
from mtl_jax.trunks import Trunk

# Fields of configurations that change nothing about a trained trunk.
UNIMPORTANT = ("initializer_range", "scaled_init", "embedding_range", "num_labels", "tied", "drop_output")


class Kin(NamedTuple):
    """What must be equal of trunks whose parameters are to be put together.

    Attributes:
        family: config.json's model_type, or the class of a trunk from scratch.
        sizes: Its configuration as our modules read it.
        vocabulary: {token: id}; None: it came without a tokenizer.
    """

    family: str
    sizes: Any
    vocabulary: Mapping[str, int] | None


def of_trunk(trunk: Trunk) -> Kin:
    """An experiment's trunk."""
    vocabulary, raw, module = trunk.tokenizer.get_vocab(), trunk.raw, trunk.module
    if raw is None:
        base = module.base if isinstance(module, Adapted) else module
        return Kin(type(base).__name__, module.config, vocabulary)
    return Kin(str(raw.get("model_type")), families.of(raw, "config.json").config(raw, "config.json"), vocabulary)


def of_checkpoint(checkpoint: Checkpoint) -> Kin:
    """The trunk of a checkpoint."""
    has_tokenizer = any((checkpoint.location / name).exists() for name in VOCABULARIES)
    vocabulary = checkpoint.tokenizer.get_vocab() if has_tokenizer else None
    return Kin(str(checkpoint.raw.get("model_type")), checkpoint.config, vocabulary)


def check_family(names: Sequence[str], trunks: Sequence[Kin], able: str = "be merged") -> None:
    """Raises UserError where the trunks are of different families.

    Args:
        names: What they are called in the error.
        trunks: The trunks.
        able: What those of one family can, for the error.
    """
    for name, other in zip(names[1:], trunks[1:], strict=True):
        if other.family != trunks[0].family:
            raise UserError(
                f"{name}: its trunk is of the family {other.family}, and that of {names[0]} of {trunks[0].family}; only "
                f"models of one family can {able}"
            )


def check_constants(names: Sequence[str], trunks: Sequence[Kin], able: str = "be merged") -> None:
    """Raises UserError where trunks of one family and shape differ in a constant; arguments as above."""
    first = trunks[0]
    for name, other in zip(names[1:], trunks[1:], strict=True):
        for field in (field.name for field in dataclasses.fields(first.sizes)):
            here, there = getattr(first.sizes, field), getattr(other.sizes, field)
            if here != there and "dropout" not in field and field not in UNIMPORTANT:
                raise UserError(
                    f"{name}: its trunk's {field} is {there!r}, and that of {names[0]} is {here!r}; they cannot {able}"
                )


def check_vocabulary(names: Sequence[str], trunks: Sequence[Kin], able: str = "be merged") -> None:
    """Raises UserError where a token has another id in one of the trunks; arguments as above."""
    first = trunks[0]
    for name, other in zip(names[1:], trunks[1:], strict=True):
        if first.vocabulary is None or other.vocabulary is None or first.vocabulary == other.vocabulary:
            continue
        token = next(t for t in [*first.vocabulary, *other.vocabulary] if first.vocabulary.get(t) != other.vocabulary.get(t))
        ids = [str(kin.vocabulary.get(token, "absent")) for kin in (other, first) if kin.vocabulary is not None]
        raise UserError(
            f"{name}: its vocabulary is another than that of {names[0]}: the token {token!r} is {ids[0]} there, and {ids[1]} "
            f"in {names[0]}; they cannot {able}"
        )
