"""Generates an answer to each of many texts: long texts are divided or cut, and a journal keeps what is done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from mtl_jax import decoding
from mtl_jax.core import digests, files
from mtl_jax.core.errors import Interrupted, UserError, listed
from mtl_jax.core.errors import count as number_of
from mtl_jax.core.json_shapes import anything, list_of, number, object_of
from mtl_jax.core.json_shapes import text as string
from mtl_jax.core.progress import Progress
from mtl_jax.core.versions import installed
from mtl_jax.data.split_texts import divide
from mtl_jax.data.tokenize import RowError
from mtl_jax.decoding import GenerationConfig
from mtl_jax.inference.resumable_output import Journal
from mtl_jax.inference.text_kinds import TextAnswer as TextAnswer
from mtl_jax.inference.text_model import TextModel

log = logging.getLogger(__name__)

Long = Literal["divide", "cut"]
AT_ONCE = 1000  # texts in one call of the tokenizer
PATIENCE = 2.0  # seconds before the progress of the tokenizer is shown
SHOWN = 10  # most line numbers in a warning


class Plan(NamedTuple):
    """The sources that the model reads, and the texts that they belong to.

    Attributes:
        sources: Token ids i32[length], none longer than the limit.
        text_of: Index of the text of each source, ascending; blank texts have no source.
        long: Indices of texts that were longer than the limit, ascending.
        unknown: Indices of texts without a known token, ascending; they have no source.
        refused: {index of a text that the model cannot read: the reason}, ascending; they have no source.
        remarks: Lines on tokens of the other texts that the vocabulary does not know.
    """

    sources: list[np.ndarray]
    text_of: list[int]
    long: list[int]
    unknown: list[int]
    refused: Mapping[int, str] = MappingProxyType({})
    remarks: Sequence[str] = ()


# A finished source in a journal.
ITEM = object_of({"texts": list_of(string), "scores": list_of(number), "ended": anything})
BLANK = TextAnswer((), (), True)


def configure(model: TextModel, options: Mapping[str, Any], where: str) -> GenerationConfig:
    """Generation options: the user's, then the task's in the checkpoint, then the checkpoint's, then the defaults.

    Args:
        model: The model.
        options: The user's options; None means not given.
        where: The model's name, for errors.

    Raises:
        UserError: A value is out of range, or the model needs a target language.
    """
    fields = {field.name for field in dataclasses.fields(GenerationConfig)}
    task = {name: value for name, value in model.setting.options.items() if name in fields}
    given = {name: value for name, value in options.items() if value is not None}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if total in given and new not in given:
            task.pop(new, None)  # the count of new tokens wins, even where the task sets it and the user the total
    config = decoding.fit_to_model(model.model, decoding.resolve(model.raw, model.location, **(task | given)))
    languages = model.setting.languages
    if languages and not {config.decoder_start_token_id, config.forced_bos_token_id} & set(languages.values()):
        raise UserError(f"{where}: the model writes several languages; choose one by --target-language: {listed(languages)}")
    return config


def source_limit(model: TextModel, requested: int | None) -> int | None:
    """Most tokens of a source: the requested number, or as many as the model reads.

    Raises:
        UserError: The requested number is above the model's positions.
    """
    if requested is None:
        return model.max_source
    if model.max_positions is not None and requested > model.max_positions:
        raise UserError(f"--max-source-tokens is {requested}; the model has {number_of(model.max_positions, 'position')}")
    return requested


def provenance(model: TextModel, texts: Sequence[str], config: GenerationConfig, rows: int, seed: int) -> dict[str, Any]:
    """All that the answers depend on, for a journal: JSON values by names that an error can show.

    The program, the devices and the rows of a batch are among them, because sums in another order may change a search.
    """
    return {
        "input": digests.of_bytes(json.dumps(list(texts)).encode()),
        "model": model.identity(),
        "prefix": model.setting.prefix,
        "mtl_jax": installed("mtl_jax"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "dtype": str(np.dtype(model.model.trunk.dtype)),
        "rows": rows,
        "seed": seed if config.do_sample else None,
        **json.loads(json.dumps(dataclasses.asdict(config))),
    }


def make_plan(model: TextModel, texts: Sequence[str], long: Long, limit: int | None) -> Plan:
    """Texts as token ids that fit the model.

    Args:
        model: The model.
        texts: The texts.
        long: Whether a text with more tokens than the limit is divided at ends of sentences, or cut.
        limit: Most tokens of a source, special tokens and prefix included; None: any number.

    Raises:
        UserError: The limit leaves no room for the text, or the model can read none of the texts.
    """
    prefix = model.setting.prefix
    # Tokens of an empty text. A space at the end of the prefix may belong to the text's first token, so there are two forms.
    try:
        empty = {tuple(ids.tolist()) for ids in map(np.asarray, model.encode([prefix, prefix.rstrip()], None))}
    except RowError as error:
        raise UserError(f"prefix and special tokens: {error.reason}") from error
    if limit is not None and limit <= min(map(len, empty)):
        tokens = number_of(limit, "token leaves", "tokens leave")
        raise UserError(f"{tokens} no room for the text beside special tokens and prefix; allow more")
    indices = [i for i, text in enumerate(texts) if text.strip()]
    encoded, refused = _encoded(model, [prefix + texts[i] for i in indices])
    if refused and len(refused) == len(indices):
        raise UserError(f"text {indices[0] + 1}: {refused[0]}")
    readable = [k for k in range(len(indices)) if k not in refused]
    remarks = model.remarks([texts[indices[k]] for k in readable], [encoded[k] for k in readable])
    refused = {indices[k]: reason for k, reason in refused.items()}
    indices, encoded = [indices[k] for k in readable], [encoded[k] for k in readable]
    sources: list[np.ndarray] = []
    text_of: list[int] = []
    too_long: list[int] = []
    unknown = [i for i, ids in zip(indices, encoded, strict=True) if tuple(ids.tolist()) in empty]

    def sizes(parts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in model.encode([prefix + part for part in parts], None)]

    for i, ids in zip(indices, encoded, strict=True):
        if tuple(ids.tolist()) in empty:
            continue
        pieces = [ids]
        if limit is not None and len(ids) > limit:
            too_long.append(i)
            if long == "divide":
                pieces = model.encode([prefix + piece for piece in divide(texts[i].strip(), sizes, limit)], None)
            else:
                pieces = model.encode([prefix + texts[i]], limit)
        pieces = [piece for piece in pieces if tuple(piece.tolist()) not in empty]
        sources += pieces
        text_of += [i] * len(pieces)
    return Plan(sources, text_of, too_long, unknown, refused, remarks)


def _encoded(model: TextModel, texts: Sequence[str]) -> tuple[list[np.ndarray], dict[int, str]]:
    """model.encode() of all texts, empty for those that it refuses, and {index: reason} of these; may show progress."""
    encoded: list[np.ndarray] = []
    refused: dict[int, str] = {}
    began, progress = time.monotonic(), None
    with contextlib.ExitStack() as stack:
        for first in range(0, len(texts), AT_ONCE):
            part = list(texts[first : first + AT_ONCE])
            try:
                encoded += model.encode(part, None)
            except RowError as error:
                refused |= {first + k: error.reason for k in error.rows}
                readable = iter(model.encode([text for k, text in enumerate(part) if k not in error.rows], None))
                encoded += [np.zeros(0, np.int32) if k in error.rows else next(readable) for k in range(len(part))]
            if progress is not None:
                progress.update(len(encoded) - first)
            elif time.monotonic() - began > PATIENCE and len(encoded) < len(texts):
                bar = Progress("tokenising", len(texts), len(encoded), unit="text")
                progress = stack.enter_context(contextlib.closing(bar))
    return encoded, refused


def generate(
    model: TextModel,
    plan: Plan,
    config: GenerationConfig,
    count: int,
    *,
    rows: int,
    seed: int | Sequence[int] = 0,
    journal: Journal | None = None,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[TextAnswer]:
    """The answers to all texts, in order.

    Args:
        model: The model.
        plan: From make_plan().
        config: The generation options.
        count: The number of texts.
        rows: Rows of a batch, on each device of this process.
        seed: Seed of sampling; or one for each text, whose draws then do not depend on its place among the others.
        journal: Keeps finished sources for a later call. A batch with a missing source is computed again as a whole, so
            answers do not depend on when a process was stopped.
        progress: Updated for each finished source.
        stopped: Called after each source; True ends the work.

    Raises:
        Interrupted: stopped() returned True.
    """
    in_memory: dict[int, Any] = {}
    done: Mapping[int, Any] = in_memory if journal is None else journal.done
    key = _keys(seed, plan.text_of) if isinstance(seed, Sequence) else jax.random.key(seed)
    options: dict[str, Any] = {"rows": rows, "key": key, "done": done, "devices": jax.local_devices()}
    for answer in decoding.generate_all(model.model, model.params, plan.sources, config, **options):
        new = answer.index not in done
        scores = [float(score) if math.isfinite(score) else None for score in answer.scores]
        item = {
            "texts": ["" if score is None else model.decode(t) for t, score in zip(answer.tokens, scores, strict=True)],
            "scores": scores,
            "ended": all(answer.ended) and not any(_forced(config, tokens) for tokens in answer.tokens),
        }
        if journal is None:
            in_memory[answer.index] = item
        else:
            journal.add(answer.index, item)
        if progress is not None and new:
            progress.update(1, sum(len(tokens) for tokens in answer.tokens))
        if stopped() and len(done) < len(plan.sources):
            kept = f"kept in {journal.part}; the same command resumes it" if journal else "nothing is kept without --output"
            raise Interrupted(f"stopped with {len(done)} of {number_of(len(plan.sources), 'text')} done, {kept}")
    pieces: list[list[Any]] = [[] for _ in range(count)]
    for source, text in enumerate(plan.text_of):
        pieces[text].append(done[source])
    return [_joined(items) for items in pieces]


def _keys(seeds: Sequence[int], text_of: Sequence[int]) -> jax.Array:
    """A key for each source: of the seed of its text, and of its number among the sources of that text."""
    texts = np.array(text_of, np.int64)
    numbers = np.arange(len(texts)) - np.searchsorted(texts, texts)
    of_source = np.array([seeds[text] for text in text_of], np.uint64)  # jax takes 32 bits at once
    keys = jax.vmap(jax.random.key)((of_source & 0xFFFFFFFF).astype(np.uint32))
    for part in (of_source >> 32, numbers):
        keys = jax.vmap(jax.random.fold_in)(keys, part.astype(np.uint32))
    return keys


def _forced(config: GenerationConfig, tokens: np.ndarray) -> bool:
    """Whether a sequence has its end token only because it reached the length limit, start and end included."""
    return config.forced_eos_token_id is not None and len(tokens) + 2 >= config.length


def _joined(items: list[Any]) -> TextAnswer:
    if not items:
        return BLANK
    return TextAnswer(
        tuple(" ".join(filter(None, texts)) for texts in zip(*(item["texts"] for item in items), strict=True)),
        tuple(
            _finite(np.mean([files.number_of(score) for score in scores]))
            for scores in zip(*(item["scores"] for item in items), strict=True)
        ),
        all(item["ended"] for item in items),
    )


def _finite(score: Any) -> float | None:
    return float(score) if np.isfinite(score) else None


def warn_of_texts(indices: Sequence[int], file: str, problem: str) -> None:
    """Logs a warning about some of the texts.

    Args:
        indices: Their indices, from 0.
        file: The file of which they are lines, or "".
        problem: The problem, put after "3 lines".
    """
    if indices:
        listed = ", ".join(str(index + 1) for index in indices[:SHOWN]) + (", ..." if len(indices) > SHOWN else "")
        texts = number_of(len(indices), "line" if file else "text")
        log.warning("%s%s %s: %s", f"{file}: " if file else "", texts, problem, listed)
