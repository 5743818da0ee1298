"""Data sets of the Hugging Face hub (hf:), read by `datasets`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import expanded, shown
from mtl_jax.data.formats.records import ClassName, Number, Records, Schema

SCHEME = "hf:"


def is_directory(path: str) -> bool:
    """Whether an hf: path names a local directory."""
    return path.removeprefix(SCHEME).startswith(("/", ".", "~"))


def open_hf(path: str) -> Records:
    """The rows of "hf:ORG/NAME[/CONFIG][#SPLIT]", or of "hf:DIR[#SPLIT]", a directory written by save_to_disk.

    They stay in Arrow files on disk and are read by number. DIR starts with "/", "." or "~". SPLIT is any split expression of
    `datasets`, by default train.

    Raises:
        UserError: `datasets` is not installed, the data set or split does not exist, or it cannot be fetched.
    """
    try:
        import datasets  # imported late: an optional dependency
    except ImportError as error:
        raise UserError(f'{shown(path)}: needs the package `datasets`; pip install "mtl_jax[hf]"') from error
    name, _, split = path.removeprefix(SCHEME).partition("#")
    if is_directory(path):
        data = _from_disk(datasets, path, expanded(name), split)
    else:
        data = _from_hub(datasets, path, name, split or "train")
    return rows_of(data, path)


def rows_of(data: Any, path: str) -> Records:
    """The rows of a datasets.Dataset; the numbers of a ClassLabel become its names.

    Args:
        data: The data set.
        path: Its place, for error lines.
    """
    import datasets

    return Records(path, data, {name: _schema(feature, datasets) for name, feature in data.features.items()})


def _from_disk(datasets: Any, path: str, folder: Path, split: str) -> Any:
    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: not a data set written by save_to_disk ({_reason(error)})") from error
    if not isinstance(data, datasets.DatasetDict):
        if split:
            raise UserError(f"{shown(path)}: this directory has one data set without splits; leave '#{split}' out")
        return data
    if (split or "train") not in data:
        raise UserError(f"{shown(path)}: no split {split or 'train'!r}; splits: {listed(data)}")
    return data[split or "train"]


def _from_hub(datasets: Any, path: str, name: str, split: str) -> Any:
    parts = name.split("/")
    if len(parts) not in (2, 3):
        raise UserError(
            f"{path[:300]}: a hub data set is named hf:ORG/NAME or hf:ORG/NAME/CONFIG; a directory starts with / or ."
        )
    offline = bool(os.environ.get("MTL_JAX_OFFLINE") or os.environ.get("HF_HUB_OFFLINE"))
    try:
        with _no_network(datasets) if offline else contextlib.nullcontext():
            return datasets.load_dataset("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if offline:
            raise UserError(
                f"{shown(path)}: not in the cache of `datasets`, and MTL_JAX_OFFLINE or HF_HUB_OFFLINE is set; "
                f"load it once where there is a network ({_reason(error)})"
            ) from error
        raise UserError(f"{shown(path)}: cannot be loaded ({_reason(error)})") from error


@contextlib.contextmanager
def _no_network(datasets: Any) -> Iterator[None]:
    """Switches the network off in both libraries, which read the environment only when they are imported."""
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _schema(feature: Any, datasets: Any) -> Schema:
    if isinstance(feature, dict):
        return {name: _schema(inner, datasets) for name, inner in feature.items()}
    if isinstance(feature, datasets.ClassLabel):
        return ClassName(tuple(feature.names or ()))
    if isinstance(feature, list):
        return _schema(feature[0], datasets)
    if isinstance(feature, datasets.Value):
        return Number(feature.dtype) if feature.dtype in ("float16", "float32", "float64") else None
    inner = getattr(feature, "feature", None)  # all kinds of lists
    return None if inner is None else _schema(inner, datasets)
