"""From texts to token ids with a checkpoint's tokenizer: windows of long texts, a cache on disk, a progress bar."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.core.progress import Progress
from mtl_jax.core.versions import installed
from mtl_jax.data import array_cache
from mtl_jax.data.ragged import Ragged as Ragged
from mtl_jax.data.ragged import starts_of
from mtl_jax.data.windows import RowError as RowError
from mtl_jax.data.windows import divide, sequence_of, truncate
from mtl_jax.pretrained.locate import foreign

# The most texts, and characters of them, that the tokenizer gets at once: enough to keep every core busy.
BATCH_TEXTS, BATCH_CHARACTERS = 4096, 2_000_000
CACHED_CHARACTERS = 500_000  # fewer characters are tokenised in a fraction of a second: they are not cached
PATIENCE = 2.0  # seconds before a progress bar appears
WHAT = "token"  # the cache's name in the log
FORMAT = 1  # version of cache entries and of encode()'s results: increase it when either changes
SETTINGS = ("model_input_names", "truncation_side", "split_special_tokens")  # of a tokenizer, beside its tokenizer.json


class Encodings(NamedTuple):
    """Texts as token ids, in N windows; a text that fits in a row is one window.

    Attributes:
        tokens: N arrays i32[length], special tokens included; empty if the vocabulary knows no part of the text.
        types: N arrays i32[length], the token types of pairs; None if all are 0 or the tokenizer has none.
        words: For texts given as words, N arrays i32[length]: the word's index in its text at the word's first sub-word,
            -1 at every other token. A word that the vocabulary does not know at all has no token. None for other texts.
        offsets: If asked for, N arrays i32[length, 2]: first character, and the one after the last, of each token in the second
            text of a pair, or in the only text; (-1, -1) at other tokens.
        rows: i32[N], the index of each window's text; ascending, every text has at least one window.
        truncated: i64[M], the texts that were truncated, ascending.
    """

    tokens: Ragged
    types: Ragged | None
    words: Ragged | None
    offsets: Ragged | None
    rows: np.ndarray
    truncated: np.ndarray


def encode(
    tokenizer: Any,
    first: Sequence[str] | Sequence[list[str]],
    second: Sequence[str] | None = None,
    *,
    max_length: int,
    windows: bool = False,
    stride: int = 0,
    offsets: bool = False,
    target: bool = False,
    cache: Path | None = None,
) -> Encodings:
    """Token ids of texts, of pairs of texts, or of texts that are divided into words.

    A text longer than max_length is truncated, pairs at the longer text first, and listed in `truncated`. With windows it
    becomes several windows instead. Of a pair the second text is divided, and every window has the whole first text. A text of
    words is divided between words, as many as fit in each window (a word longer than a row is divided between sub-words).

    Words are tokenised as in running text: as " ".join(words) would be if the vocabulary has spaces.

    Args:
        tokenizer: A transformers tokenizer. One that is not fast (sentencepiece, such as opus-mt's) takes plain texts only, and
            its results are not cached.
        first: The texts; or for each text its words.
        second: The second texts of pairs.
        max_length: Longest window in tokens, special tokens included.
        windows: Divide long texts into windows; else they are truncated.
        stride: Tokens that consecutive windows of a text share; 0 for texts of words.
        offsets: Whether to return the characters of each token; not for texts of words.
        target: Whether the texts are a decoder's targets, for which some tokenizers have another vocabulary or other special
            tokens. Plain texts only.
        cache: Directory of the cache; cached arrays are memory-mapped and read-only. None, or little text: no cache.

    Raises:
        RowError: Texts are not valid Unicode, or leave no room in a window for the other text of their pair.
        UserError: The tokenizer is not fast and the texts are not plain, it fails, or max_length leaves no room for text.
    """
    as_words = len(first) > 0 and not isinstance(first[0], str)
    if as_words and (second is not None or stride or offsets):
        raise ValueError("texts of words take no second text, stride or offsets")
    if second is not None and len(first) != len(second):
        raise ValueError(f"{count(len(first), 'first text')} and {count(len(second), 'second text')}")
    fast = getattr(tokenizer, "is_fast", False)
    if not fast and (second is not None or as_words or windows or offsets):
        raise UserError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: pairs, texts of words, windows and offsets need one; "
            "the checkpoint needs a tokenizer.json"
        )
    if target and (second is not None or as_words or windows or offsets):
        raise ValueError("targets are plain texts")
    columns: list[Sequence[Any]] = [first] if second is None else [first, second]
    options = _Options(max_length, windows, stride, offsets, as_words, as_words and splits_at_spaces(tokenizer), target)
    sizes = _sizes(columns, as_words)
    if cache is None or not fast or sizes.sum() < CACHED_CHARACTERS:
        return _encodings(_join(_parts(tokenizer, columns, sizes, options), options))
    name = key(tokenizer, options._asdict(), *columns)
    arrays = array_cache.load(cache, name, WHAT)
    if arrays is None:
        arrays = _join(_parts(tokenizer, columns, sizes, options), options)
        about = {"texts": len(first), "windows": len(arrays["rows"]), "tokens": len(arrays["tokens"]), **options._asdict()}
        arrays = array_cache.store(cache, name, arrays, about, WHAT)
    return _encodings(arrays)


class _Options(NamedTuple):
    max_length: int
    windows: bool
    stride: int
    offsets: bool
    words: bool
    spaces: bool  # whether a space is put in front of every word but the first
    target: bool


class _Part(NamedTuple):
    """The encodings of a batch of texts.

    Attributes:
        table: i32[total, C], for each token its id, its type, and by the options its word, or its first character and the one
            after its last.
        lengths: i64[N], tokens of each window.
        rows: i32[N], the index of each window's text.
        truncated: i64[M], texts that were truncated.
    """

    table: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    truncated: np.ndarray


def _sizes(columns: Sequence[Sequence[Any]], words: bool) -> np.ndarray:
    """i64[N], characters of each text or pair."""
    sizes = [np.array([sum(map(len, text)) if words else len(text) for text in texts], np.int64) for texts in columns]
    return np.stack(sizes).sum(axis=0)


def _parts(tokenizer: Any, columns: Sequence[Sequence[Any]], sizes: np.ndarray, options: _Options) -> Iterator[_Part]:
    """The encodings of all texts, batch by batch; shows progress if it takes long."""
    total, refused = len(sizes), list[RowError]()
    groups = np.stack([np.arange(total) // BATCH_TEXTS, np.cumsum(sizes) // BATCH_CHARACTERS])
    inner = (np.flatnonzero((groups[:, 1:] != groups[:, :-1]).any(axis=0)) + 1).tolist()
    start_time, progress = time.monotonic(), None
    with contextlib.ExitStack() as stack:
        for start, stop in itertools.pairwise([0, *inner, total] if total else []):
            yield _part(tokenizer, [texts[start:stop] for texts in columns], start, options, refused)
            if progress is not None:
                progress.update(stop - start)
            elif time.monotonic() - start_time > PATIENCE and stop < total:
                progress = stack.enter_context(contextlib.closing(Progress("tokenising", total, stop, unit="text")))
    if refused:
        raise RowError(sorted({error.rows[0] for error in refused}), min(refused, key=lambda error: error.rows[0]).reason)


def _part(tokenizer: Any, columns: list[Sequence[Any]], row: int, options: _Options, refused: list[RowError]) -> _Part:
    """The encodings of texts row, row + 1, ...; those that cannot be encoded are added to `refused`."""
    pair = len(columns) == 2
    columns = [_valid(texts, row, refused) for texts in columns]
    if options.spaces:
        columns = [[[*words[:1], *(word and f" {word}" for word in words[1:])] for words in columns[0]]]
    names = ("text_target",) if options.target else ("text", "text_pair")[: len(columns)]
    inputs = {name: list(texts) for name, texts in zip(names, columns, strict=True)}
    with foreign("the tokenizer cannot read the texts; its files are damaged or not a tokenizer's"):
        encoded = tokenizer(
            **inputs,
            is_split_into_words=options.words,
            return_attention_mask=False,
            return_token_type_ids=pair and "token_type_ids" in tokenizer.model_input_names,
            verbose=False,
        )
        encodings, lists = encoded.encodings, encoded["input_ids"]
        starts = starts_of([len(ids) for ids in lists])
        ids = _flat(lists)
    fields = [ids, _flat(encoded["token_type_ids"]) if "token_type_ids" in encoded else np.zeros_like(ids)]
    words = _flat([-1 if w is None else w for w in e.word_ids] for e in encodings) if options.words else None
    if words is not None:
        fields.append(_firsts(words, starts))
    if options.offsets:
        fields += list(np.concatenate([_spans(e, int(pair)) for e in encodings]).T)
    indices, lengths, rows, truncated = [], [], [], []
    for i, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        if stop - start <= options.max_length:
            kept = [np.arange(stop - start)]
        elif options.windows:
            text_words = None if words is None else words[start:stop]
            try:
                kept = divide(sequence_of(encodings[i]), text_words, int(pair), options.max_length, options.stride, row + i)
            except RowError as error:
                refused.append(error)
                continue
        else:
            kept = [truncate(_sequence(tokenizer, encodings, lists, i), options.max_length, tokenizer.truncation_side)]
            truncated.append(row + i)
        indices += [start + window for window in kept]
        lengths += [len(window) for window in kept]
        rows += [row + i] * len(kept)
    table = np.stack(fields, axis=1)[np.concatenate([np.zeros(0, np.int64), *indices])]
    return _Part(table, np.array(lengths, np.int64), np.array(rows, np.int32), np.array(truncated, np.int64))


def _sequence(tokenizer: Any, encodings: Any, lists: Sequence[Sequence[int]], i: int) -> np.ndarray:
    """sequence_of encoding i; a tokenizer that is not fast has lists of ids only."""
    if encodings is not None:
        return sequence_of(encodings[i])
    special = tokenizer.get_special_tokens_mask(list(lists[i]), already_has_special_tokens=True)
    return -np.array(special, np.int8)


def _join(parts: Iterable[_Part], options: _Options) -> dict[str, np.ndarray]:
    """The flat arrays of all encodings by name, as the cache stores them and _encodings reads them."""
    width = 2 + options.words + 2 * options.offsets
    empty = _Part(np.zeros((0, width), np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64))
    table, lengths, rows, truncated = (np.concatenate(columns) for columns in zip(empty, *parts, strict=True))
    arrays = {"tokens": table[:, 0], "starts": starts_of(lengths), "rows": rows, "cut": truncated}
    if table[:, 1].any():
        arrays["types"] = table[:, 1]
    if options.words:
        arrays["words"] = table[:, 2]
    if options.offsets:
        arrays["offsets"] = table[:, 2:]
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _encodings(arrays: dict[str, np.ndarray]) -> Encodings:
    def ragged(name: str) -> Ragged | None:
        return Ragged(arrays[name], arrays["starts"]) if name in arrays else None

    return Encodings(
        tokens=Ragged(arrays["tokens"], arrays["starts"]),
        types=ragged("types"),
        words=ragged("words"),
        offsets=ragged("offsets"),
        rows=np.array(arrays["rows"]),
        truncated=np.array(arrays["cut"]),
    )


def _spans(encoding: Any, text: int) -> np.ndarray:
    """i32[length, 2]: the characters of each token of text 0 or 1; (-1, -1) at other tokens."""
    spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    spans[sequence_of(encoding) != text] = -1
    return spans


def _firsts(words: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The words of tokens, with -1 at all but the first token of each; the texts begin at `starts`."""
    repeated = np.zeros(len(words), bool)
    repeated[1:] = words[1:] == words[:-1]
    repeated[starts[:-1][starts[:-1] < len(words)]] = False
    return np.where(repeated, np.int32(-1), words)


def _flat(lists: Iterable[Iterable[int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32)


def _valid(texts: Sequence[Any], row: int, refused: list[RowError]) -> Sequence[Any]:
    """The texts, with an empty one for each that has half a surrogate pair: JSON can spell it, and UTF-8 cannot."""
    valid = list(texts)
    for i, text in enumerate(texts):
        try:
            (text if isinstance(text, str) else "".join(text)).encode()
        except UnicodeEncodeError as error:
            refused.append(RowError([row + i], f"not valid Unicode ({error.object[error.start]!r} is half a character)"))
            valid[i] = "" if isinstance(text, str) else []
    return valid


def splits_at_spaces(tokenizer: Any) -> bool:
    """Whether a word's tokens depend on the space before it, and the tokenizer does not add that space itself.

    This is true of byte-level vocabularies (RoBERTa, ModernBERT): without the space, words would be read as one long word.
    """
    step = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    return any(
        (part["type"] == "ByteLevel" and not part["add_prefix_space"])
        or (part["type"] == "Metaspace" and part.get("prepend_scheme") == "never")
        for part in step.get("pretokenizers", [step] if step else [])
    )


def key(tokenizer: Any, options: Mapping[str, Any], *columns: Sequence[str] | Sequence[list[str]]) -> str:
    """SHA-256 (hex) of a tokenizer, options and texts, the versions of the libraries included.

    Args:
        tokenizer: A transformers fast tokenizer.
        options: Whatever else the result depends on; JSON-able.
        columns: Columns of texts, or of texts as lists of words.
    """
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left by an earlier call of the tokenizer
        vocabulary.pop(state)
    about = {
        "format": FORMAT,
        "versions": {name: installed(name) for name in ("tokenizers", "transformers")},
        "tokenizer": vocabulary,
        "settings": {name: getattr(tokenizer, name) for name in SETTINGS},
        "options": dict(options),
    }
    if hasattr(tokenizer, "tgt_lang"):  # the vocabulary's post-processor shows the language of sources only
        about["languages"] = [tokenizer.src_lang, tokenizer.tgt_lang]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for texts in columns:
        digest.update(f"\0column of {len(texts)}\0".encode())
        for start in range(0, len(texts), 4096):
            _add(digest, texts[start : start + 4096])
    return digest.hexdigest()


def _add(digest: Any, texts: Sequence[str] | Sequence[list[str]]) -> None:
    """Adds texts to a hash: the lengths, then all characters, so that different lists of texts differ in the hash."""
    strings: Sequence[str] = texts  # type: ignore[assignment]
    if texts and not isinstance(texts[0], str):
        digest.update(np.array([len(words) for words in texts], np.int64).tobytes())
        strings = [word for words in texts for word in words]
    digest.update(np.array([len(string) for string in strings], np.int64).tobytes())
    digest.update("".join(strings).encode("utf-8", "surrogatepass"))
