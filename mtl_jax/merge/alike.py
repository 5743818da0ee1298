"""Whether trunks are of one family and read the same tokens, beyond what the shapes of their parameters say."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.errors import UserError
from mtl_jax.prediction import Run
from mtl_jax.pretrained import Checkpoint, families
from mtl_jax.pretrained.tensors import Location
from mtl_jax.pretrained.tokenizer import VOCABULARIES

# Fields of configurations that change nothing about a trained trunk.
UNIMPORTANT = ("initializer_range", "scaled_init", "embedding_range", "num_labels", "tied", "drop_output")


class Trunk(NamedTuple):
    """What must be equal.

    Attributes:
        family: config.json's model_type, or the class of a trunk from scratch.
        sizes: Its configuration as our modules read it.
        vocabulary: {token: id}; None: it came without a tokenizer.
    """

    family: str
    sizes: Any
    vocabulary: Mapping[str, int] | None


def of_run(run: Run) -> Trunk:
    """The trunk of a run."""
    vocabulary, raw, module = run.trunk.tokenizer.get_vocab(), run.trunk.raw, run.trunk.module
    if raw is None:
        return Trunk(type(module).__name__, module.config, vocabulary)
    return Trunk(str(raw.get("model_type")), families.of(raw, "config.json").config(raw, "config.json"), vocabulary)


def of_checkpoint(checkpoint: Checkpoint) -> Trunk:
    """The trunk of a checkpoint."""
    has_tokenizer = any((checkpoint.location / name).exists() for name in VOCABULARIES)
    vocabulary = checkpoint.tokenizer.get_vocab() if has_tokenizer else None
    return Trunk(str(checkpoint.raw.get("model_type")), checkpoint.config, vocabulary)


def check_family(trunks: Sequence[tuple[str, Trunk]]) -> None:
    """Raises UserError where the trunks, by name, are of different families."""
    (first, one), *others = trunks
    for name, other in others:
        if other.family != one.family:
            raise UserError(
                f"{name}: its trunk is of the family {other.family}, and that of {first} is {one.family}; only one family "
                "can be merged"
            )


def check_constants(trunks: Sequence[tuple[str, Trunk]]) -> None:
    """Raises UserError where trunks of one shape, by name, differ in a constant or in their vocabulary."""
    (first, one), *others = trunks
    for name, other in others:
        for field in dataclasses.fields(one.sizes):
            here, there = getattr(one.sizes, field.name), getattr(other.sizes, field.name)
            if here != there and "dropout" not in field.name and field.name not in UNIMPORTANT:
                raise UserError(
                    f"{name}: its trunk's {field.name} is {there!r}, and that of {first} is {here!r}; they cannot be merged"
                )
        if one.vocabulary is not None and other.vocabulary is not None and one.vocabulary != other.vocabulary:
            token = next(
                token
                for token in [*one.vocabulary, *other.vocabulary]
                if one.vocabulary.get(token) != other.vocabulary.get(token)
            )
            raise UserError(
                f"{name}: its vocabulary is another than that of {first}: the token {token!r} has the id "
                f"{other.vocabulary.get(token)}, and {one.vocabulary.get(token)} there; they cannot be merged"
            )


def digests(location: Location) -> dict[str, str]:
    """{file: SHA-256} of the files with tensors in a checkpoint's directory."""
    found = {}
    files: list[Any] = list(location.iterdir())
    for file in sorted(files, key=lambda file: file.name):
        if file.name.endswith((".safetensors", ".bin")):
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            found[file.name] = digest.hexdigest()
    return found
