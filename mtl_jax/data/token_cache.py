"""The names of tokenised texts in the cache: a hash of texts, tokenizer and options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

WHAT = "token"  # the cache's name in the log
FORMAT = 1  # of entries, and of what encode() makes: raise it when either changes
SETTINGS = ("model_input_names", "truncation_side", "split_special_tokens")  # of a tokenizer, beside its tokenizer.json


def key(tokenizer: Any, options: Mapping[str, Any], *columns: Sequence[str] | Sequence[list[str]]) -> str:
    """SHA-256 (hex) of a tokenizer, options and texts, the versions of the libraries included.

    Args:
        tokenizer: A transformers fast tokenizer.
        options: What else the result depends on; JSON-able.
        columns: Columns of texts, or of texts as lists of words.
    """
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left there by whoever called the tokenizer last
        vocabulary.pop(state)
    about = {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
        "tokenizer": vocabulary,
        "settings": {name: getattr(tokenizer, name) for name in SETTINGS},
        "options": dict(options),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for texts in columns:
        digest.update(f"\0column of {len(texts)}\0".encode())
        for start in range(0, len(texts), 4096):
            _add(digest, texts[start : start + 4096])
    return digest.hexdigest()


def _add(digest: Any, texts: Sequence[str] | Sequence[list[str]]) -> None:
    """Adds texts to a hash: the lengths, then all characters, so that no two lists of texts look alike."""
    strings: Sequence[str] = texts  # type: ignore[assignment]
    if texts and not isinstance(texts[0], str):
        digest.update(np.array([len(words) for words in texts], np.int64).tobytes())
        strings = [word for words in texts for word in words]
    digest.update(np.array([len(string) for string in strings], np.int64).tobytes())
    digest.update("".join(strings).encode("utf-8", "surrogatepass"))
