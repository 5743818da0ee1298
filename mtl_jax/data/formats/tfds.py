"""Builders of TensorFlow Datasets (tfds:), read without TensorFlow."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import shown
from mtl_jax.data.formats.records import ClassName, Number, Records, Schema

SCHEME = "tfds:"


def open_tfds(path: str) -> Records:
    """The rows of "tfds:NAME[/CONFIG][:VERSION][#SPLIT]", read by number from ArrayRecord files.

    Class numbers become names (-1, a hidden label, becomes None), nested features "a.b". SPLIT is any split expression of TFDS,
    such as train[:80%], by default train. Builders are in $TFDS_DATA_DIR, else ~/tensorflow_datasets; one that is missing is
    downloaded and prepared there, unless MTL_JAX_OFFLINE is set.

    Raises:
        UserError: The builder, config, version or split does not exist, or cannot be prepared.
    """
    tfds = _library()
    name, _, split = path.removeprefix(SCHEME).partition("#")
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"{shown(path)}: TFDS has no text, translation or summarisation builder {shown(name)!r}") from error
    except (ValueError, AssertionError) as error:  # an unknown config or version
        raise UserError(f"{shown(path)}: {_reason(error)}") from error
    except ImportError as error:  # its features have TensorFlow's types, or its module needs another package
        raise UserError(
            f"{shown(path)}: the code of this builder does not load ({_reason(error)}); "
            "load it where TensorFlow is installed, write its rows as JSONL, and give that file as path"
        ) from error
    _prepare(path, name, builder)
    try:
        records = builder.as_data_source(split=split or "train")
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{shown(path)}: {_reason(error)}") from error
    return Records(path, records, _schema(builder.info.features, tfds.features))


@functools.cache
def _library() -> ModuleType:
    import tensorflow_datasets as tfds  # imported late: it takes half a second

    # Without TensorFlow tfds.builder knows only the builders of modules that are imported.
    import tensorflow_datasets.question_answering
    import tensorflow_datasets.summarization
    import tensorflow_datasets.text
    import tensorflow_datasets.text_simplification
    import tensorflow_datasets.translate

    return tfds


def _prepare(path: str, name: str, builder: Any) -> None:
    if builder.is_prepared():
        if builder.info.file_format and builder.info.file_format.value != "array_record":
            raise UserError(
                f"{path}: {builder.data_path} has {builder.info.file_format.value} files, which cannot be read by number; "
                f"{_advice(name)}, with TFDS_DATA_DIR set to another directory"
            )
        return
    if os.environ.get("MTL_JAX_OFFLINE"):
        raise UserError(
            f"{shown(path)}: not in {builder.data_path}, and MTL_JAX_OFFLINE is set; {_advice(name)}, where there is a network"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:  # the network, the builder's own code
        raise UserError(
            f"{shown(path)}: cannot be prepared ({_reason(error)}); check the network and the data set's page"
        ) from error


def _advice(name: str) -> str:
    return f"prepare it with `python -c \"import mtl_jax.data.formats.tfds as t; t.open_tfds('tfds:{name}')\"`"


def _reason(error: Exception) -> str:
    """The reason in a message of TFDS, which has many lines: the last clause of the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0]
    if text.startswith("Failed to construct dataset"):
        text = text.rpartition('": ')[2]
    return text[:300].rstrip(".")


def _schema(feature: Any, features: Any) -> Schema:
    if isinstance(feature, features.FeaturesDict):
        return {name: _schema(inner, features) for name, inner in feature.items()}
    if isinstance(feature, features.ClassLabel):
        try:
            return ClassName(tuple(feature.names))
        except ValueError:  # raised by TFDS if a label has a number of classes, but no names
            return ClassName()
    if isinstance(feature, features.Sequence):
        return _schema(feature.feature, features)
    dtype = np.dtype(feature.np_dtype)
    return Number(dtype.name) if np.issubdtype(dtype, np.floating) else None
