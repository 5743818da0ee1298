"""Target texts: labels that are texts, as the tokens that a decoder learns, and from tokens back to text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.data import tokenize as tokenizing
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels, UnreadableTexts, label_problem
from mtl_jax.data.ragged import Ragged
from mtl_jax.data.tokenize import RowError
from mtl_jax.pretrained import language_codes


class Targets(NamedTuple):
    """The target texts of rows.

    Attributes:
        tokens: For each row i32[len], the end token included; empty if the row has no target text.
        blank: Number of rows without a target text.
        truncated: Number of rows whose text was too long.
    """

    tokens: Ragged
    blank: int
    truncated: int


def encode(task: Labels, rows: list[Row], tokenizer: Any, cache: Path | None = None) -> Targets:
    """Tokens of the target text of each row; of several texts the first one is learned.

    Args:
        task: A task with target texts.
        rows: The rows.
        tokenizer: A transformers tokenizer.
        cache: As for data.tokenize.encode.

    Raises:
        UserError: A row's target is not text; names file and line.
        UnreadableTexts: It has no token that the vocabulary knows, or is not valid Unicode.
    """
    texts, indices = [], []
    for index, row in enumerate(rows):
        try:
            targets = task.parse(row)
        except ValueError as error:
            raise UserError(f"{row.where}: task {task.name!r}: {label_problem(task, error)}") from error
        if targets:
            texts.append(targets[0])
            indices.append(index)
    most = task.target_length + task.leading
    try:
        encoded = tokenizing.encode(tokenizer, texts, max_length=most, target=True, cache=cache)
    except RowError as error:
        refused = [indices[text] for text in error.rows]
        raise UnreadableTexts(refused, f"{rows[refused[0]].where}: task {task.name!r}: {error.reason}") from error
    special = tokenizer.num_special_tokens_to_add(pair=False)
    empty = np.flatnonzero(encoded.tokens.lengths <= special)
    if len(empty):
        refused = [indices[text] for text in empty]
        where = rows[refused[0]].where
        raise UnreadableTexts(refused, f"{where}: task {task.name!r}: the target text has no token that the vocabulary knows")
    lengths = np.zeros(len(rows), np.int64)
    lengths[indices] = encoded.tokens.lengths - task.leading
    kept = np.ones(len(encoded.tokens.values), bool)
    for skipped in range(task.leading):
        kept[encoded.tokens.starts[:-1] + skipped] = False
    tokens = Ragged(np.ascontiguousarray(encoded.tokens.values[kept]), tokenizing.starts_of(lengths))
    return Targets(tokens, len(rows) - len(texts), len(encoded.truncated))


def decoder(tokenizer: Any) -> Callable[[Sequence[int] | np.ndarray], str]:
    """A function from generated token ids to plain text on one line, without special tokens; for fast and slow tokenizers."""
    # Else Marian's would join the pieces with the vocabulary of the source language.
    options = {"use_source_tokenizer": False} if hasattr(tokenizer, "spm_target") else {}
    # M2M100's tokenizer keeps them where its files do not list them as special.
    languages = frozenset(language_codes.ids(tokenizer).values())

    def decode(tokens: Sequence[int] | np.ndarray) -> str:
        text = tokenizer.decode([int(token) for token in tokens if token not in languages], skip_special_tokens=True, **options)
        return " ".join(part for line in text.splitlines() if (part := line.strip()))

    return decode
