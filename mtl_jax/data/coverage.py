"""Checks that the model's tables have a row for every token, and remarks on texts that the vocabulary does not know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core import row_texts
from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.data.examples import Examples
from mtl_jax.data.labels import Labels
from mtl_jax.data.ragged import Ragged
from mtl_jax.pretrained.locate import languages

NOTED = 0.01  # smallest share of unknown tokens, or of answers that begin or end inside a token, for a remark


class Tables(NamedTuple):
    """Numbers of rows of a trunk's tables: a look-up beyond them is NaN, which spreads over every text of a packed row.

    Attributes:
        tokens: Rows of the token table.
        types: Rows of the table of token types; None if the trunk has none.
        owner: The owner's name, for errors.
    """

    tokens: int
    types: int | None = None
    owner: str = "the trunk"


def out_of_range(arrays: Sequence[np.ndarray], rows: int) -> dict[int, int]:
    """{index of an array: its first id that a table of so many rows has no row for}, ascending.

    Args:
        arrays: N arrays i32[length].
        rows: Rows of the table.
    """
    ragged = arrays if isinstance(arrays, Ragged) else Ragged.of(arrays, np.int32)
    if not len(ragged.values) or (int(ragged.values.max()) < rows and int(ragged.values.min()) >= 0):
        return {}
    bad = np.flatnonzero((ragged.values >= rows) | (ragged.values < 0))
    indices = np.searchsorted(ragged.starts, bad, side="right") - 1
    indices, first = np.unique(indices, return_index=True)
    return dict(zip(indices.tolist(), ragged.values[bad[first]].tolist(), strict=True))


def unreadable_rows(examples: Examples, tokenizer: Any, tables: Tables) -> dict[int, str]:
    """{index of a row in examples.data: why the trunk cannot read it}, ascending.

    Args:
        examples: Tokenised rows.
        tokenizer: Their tokenizer.
        tables: The trunk's.
    """
    rows, table = tables.tokens, f"the token table of {tables.owner}"
    reasons = {i: missing_row_reason(tokenizer, token, rows, table) for i, token in out_of_range(examples.tokens, rows).items()}
    if tables.types is not None and examples.types is not None:
        for i, kind in out_of_range(examples.types, tables.types).items():
            reasons.setdefault(i, f"a token has the type {kind}, but {tables.owner} has {tables.types} types of tokens")
    row_of, by_row = examples.row_of, dict[int, str]()
    for i in sorted(reasons):
        by_row.setdefault(int(row_of[i]), reasons[i])
    return by_row


def missing_row_reason(tokenizer: Any, token: int, rows: int, table: str) -> str:
    """Why a token cannot be read; names the token, its id, and the rows of the table."""
    return (
        f"the token {_piece(tokenizer, token)} has the id {token}, but {table} has {rows} rows; take the checkpoint's own "
        "tokenizer, or resize the checkpoint to the tokenizer"
    )


def _piece(tokenizer: Any, token: int) -> str:
    try:
        return row_texts.quoted(str(tokenizer.convert_ids_to_tokens(token))[:60])
    except (IndexError, KeyError, OverflowError, ValueError):  # the tokenizer itself does not have the id
        return "without a name"


def check(parts: Iterable[Examples], tasks: Sequence[Any], tokenizer: Any, tables: Tables) -> None:
    """Checks that the model has a row for every token of examples and target texts.

    Args:
        parts: Examples with the labels of the tasks.
        tasks: Tasks, put on the trunk.
        tokenizer: The tokenizer of the examples.
        tables: The trunk's.

    Raises:
        UserError: It has none; names the file and line, the token, its id and the size of the table.
    """
    for part in parts:
        for index, reason in unreadable_rows(part, tokenizer, tables).items():
            raise UserError(f"{_where(part, index)}: {reason}")
        for task in tasks:
            if task.source == part.source and task.label_level == "target" and task.name in part.labels:
                rows = task.decoder.decoder_vocab_size
                for i, token in out_of_range(part.labels[task.name], rows).items():
                    reason = missing_row_reason(tokenizer, token, rows, "the decoder's vocabulary")
                    raise UserError(f"{_where(part, int(part.row_of[i]))}: task {task.name!r}: {reason}")


def _where(part: Examples, index: int) -> str:
    return part.data[index].where if len(part.data) else f"source {part.source!r}, row {index + 1}"


class UnknownTokens(NamedTuple):
    """The unknown tokens of some texts.

    Attributes:
        share: Their share of all tokens, special tokens not counted.
        row: The first row with one.
    """

    share: float
    row: int


def unknown_tokens(arrays: Sequence[np.ndarray], tokenizer: Any) -> UnknownTokens:
    """The share of unknown tokens; 0 if the vocabulary has no unknown token.

    Args:
        arrays: N arrays i32[length], special tokens included.
        tokenizer: Their tokenizer.
    """
    ragged = arrays if isinstance(arrays, Ragged) else Ragged.of(arrays, np.int32)
    token = getattr(tokenizer, "unk_token_id", None)
    if token is None or not len(ragged.values):
        return UnknownTokens(0.0, 0)
    unknown = np.flatnonzero(ragged.values == token)
    special = sorted(set(tokenizer.all_special_ids) - {token})
    total = len(ragged.values) - int(np.isin(ragged.values, special).sum())
    row = int(np.searchsorted(ragged.starts, unknown[0], side="right")) - 1 if len(unknown) else 0
    return UnknownTokens(len(unknown) / total if total else 0.0, row)


def remarks(what: str, parts: Sequence[Examples], tasks: Sequence[Labels], tokenizer: Any, columns: Sequence[str]) -> list[str]:
    """Lines on unknown tokens in texts and in target texts; none if there are few.

    Args:
        what: A name of the texts, for example "source reviews".
        parts: The examples of one source, split by split.
        tasks: Its tasks.
        tokenizer: Their tokenizer.
        columns: The text columns of the source.
    """
    groups = [(what, [part.tokens for part in parts], columns)]
    for task in tasks:
        if task.label_level == "target" and all(task.name in part.labels for part in parts):
            groups.append((f"{what}, targets of {task.name}", [part.labels[task.name] for part in parts], task.text_columns))
    return [line for name, arrays, names in groups for line in _line(name, arrays, parts, tokenizer, names)]


def language_remarks(what: str, parts: Sequence[Examples], tasks: Sequence[Labels], tokenizer: Any) -> list[str]:
    """Lines on the language tokens of a multilingual checkpoint; arguments as for remarks()."""
    if languages(tokenizer) and not any(task.languages[0] for task in tasks):
        name = getattr(tokenizer, "src_lang", None)
        return [f"{what}: the tokenizer marks every text as {name}; to change this, set src_lang in its tokenizer_config.json"]
    codes = list(getattr(tokenizer, "supported_language_codes", ()))
    if not codes or not any(task.label_level == "target" for task in tasks):
        return []
    known = tokenizer.convert_tokens_to_ids(codes)
    firsts = [tokens[0] for part in parts for tokens in part.tokens if len(tokens)]
    without = len(firsts) - int(np.isin(firsts, known).sum())
    line = f"{what}: {without} of {count(len(firsts), 'text')} do not begin with the language that the checkpoint shall write"
    return [f"{line} ({listed(codes)})"] if without else []


def remarks_on_texts(tokenizer: Any, texts: Sequence[str], tokens: Sequence[np.ndarray]) -> list[str]:
    """A line on unknown tokens in plain texts; none if there are few.

    Args:
        tokenizer: Their tokenizer.
        texts: The texts.
        tokens: For each text i32[length].
    """
    unknown = unknown_tokens(tokens, tokenizer)
    if unknown.share < NOTED:
        return []
    return [_remark("texts", [unknown.share], unknown_piece(tokenizer, texts[unknown.row]))]


def _line(what: str, arrays: Sequence[Any], parts: Sequence[Examples], tokenizer: Any, columns: Sequence[str]) -> list[str]:
    unknown = [unknown_tokens(tokens, tokenizer) for tokens in arrays]
    worst = max(range(len(unknown)), key=lambda i: unknown[i].share)
    if unknown[worst].share < NOTED:
        return []
    part, example = parts[worst], unknown[worst].row
    row = part.data[int(part.row_of[example])] if len(part.data) else None
    pieces = () if row is None else (unknown_piece(tokenizer, row.columns.get(name)) for name in columns)
    return [_remark(what, [tokens.share for tokens in unknown], next(filter(None, pieces), None))]


def _remark(what: str, shares: Sequence[float], word: str | None) -> str:
    """The line; the shares are those of one part, or of training, dev and test."""
    numbers = "/".join(f"{100 * share:.1f}" for share in shares)
    where = " (train/dev/test)" if len(shares) == 3 else ""
    return f"{what}: the vocabulary does not know {numbers} % of the tokens{where}" + (
        f", such as {row_texts.quoted(word[:60])}" if word and not row_texts.are_hidden() else ""
    )


def unknown_piece(tokenizer: Any, text: Any) -> str | None:
    """The first piece of a text, or of a list of words or texts, that the vocabulary does not know; None if it knows all."""
    if isinstance(text, list):
        return next(filter(None, (unknown_piece(tokenizer, item) for item in text)), None)
    if not isinstance(text, str):
        return None
    if not getattr(tokenizer, "is_fast", False):
        pieces = tokenizer.tokenize(text)
        ids = tokenizer.convert_tokens_to_ids(pieces)
        return next((piece.strip("▁ ") for piece, i in zip(pieces, ids, strict=True) if i == tokenizer.unk_token_id), None)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return next((text[start:end].strip() for i, (start, end) in tokens if i == tokenizer.unk_token_id), None)
