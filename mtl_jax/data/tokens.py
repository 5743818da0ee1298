"""Texts to token ids: with a checkpoint's fast tokenizer, in windows where a text is longer than a row."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import DTypeLike

from mtl_jax.errors import UserError

BATCH = 4096  # texts handed to the tokenizer at once: enough to keep every core busy, little enough to hold in memory


class Ragged(Sequence[np.ndarray]):
    """Arrays of different length, end to end in one flat array; item i is a view of it.

    Attributes:
        values: [total, ...], the arrays one after another; may be memory-mapped.
        starts: i64[N + 1]; array i is values[starts[i] : starts[i + 1]].
    """

    def __init__(self, values: np.ndarray, starts: np.ndarray):
        self.values = values
        self.starts = starts

    @classmethod
    def of(cls, arrays: Iterable[Any], dtype: DTypeLike, shape: tuple[int, ...] = ()) -> Ragged:
        """Copies arrays of shape [length, *shape] together.

        Args:
            arrays: Any number of them, empty ones included.
            dtype: The dtype of the result.
            shape: Their shape after the first axis.
        """
        parts = [np.asarray(array, dtype).reshape(-1, *shape) for array in arrays]
        values = np.concatenate(parts) if parts else np.empty((0, *shape), dtype)
        return cls(values, starts_of([len(part) for part in parts]))

    @property
    def lengths(self) -> np.ndarray:
        """i64[N], the length of each array."""
        return np.diff(self.starts)

    def equals(self, other: Ragged) -> bool:
        """Whether the other holds the same arrays in the same dtype."""
        same = self.values.dtype == other.values.dtype and self.values.shape == other.values.shape
        return same and np.array_equal(self.starts, other.starts) and np.array_equal(self.values, other.values)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Ragged:
        if isinstance(index, slice):
            first, end, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a slice of a Ragged must have step 1")
            starts = self.starts[first : max(first, end) + 1]
            return Ragged(self.values[starts[0] : starts[-1]], starts - starts[0])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.values[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        starts = self.starts.tolist()
        return (self.values[start:end] for start, end in itertools.pairwise(starts))


def starts_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """i64[N + 1]: where arrays of these lengths start, end to end."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


class Encodings(NamedTuple):
    """Texts as token ids, in N windows; a text that fits in a row is one window.

    Attributes:
        tokens: N arrays i32[length], special tokens included; empty where the vocabulary knows nothing of the text.
        types: N arrays i32[length], the token types of pairs; None where all are 0 or the tokenizer makes none.
        words: For texts given as words, N arrays i32[length]: the word's index in its text at the word's first sub-word,
            -1 at every other token. A word of which the vocabulary knows nothing has no token. None for other texts.
        offsets: Where asked for, N arrays i32[length, 2]: the span of characters that a token stands for in the second text of
            a pair, or in the only text; (-1, -1) at other tokens.
        rows: i32[N], the text that each window is of; ascending, every text has at least one.
        cut: i64[M], the texts that were shortened, ascending.
    """

    tokens: Ragged
    types: Ragged | None
    words: Ragged | None
    offsets: Ragged | None
    rows: np.ndarray
    cut: np.ndarray


class RowError(UserError):
    """A text that cannot be encoded; whoever knows its file and line raises a UserError with them and `reason`.

    Attributes:
        row: Its place among the texts.
        reason: What is wrong, and what to do.
    """

    def __init__(self, row: int, reason: str):
        super().__init__(f"text {row}: {reason}")
        self.row = row
        self.reason = reason


def encode(
    tokenizer: Any,
    first: Sequence[str] | Sequence[list[str]],
    second: Sequence[str] | None = None,
    *,
    max_length: int,
    windows: bool = False,
    stride: int = 0,
    offsets: bool = False,
    cache: Path | None = None,
) -> Encodings:
    """Token ids of texts, of pairs of texts, or of texts that are divided into words.

    A text longer than max_length is cut, pairs at the longer text first, and named in `cut`. Or, with windows, it becomes
    several windows: of a pair the second text is divided and the first stands in every window; a text of words is divided
    between words, a window taking as many as fit (a single word longer than a row is divided between sub-words).

    Words are tokenised as in running text, that is, as " ".join(words) would be where the vocabulary knows spaces.

    Args:
        tokenizer: A transformers fast tokenizer.
        first: The texts; or for each text its words.
        second: The second texts of pairs.
        max_length: Longest window in tokens, special tokens included.
        windows: Divide long texts instead of cutting them.
        stride: Tokens that consecutive windows of a text share; 0 for texts of words.
        offsets: Also say which characters a token stands for; not for texts of words.
        cache: A directory where results are kept; None: nothing is.

    Raises:
        RowError: A text is no valid Unicode, or leaves no room in a window for the text beside it.
        UserError: The tokenizer is no fast one, or max_length leaves no room for text.
    """
    as_words = len(first) > 0 and not isinstance(first[0], str)
    if as_words and (second is not None or stride or offsets):
        raise ValueError("texts of words take no second text, stride or offsets")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} is no fast tokenizer; the checkpoint needs a tokenizer.json")
    options = _Options(max_length, windows, stride, offsets, as_words, as_words and _splits_at_spaces(tokenizer))
    parts = []
    for start in range(0, len(first), BATCH):
        stop = start + BATCH
        parts.append(
            _encode_batch(tokenizer, first[start:stop], None if second is None else second[start:stop], start, options)
        )
    return _join(parts, options)


class _Options(NamedTuple):
    max_length: int
    windows: bool
    stride: int
    offsets: bool
    words: bool
    spaces: bool  # a word that follows another is given with a space before it


class _Part(NamedTuple):
    """The encodings of a batch of texts.

    Attributes:
        columns: i32[total, C], for each token its id, type, and as asked for word, or first and last character.
        lengths: i64[N], of each window.
        rows: i32[N], the text it is of.
        cut: i64[M], texts that were shortened.
    """

    columns: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    cut: np.ndarray


def _encode_batch(tokenizer: Any, first: Sequence[Any], second: Sequence[str] | None, row: int, options: _Options) -> _Part:
    """The encodings of texts row, row + 1, ..."""
    for texts in (first, second or ()):
        _check_unicode(texts, row)
    if options.spaces:
        first = [[*words[:1], *(f" {word}" for word in words[1:])] for words in first]
    encoded = tokenizer(
        list(first),
        None if second is None else list(second),
        is_split_into_words=options.words,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    ).encodings
    columns = [_flat(e.ids for e in encoded), np.zeros(0, np.int32)]
    columns[1] = _flat(e.type_ids for e in encoded) if _has_types(tokenizer) else np.zeros_like(columns[0])
    starts = starts_of([len(e) for e in encoded])
    if options.words:
        columns.append(_first_of_word(_flat((-1 if w is None else w for w in e.word_ids) for e in encoded), starts))
    if options.offsets:
        spans = [_spans(e, second is not None) for e in encoded]
        columns += list(np.concatenate(spans).T)
    picked, lengths, rows, cut = [], [], [], []
    for i, encoding in enumerate(encoded):
        start, stop = starts[i], starts[i + 1]
        if stop - start <= options.max_length:
            kept = [np.arange(stop - start)]
        elif options.windows:
            kept = _divide(encoding, second is not None, row + i, options)
        else:
            kept = [_cut(encoding, tokenizer.truncation_side, options.max_length)]
            cut.append(row + i)
        picked += [start + places for places in kept]
        lengths += [len(places) for places in kept]
        rows += [row + i] * len(kept)
    table = np.stack(columns, axis=1)[np.concatenate(picked)]
    return _Part(table, np.array(lengths, np.int64), np.array(rows, np.int32), np.array(cut, np.int64))


def _join(parts: Sequence[_Part], options: _Options) -> Encodings:
    width = 2 + options.words + 2 * options.offsets
    empty = _Part(np.zeros((0, width), np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64))
    table, lengths, rows, cut = (np.concatenate(same) for same in zip(empty, *parts, strict=True))
    starts = starts_of(lengths)

    def column(at: slice | int) -> Ragged:
        return Ragged(np.ascontiguousarray(table[:, at]), starts)

    return Encodings(
        tokens=column(0),
        types=column(1) if table[:, 1].any() else None,
        words=column(2) if options.words else None,
        offsets=column(slice(2, 4)) if options.offsets else None,
        rows=rows,
        cut=cut,
    )


def _cut(encoding: Any, side: str, max_length: int) -> np.ndarray:
    """Which tokens stay of one that is too long: the special ones, and as many of its one or two texts as there is room for."""
    sequence = _sequence(encoding)
    texts = [np.flatnonzero(sequence == number) for number in (0, 1) if (sequence == number).any()]
    room = max_length - int((sequence < 0).sum())
    if room < len(texts):
        raise UserError(f"rows of {max_length} tokens leave no room for text between the special tokens; make them longer")
    if len(texts) == 1:
        shares = [room]
    else:
        # The longer text is cut down to the length of the shorter, then both equally.
        shorter = min(len(texts[0]), len(texts[1]), room // 2)
        shares = [shorter, room - shorter] if len(texts[0]) <= len(texts[1]) else [room - shorter, shorter]
    kept = [text[len(text) - share :] if side == "left" else text[:share] for text, share in zip(texts, shares, strict=True)]
    return np.sort(np.concatenate([np.flatnonzero(sequence < 0), *kept]))


def _divide(encoding: Any, pair: bool, row: int, options: _Options) -> list[np.ndarray]:
    """Which tokens stand in each window of one that is too long: all that are not divided, and a piece of the text that is."""
    sequence = _sequence(encoding)
    text, beside = np.flatnonzero(sequence == pair), np.flatnonzero(sequence != pair)
    room = options.max_length - len(beside)
    if room <= options.stride:
        raise RowError(
            row,
            f"{len(beside)} tokens stand beside the divided text in every window of {options.max_length}, which leaves {room} "
            f"for it, with a stride of {options.stride}; shorten them, lower the stride or lengthen the rows",
        )
    if options.words:
        pieces = _word_pieces(np.array(encoding.word_ids, dtype=object)[text], room)
    else:
        ends = range(room, len(text) + room - options.stride, room - options.stride)
        pieces = [(end - room, min(end, len(text))) for end in ends]
    return [np.sort(np.concatenate([beside, text[start:end]])) for start, end in pieces]


def _word_pieces(word_ids: np.ndarray, room: int) -> list[tuple[int, int]]:
    """Pieces (start, end) of at most `room` sub-words: whole words, as many as fit, or part of a longer word."""
    bounds = [0, *(np.flatnonzero(word_ids[1:] != word_ids[:-1]) + 1).tolist(), len(word_ids)]
    pieces, start = [], 0
    for word, end in itertools.pairwise(bounds):
        if end - start > room and word > start:
            pieces.append((start, word))
            start = word
        while end - start > room:
            pieces.append((start, start + room))
            start += room
    return [*pieces, (start, len(word_ids))]


def _sequence(encoding: Any) -> np.ndarray:
    """i8[length]: 0 at tokens of the first text, 1 at tokens of the second, -1 at special tokens around them."""
    return np.array([-1 if number is None else number for number in encoding.sequence_ids], np.int8)


def _spans(encoding: Any, pair: bool) -> np.ndarray:
    """i32[length, 2]: characters of the second text of a pair or of the only text; (-1, -1) at other tokens."""
    spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    spans[_sequence(encoding) != pair] = -1
    return spans


def _first_of_word(words: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The words of tokens, with -1 at all but the first token of each."""
    again = np.zeros(len(words), bool)
    again[1:] = words[1:] == words[:-1]
    again[starts[:-1][starts[:-1] < len(words)]] = False
    return np.where(again, np.int32(-1), words)


def _flat(lists: Iterable[Iterable[int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32)


def _has_types(tokenizer: Any) -> bool:
    return "token_type_ids" in tokenizer.model_input_names


def _check_unicode(texts: Sequence[str] | Sequence[list[str]], row: int) -> None:
    """Raises RowError where a text holds half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    for i, text in enumerate(texts):
        try:
            (text if isinstance(text, str) else "".join(text)).encode()
        except UnicodeEncodeError as error:
            raise RowError(row + i, f"not valid Unicode at character {error.start} ({error.reason})") from error


def _splits_at_spaces(tokenizer: Any) -> bool:
    """Whether a word's tokens depend on the space before it, and the tokenizer does not itself think of one.

    So it is with byte-level vocabularies (RoBERTa, ModernBERT): without the space, words would be taken for one long word.
    """
    step = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    return any(
        (step.get("type") == "ByteLevel" and not step["add_prefix_space"])
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme") == "never")
        for step in steps
    )
