"""Opens a Hugging Face checkpoint as a linen module and a parameter tree, without PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.pretrained import families, locate, placing
from mtl_jax.pretrained.family import LABELLED, Fields, brief
from mtl_jax.pretrained.locate import load_tokenizer
from mtl_jax.pretrained.placing import Sharding
from mtl_jax.pretrained.tensor_files import Location, open_tensors, read_json

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: A linen module. model.apply({"params": params}, input_ids, attention_mask) returns .hidden f[B, T, H], .pooled
            and .logits; model.trunk is the encoder alone, for params["trunk"].
        params: {"trunk": ...}, with "pooler" and "head" where the model has them; float32.
        config: Sizes and constants, as our modules read them.
        raw: config.json as it is in the file, with the requested labels.
        head: Kind of its head (a key of family.KINDS), or None.
        location: The directory it was read from; tokenizer and generation_config.json are read from there, too.
        unused: Names of the file's tensors that are not parameters of the model.
        initialized: Our paths of parameters that the file lacks; they are freshly initialised.
        merged: Our paths of linear maps outside trunk and decoder whose kernels have taken up an adapter.
    """

    model: nn.Module
    params: Any
    config: Any
    raw: Mapping[str, Any]
    head: str | None
    location: Location
    unused: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's outputs in order; LABEL_0 and so on where config.json names none."""
        id2label = self.raw.get("id2label") or {}
        return tuple(str(id2label.get(str(i), f"LABEL_{i}")) for i in range(self.config.num_labels))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer (transformers), read on first use.

        Raises:
            UserError: The checkpoint has no tokenizer files.
        """
        return load_tokenizer(self.location)


def load(
    path: str | Path,
    *,
    head: str | None = AUTO,
    labels: int | Sequence[str] | None = None,
    dtype: Any = jnp.float32,
    sharding: Sharding = None,
    allow_missing: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """Opens a checkpoint.

    Args:
        path: A local directory, "pip:ASSET/MEMBER", "gguf:FILE", "gguf:gemma3-270m", or a hub id "ORG/NAME" or
            "ORG/NAME@REVISION".
        head: Kind of head (a key of family.KINDS); "auto" is the kind that architectures in config.json names, None the trunk
            alone, with its pooler. A kind that the checkpoint does not have is freshly initialised.
        labels: Number or names of the head's outputs; None keeps the checkpoint's. An output layer of another size is then
            freshly initialised.
        dtype: Compute dtype of the module; the parameters are float32.
        sharding: A jax Sharding for all parameters, or a function from our path ("trunk/layer_0/attention/query/kernel") to
            one. Each tensor is put straight where it says. None is the default device.
        allow_missing: Whether parameters that the file lacks are initialised, the trunk's included; else they are an error.
        seed: Seed of freshly initialised parameters.

    Returns:
        The checkpoint.

    Raises:
        UserError: A file is missing or damaged, the family is unknown, or a tensor is missing or has another shape.
    """
    path = str(path)
    location = locate.locate(path)
    where = f"{path}/config.json"
    raw = read_json(location, "config.json")
    family = families.of(raw, where)
    file_kind = head_kind(family.heads, raw, where)
    kind = file_kind if head == AUTO else head
    kinds = sorted(set(family.heads.values()))
    if kind is not None and kind not in kinds:
        raise unknown(f"head for {family.model_types[0]} checkpoints:", kind, [AUTO, *kinds])
    raw = _with_labels(raw, kind, file_kind, labels)
    config = family.config(raw, where)
    Fields(raw, where).num_labels()
    tensors = open_tensors(location)
    placing.check_sizes(config, raw, tensors, where)
    model = family.build(config, kind, dtype)
    tensors, prefix = placing.unwrap(family, config, placing.shapes(family, model), tensors, path)
    if kind is not None:
        untied = placing.with_tying(family, config, tensors, prefix)
        if untied != config:
            config, model = untied, family.build(untied, kind, dtype)
    placed = placing.place(
        family,
        model,
        config,
        tensors,
        prefix,
        path,
        head_from_file=file_kind in (None, kind),
        new_head=head != AUTO or labels is not None,
        new_labels=labels is not None,
        allow_missing=allow_missing,
        sharding=sharding,
        seed=seed,
    )
    return Checkpoint(model, placed.params, config, raw, kind, location, placed.unused, placed.initialized)


def head_kind(heads: Mapping[str, str], raw: Mapping[str, Any], where: str) -> str | None:
    """The kind of head that architectures in config.json names; None where the family does not list that class.

    Args:
        heads: A family's heads: class name -> kind.
        raw: The parsed config.json.
        where: Its name, for errors.

    Raises:
        UserError: architectures is not a list of names.
    """
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"{where}: architectures is {brief(architectures)}; it must be a list of class names")
    return heads.get(architectures[0]) if architectures else None


def _with_labels(
    raw: Mapping[str, Any], kind: str | None, file_kind: str | None, labels: int | Sequence[str] | None
) -> dict[str, Any]:
    """config.json with the labels of the head that is loaded."""
    if labels is not None:
        if kind not in LABELLED or kind == "question_answering":
            raise UserError(f"labels were given, but those of a head of kind {kind} cannot be chosen")
        names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
        if not names:
            raise UserError("labels is empty; a head needs at least one")
    elif kind == "question_answering" and file_kind != kind:
        names = ["LABEL_0", "LABEL_1"]  # start and end; the labels in the file belong to another head
    else:
        return dict(raw)
    changed = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return {key: value for key, value in raw.items() if key != "num_labels"} | changed
