"""Writes a checkpoint as a directory that transformers opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.core.staging import check_replaceable, staged
from mtl_jax.pretrained import families
from mtl_jax.pretrained.checkpoint import Checkpoint
from mtl_jax.pretrained.family import Family
from mtl_jax.pretrained.locate import FILES, copy_files
from mtl_jax.pretrained.tensor_writing import Saved as Saved
from mtl_jax.pretrained.tensor_writing import write_safetensors as write_safetensors

MOST_SHARD = 5 * 10**9  # bytes of tensors in one file


def save(
    folder: str | Path,
    checkpoint: Checkpoint,
    *,
    overwrite: bool = False,
    shard_size: int = MOST_SHARD,
    finish: Callable[[Path], None] = lambda staging: None,
) -> None:
    """Writes a checkpoint as transformers does: safetensors in float32, config.json, tokenizer, generation_config.json.

    Everything is written into a directory beside the folder and then moved, so the folder is never half-written.

    Args:
        folder: The directory to write. It must not exist, or be empty, or with `overwrite` hold a checkpoint.
        checkpoint: A loaded checkpoint, or one whose params were replaced.
        overwrite: Whether an existing checkpoint may be replaced.
        shard_size: Most bytes of tensors in one file; a larger model is written as several files and an index.
        finish: Called with the temporary directory before it is moved, to add further files.

    Raises:
        UserError: The folder is not free or cannot be written, or transformers has no class for the model and its head.
    """
    folder = Path(folder)
    family = families.of(checkpoint.raw, "config.json")
    config = exported_config(family, checkpoint)
    tensors = _tensors(family, checkpoint)
    check_replaceable(folder, "config.json", "a checkpoint", overwrite)
    with staged(folder) as staging:
        _write_tensors(staging, tensors, shard_size)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_files(checkpoint.location, staging, (*FILES, "generation_config.json"))
        finish(staging)


def exported_config(family: Family, checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json that is saved with a checkpoint.

    Raises:
        UserError: transformers has no class for the model and its head.
    """
    if checkpoint.head is None:
        architecture = family.base
    else:
        architecture = next((name for name, kind in family.heads.items() if kind == checkpoint.head), None)
        if architecture is None:
            raise UserError(
                f"transformers has no class for a {family.model_types[0]} model with a head of kind {checkpoint.head}"
            )
    if architecture is None:
        raise UserError(f"transformers has no class for a {family.model_types[0]} model without a head; save one with a head")
    config = {key: value for key, value in checkpoint.raw.items() if key != "torch_dtype"}
    config |= {"architectures": [architecture], "dtype": "float32"}
    if family.untied:
        config["tie_word_embeddings"] = checkpoint.config.tied
    return config | dict(family.constants(checkpoint.config))


def _tensors(family: Family, checkpoint: Checkpoint) -> dict[str, Saved]:
    """The tensors to write by name, sorted by name."""
    prefix = "" if checkpoint.head is None else family.prefix
    tensors: dict[str, Saved] = {}
    for path, array in trees.flat(checkpoint.params).items():
        name = family.names(path, checkpoint.config)[0]
        name = name if path.startswith("head/") else prefix + name
        tensors[name] = Saved(array, path.endswith("/kernel"))
    for name, array in family.extra(checkpoint.params, checkpoint.config).items():
        tensors[name] = Saved(array, False)
    return dict(sorted(tensors.items()))


def _write_tensors(folder: Path, tensors: Mapping[str, Saved], shard_size: int) -> None:
    shards: list[dict[str, Saved]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.size for other in shards[-1].values()) + tensor.size > shard_size:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return
    shard_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard)
        shard_of |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors.values())}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
