"""What a model's tables lack of the tokens that it is given, and what a vocabulary lacks of the texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.data.examples import Examples
from mtl_jax.data.labels import Labels
from mtl_jax.data.ragged import Ragged
from mtl_jax.pretrained.locate import languages

NOTED = 0.01  # share of unknown tokens, or of answers off the edges of tokens, that is worth a line


class Tables(NamedTuple):
    """Rows of a trunk's tables: a look-up beyond them is NaN, which spreads over every text of a packed row.

    Attributes:
        tokens: Of the token table.
        types: Of the table of token types; None where the trunk has none.
        of: Whose they are, for errors.
    """

    tokens: int
    types: int | None = None
    of: str = "the trunk"


def beyond(arrays: Sequence[np.ndarray], rows: int) -> dict[int, int]:
    """{place of an array: its first id for which a table of so many rows has no row}, ascending.

    Args:
        arrays: N arrays i32[length].
        rows: Of the table.
    """
    ragged = arrays if isinstance(arrays, Ragged) else Ragged.of(arrays, np.int32)
    if not len(ragged.values) or (int(ragged.values.max()) < rows and int(ragged.values.min()) >= 0):
        return {}
    at = np.flatnonzero((ragged.values >= rows) | (ragged.values < 0))
    places = np.searchsorted(ragged.starts, at, side="right") - 1
    places, first = np.unique(places, return_index=True)
    return dict(zip(places.tolist(), ragged.values[at[first]].tolist(), strict=True))


def unfit(examples: Examples, tokenizer: Any, tables: Tables) -> dict[int, str]:
    """{place of a row in examples.data: why the trunk cannot read it}, ascending; empty where it reads them all.

    Args:
        examples: Rows, tokenised.
        tokenizer: What tokenised them.
        tables: The trunk's.
    """
    rows, table = tables.tokens, f"the token table of {tables.of}"
    reasons = {i: without_row(tokenizer, token, rows, table) for i, token in beyond(examples.tokens, rows).items()}
    if tables.types is not None and examples.types is not None:
        for i, kind in beyond(examples.types, tables.types).items():
            reasons.setdefault(i, f"a token has the type {kind}, but {tables.of} has {tables.types} types of tokens")
    row_of, found = examples.row_of, dict[int, str]()
    for i in sorted(reasons):
        found.setdefault(int(row_of[i]), reasons[i])
    return found


def without_row(tokenizer: Any, token: int, rows: int, table: str) -> str:
    """Why a token cannot be read: its name, its id, and the rows of the table."""
    return (
        f"the token {_piece(tokenizer, token)} has the id {token}, but {table} has {rows} rows; take the checkpoint's own "
        "tokenizer, or resize the checkpoint to the tokenizer"
    )


def _piece(tokenizer: Any, token: int) -> str:
    try:
        return repr(str(tokenizer.convert_ids_to_tokens(token))[:60])
    except (IndexError, KeyError, OverflowError, ValueError):  # an id that the tokenizer itself does not have
        return "without a name"


def check(parts: Iterable[Examples], tasks: Sequence[Any], tokenizer: Any, tables: Tables) -> None:
    """Refuses examples, and target texts of tasks that decode, with a token that the model has no row for.

    Args:
        parts: Examples with the labels of the tasks.
        tasks: Tasks, put on the trunk.
        tokenizer: What tokenised them.
        tables: The trunk's.

    Raises:
        UserError: There is one; names the file and line, the token, its id and the size of the table.
    """
    for part in parts:
        for place, reason in unfit(part, tokenizer, tables).items():
            raise UserError(f"{_where(part, place)}: {reason}")
        for task in tasks:
            if task.source == part.source and task.label_level == "target" and task.name in part.labels:
                rows = task.decoder.decoder_vocab_size
                for i, token in beyond(part.labels[task.name], rows).items():
                    reason = without_row(tokenizer, token, rows, "the decoder's vocabulary")
                    raise UserError(f"{_where(part, int(part.row_of[i]))}: task {task.name!r}: {reason}")


def _where(part: Examples, place: int) -> str:
    return part.data[place].where if len(part.data) else f"source {part.source!r}, row {place + 1}"


class Unknown(NamedTuple):
    """How much of some texts a vocabulary does not know.

    Attributes:
        share: Of the tokens, without special ones, those that stand for what is unknown.
        row: The first row with one.
    """

    share: float
    row: int


def unknown(arrays: Sequence[np.ndarray], tokenizer: Any) -> Unknown:
    """The share of unknown tokens; 0 for a vocabulary without a token for them.

    Args:
        arrays: N arrays i32[length], special tokens included.
        tokenizer: What made them.
    """
    ragged = arrays if isinstance(arrays, Ragged) else Ragged.of(arrays, np.int32)
    token = getattr(tokenizer, "unk_token_id", None)
    if token is None or not len(ragged.values):
        return Unknown(0.0, 0)
    at = np.flatnonzero(ragged.values == token)
    special = sorted(set(tokenizer.all_special_ids) - {token})
    total = len(ragged.values) - int(np.isin(ragged.values, special).sum())
    row = int(np.searchsorted(ragged.starts, at[0], side="right")) - 1 if len(at) else 0
    return Unknown(len(at) / total if total else 0.0, row)


def remarks(what: str, parts: Sequence[Examples], tasks: Sequence[Labels], tokenizer: Any, columns: Sequence[str]) -> list[str]:
    """Lines on what the vocabulary does not know: of texts, and of target texts; none where it is little.

    Args:
        what: What the texts are, for example "source reviews".
        parts: The examples of one source, split by split.
        tasks: Its tasks.
        tokenizer: What tokenised them.
        columns: The text columns of the source.
    """
    found = [(what, [part.tokens for part in parts], columns)]
    for task in tasks:
        if task.label_level == "target" and all(task.name in part.labels for part in parts):
            found.append((f"{what}, targets of {task.name}", [part.labels[task.name] for part in parts], task.text_columns))
    return [line for named, arrays, names in found for line in _line(named, arrays, parts, tokenizer, names)]


def language_remarks(what: str, parts: Sequence[Examples], tasks: Sequence[Labels], tokenizer: Any) -> list[str]:
    """Lines on languages that a checkpoint of several is told by tokens; arguments as for remarks()."""
    if languages(tokenizer):
        name = getattr(tokenizer, "src_lang", None)
        return [
            f"{what}: the tokenizer marks every text as {name}; src_lang in its tokenizer_config.json says another language"
        ]
    codes = list(getattr(tokenizer, "supported_language_codes", ()))
    if not codes or not any(task.label_level == "target" for task in tasks):
        return []
    known = tokenizer.convert_tokens_to_ids(codes)
    firsts = [tokens[0] for part in parts for tokens in part.tokens if len(tokens)]
    without = len(firsts) - int(np.isin(firsts, known).sum())
    said = f"{what}: {without} of {count(len(firsts), 'text')} do not begin with the language that the checkpoint is to write"
    return [f"{said} ({listed(codes)})"] if without else []


def remarks_on_texts(tokenizer: Any, texts: Sequence[str], tokens: Sequence[np.ndarray]) -> list[str]:
    """The same of plain texts.

    Args:
        tokenizer: What tokenised them.
        texts: The texts.
        tokens: Of each i32[length].
    """
    found = unknown(tokens, tokenizer)
    return [_said("texts", [found.share], example(tokenizer, texts[found.row]))] if found.share >= NOTED else []


def _line(what: str, arrays: Sequence[Any], parts: Sequence[Examples], tokenizer: Any, columns: Sequence[str]) -> list[str]:
    shares = [unknown(tokens, tokenizer) for tokens in arrays]
    worst = max(range(len(shares)), key=lambda i: shares[i].share)
    if shares[worst].share < NOTED:
        return []
    part, place = parts[worst], shares[worst].row
    row = part.data[int(part.row_of[place])] if len(part.data) else None
    word = None if row is None else next(filter(None, (example(tokenizer, row.columns.get(name)) for name in columns)), None)
    return [_said(what, [each.share for each in shares], word)]


def _said(what: str, shares: Sequence[float], word: str | None) -> str:
    """The line; the shares are of one part, or of training, dev and test."""
    numbers = "/".join(f"{100 * share:.1f}" for share in shares)
    where = " (train/dev/test)" if len(shares) == 3 else ""
    return f"{what}: the vocabulary does not know {numbers} % of the tokens{where}" + (
        f", such as {word[:60]!r}" if word else ""
    )


def example(tokenizer: Any, text: Any) -> str | None:
    """The first piece of a text, or of a list of words or texts, that a vocabulary does not know; None: it knows all."""
    if not isinstance(text, str):
        return next(filter(None, (example(tokenizer, one) for one in text or ())), None) if isinstance(text, list) else None
    if not getattr(tokenizer, "is_fast", False):
        pieces = tokenizer.tokenize(text)
        ids = tokenizer.convert_tokens_to_ids(pieces)
        return next((piece.strip("▁ ") for piece, i in zip(pieces, ids, strict=True) if i == tokenizer.unk_token_id), None)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return next((text[start:end].strip() for i, (start, end) in places if i == tokenizer.unk_token_id), None)
