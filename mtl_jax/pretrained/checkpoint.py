"""Hugging Face checkpoints to linen modules and parameter trees, without PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mtl_jax import assets
from mtl_jax.errors import UserError
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.pretrained import bert

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: A linen module; model.apply({"params": params}, input_ids, attention_mask).hidden is f[B, T, H].
        params: Its parameters, float32.
        config: Its sizes and constants.
        location: Where it came from.
        unused: Names of the file's tensors that the module has no place for.
    """

    model: Encoder
    params: Any
    config: EncoderConfig
    location: Path | zipfile.Path
    unused: tuple[str, ...]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's fast tokenizer (transformers), read on first use.

        Raises:
            UserError: The checkpoint has no tokenizer files.
        """
        return load_tokenizer(self.location)


def load(path: str, *, dtype: Any = jnp.float32) -> Checkpoint:
    """Opens a checkpoint directory.

    Args:
        path: A local directory, or "pip:ASSET/MEMBER", with config.json and model.safetensors.
        dtype: Compute dtype of the module; the parameters are float32.

    Returns:
        The checkpoint.

    Raises:
        UserError: A file is missing or damaged, the family is unknown, or a tensor is missing or has another shape.
    """
    location = assets.locate(path)
    config = bert.config(_read_json(location, "config.json"), f"{path}/config.json")
    tensors = _read_tensors(location, path)
    model = Encoder(config, dtype)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    used: set[str] = set()

    def take(key_path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        ours = jax.tree_util.keystr(key_path, simple=True, separator="/")
        names = bert.candidates(ours)
        found = next((name for name in names if name in tensors), None)
        if found is None:
            raise UserError(f"{path}: the tensor {names[0]} is missing (for our {ours})")
        used.add(found)
        # PyTorch keeps linear weights as [out, in]; embeddings lie the same way in both.
        array = tensors[found].T if ours.endswith("kernel") else tensors[found]
        if array.shape != shape.shape:
            raise UserError(f"{path}: {found} has shape {array.shape}, but config.json asks for {shape.shape}")
        return np.ascontiguousarray(array, np.float32)

    params = jax.tree_util.tree_map_with_path(take, shapes)
    return Checkpoint(model, params, config, location, tuple(sorted(set(tensors) - used)))


def load_tokenizer(location: Path | zipfile.Path) -> Any:
    """The fast tokenizer in a directory, which may lie inside an archive.

    Raises:
        UserError: There is no tokenizer.json.
    """
    from transformers import AutoTokenizer  # imported late: it takes seconds

    if not (location / "tokenizer.json").exists():
        raise UserError(f"{location}: tokenizer.json is missing; a fast tokenizer is needed")
    if isinstance(location, Path):
        return AutoTokenizer.from_pretrained(str(location), local_files_only=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in (*TOKENIZER_FILES, "config.json"):
            if (location / name).exists():
                (Path(folder) / name).write_bytes((location / name).read_bytes())
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _read_json(location: Path | zipfile.Path, name: str) -> dict[str, Any]:
    if not (location / name).exists():
        raise UserError(f"{location}: {name} is missing; a Hugging Face checkpoint directory is needed")
    try:
        return json.loads((location / name).read_bytes())
    except ValueError as error:
        raise UserError(f"{location / name}: not JSON ({error})") from error


def _read_tensors(location: Path | zipfile.Path, path: str) -> dict[str, np.ndarray]:
    file = location / "model.safetensors"
    if not file.exists():
        raise UserError(f"{path}: model.safetensors is missing")
    try:
        return safetensors.numpy.load(file.read_bytes())
    except KeyError as error:
        raise UserError(f"{path}/model.safetensors: tensors of type {error} are not supported; convert to float32") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}/model.safetensors: damaged or not safetensors ({error}); fetch it again") from error
