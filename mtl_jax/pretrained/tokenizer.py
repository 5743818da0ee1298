"""The tokenizer of a checkpoint directory."""

from __future__ import annotations

import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

from mtl_jax.errors import UserError

# What holds the vocabulary; one of them must be there.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
)
FILES = (
    *VOCABULARIES,
    "target.spm",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def load_tokenizer(location: Path | zipfile.Path) -> Any:
    """The tokenizer in a directory, which may lie inside an archive.

    Raises:
        UserError: There is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer  # imported late: it takes seconds

    if not any((location / name).exists() for name in VOCABULARIES):
        raise UserError(f"{location}: no tokenizer there ({', '.join(VOCABULARIES)}); copy it from the checkpoint's source")

    def read(folder: str) -> Any:
        try:
            with warnings.catch_warnings():
                # Marian's tokenizer asks for a package for a method of its own that nothing calls.
                warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError) as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{location}: transformers cannot read the tokenizer ({first[0]})") from error

    if isinstance(location, Path):
        return read(str(location))
    with tempfile.TemporaryDirectory() as folder:
        copy_files(location, Path(folder), (*FILES, "config.json"))
        return read(folder)


def languages(tokenizer: Any) -> tuple[str, ...]:
    """The languages that a tokenizer marks texts by, where its files do not say which ones are meant; else ().

    mBART, mBART-50, NLLB and M2M-100 take English for what nobody said, of texts and of their translations alike.
    """
    settings = getattr(tokenizer, "init_kwargs", {})
    if not hasattr(tokenizer, "tgt_lang") or (settings.get("src_lang") and settings.get("tgt_lang")):
        return ()
    codes = getattr(tokenizer, "lang_code_to_id", None) or getattr(tokenizer, "extra_special_tokens", None) or ()
    return tuple(map(str, codes)) or ("none",)


def copy_files(source: Path | zipfile.Path, target: Path, names: tuple[str, ...]) -> None:
    """Copies those of the files that there are."""
    for name in names:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())
