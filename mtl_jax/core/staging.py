"""Directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mtl_jax.core import locks
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import writing


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A directory beside `folder` to write into; it replaces `folder` when the block ends, and is removed if the block fails.

    Args:
        folder: The directory to write. If it exists it is replaced; if it is a link, its target is.

    Raises:
        UserError: The directory cannot be written, or a process trains in it.
    """
    with writing(folder):
        place = folder.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        with writing(folder):
            yield staging
            staging.chmod(0o755)  # only the owner may read a temporary directory
            locks.check_free(place)
            _move(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(folder: Path, file: str, what: str, overwrite: bool) -> None:
    """Checks that a directory may be written: there is none, it is empty, or it may be replaced.

    Args:
        folder: The directory.
        file: A file that every directory of this kind has.
        what: What such a directory holds, with its article, such as "a checkpoint".
        overwrite: Whether such a directory may be replaced.

    Raises:
        UserError: The directory may not be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: it is a file; choose another directory")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / file).exists():
        raise UserError(f"{folder}: not empty, and not {what} ({file} is missing); choose another directory")
    if not overwrite:
        raise UserError(f"{folder}: it holds {what} already; choose another directory, or overwrite it")


def _move(staging: Path, folder: Path) -> None:
    if folder.exists():
        old = staging.with_name(staging.name + ".old")
        folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old)
    else:
        staging.rename(folder)
