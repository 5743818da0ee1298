"""Checks that trunks fit together beyond the shapes of their parameters: family, constants, vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.core.errors import UserError
from mtl_jax.pretrained import Checkpoint, families
from mtl_jax.pretrained.locate import VOCABULARIES
from mtl_jax.transfer.adapters import Adapted
from mtl_jax.trunks import Trunk

# Fields of configurations without an effect on a trained trunk.
INEFFECTIVE = ("initializer_range", "scaled_init", "embedding_range", "num_labels", "tied", "drop_output")


class TrunkSignature(NamedTuple):
    """Properties in which trunks must agree if parameters of one are used with another.

    Attributes:
        family: model_type in config.json, or the class name of a trunk from scratch.
        sizes: The configuration of its module.
        vocabulary: {token: id}; None: it has no tokenizer.
    """

    family: str
    sizes: Any
    vocabulary: Mapping[str, int] | None


def of_trunk(trunk: Trunk) -> TrunkSignature:
    """The signature of an experiment's trunk."""
    vocabulary, raw, module = trunk.tokenizer.get_vocab(), trunk.raw, trunk.module
    if raw is None:
        base = module.base if isinstance(module, Adapted) else module
        return TrunkSignature(type(base).__name__, trunk.sizes, vocabulary)
    return TrunkSignature(str(raw.get("model_type")), families.of(raw, "config.json").config(raw, "config.json"), vocabulary)


def of_checkpoint(checkpoint: Checkpoint) -> TrunkSignature:
    """The signature of a checkpoint's trunk."""
    has_tokenizer = any((checkpoint.location / name).exists() for name in VOCABULARIES)
    vocabulary = checkpoint.tokenizer.get_vocab() if has_tokenizer else None
    return TrunkSignature(str(checkpoint.raw.get("model_type")), checkpoint.config, vocabulary)


def check_family(names: Sequence[str], trunks: Sequence[TrunkSignature], action: str = "be merged") -> None:
    """Raises UserError if trunks are of different families.

    Args:
        names: Their names for the error.
        trunks: Their signatures.
        action: The action that needs one family, for the error, after "can".
    """
    for name, other in zip(names[1:], trunks[1:], strict=True):
        if other.family != trunks[0].family:
            raise UserError(
                f"{name}: its trunk is of the family {other.family}, and that of {names[0]} of {trunks[0].family}; only "
                f"models of one family can {action}"
            )


def check_constants(names: Sequence[str], trunks: Sequence[TrunkSignature], action: str = "be merged") -> None:
    """Raises UserError if trunks of one family differ in a constant; arguments as in check_family()."""
    first = trunks[0]
    for name, other in zip(names[1:], trunks[1:], strict=True):
        for field in (field.name for field in dataclasses.fields(first.sizes)):
            expected, value = getattr(first.sizes, field), getattr(other.sizes, field)
            if expected != value and "dropout" not in field and field not in INEFFECTIVE:
                raise UserError(
                    f"{name}: its trunk's {field} is {value!r}, and that of {names[0]} is {expected!r}; they cannot {action}"
                )


def check_vocabulary(names: Sequence[str], trunks: Sequence[TrunkSignature], action: str = "be merged") -> None:
    """Raises UserError if a token has different ids in two trunks; arguments as in check_family()."""
    first = trunks[0]
    for name, other in zip(names[1:], trunks[1:], strict=True):
        if first.vocabulary is None or other.vocabulary is None or first.vocabulary == other.vocabulary:
            continue
        token = next(t for t in [*first.vocabulary, *other.vocabulary] if first.vocabulary.get(t) != other.vocabulary.get(t))
        ids = [str(trunk.vocabulary.get(token, "absent")) for trunk in (other, first) if trunk.vocabulary is not None]
        raise UserError(
            f"{name}: its vocabulary differs from that of {names[0]}: the token {token!r} is {ids[0]}, but {ids[1]} in "
            f"{names[0]}; they cannot {action}"
        )
