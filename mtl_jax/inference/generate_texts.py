"""Many texts to many texts with a model: long ones made to fit, answers in order, what is done kept by a journal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from mtl_jax import decoding
from mtl_jax.core import files
from mtl_jax.core.errors import Interrupted, UserError
from mtl_jax.core.errors import count as number_of
from mtl_jax.core.json_shapes import anything, list_of, number, object_of
from mtl_jax.core.json_shapes import text as string
from mtl_jax.core.progress import Progress
from mtl_jax.data.split_texts import divide
from mtl_jax.data.tokenize import RowError
from mtl_jax.decoding import GenerationConfig
from mtl_jax.inference.resumable_output import Journal, digest
from mtl_jax.inference.text_model import TextModel

log = logging.getLogger(__name__)

Long = Literal["divide", "cut"]
AT_ONCE = 1000  # texts that the tokenizer gets
PATIENCE = 2.0  # seconds before the progress of the tokenizer is shown
SHOWN = 10  # numbers of lines that a note lists


class Plan(NamedTuple):
    """What is given to the model.

    Attributes:
        sources: Token ids i32[length], each short enough.
        text_of: The text that each source is of, ascending; blank texts have none.
        long: Texts that did not fit, ascending.
        unknown: Texts of which the vocabulary knows nothing, ascending; they are left out like blank ones.
        refused: {text: why the model cannot read it}, ascending; so are these.
        remarks: Lines on what the vocabulary does not know of the others.
    """

    sources: list[np.ndarray]
    text_of: list[int]
    long: list[int]
    unknown: list[int]
    refused: Mapping[int, str] = MappingProxyType({})
    remarks: Sequence[str] = ()


class Answered(NamedTuple):
    """The answers to a text.

    Attributes:
        texts: num_return_sequences of them, the best first; of a text that was divided, the pieces' joined by spaces. None of a
            blank text.
        scores: Their scores; of a text that was divided, the pieces' mean. None where the model's output was not finite: the
            text is then empty.
        ended: Whether all of them came to an end before the length limit.
    """

    texts: tuple[str, ...]
    scores: tuple[float | None, ...]
    ended: bool


# A finished source in a journal.
ITEM = object_of({"texts": list_of(string), "scores": list_of(number), "ended": anything})
BLANK = Answered((), (), True)


def configure(model: TextModel, options: Mapping[str, Any], where: str) -> GenerationConfig:
    """How to search: what the user says, then the task's options in the checkpoint, then the checkpoint's, then the defaults.

    Args:
        model: The model.
        options: What the user says; None: nothing.
        where: The model's name, for errors.

    Raises:
        UserError: A value makes no sense, or the model must be told a target language.
    """
    known = {field.name for field in dataclasses.fields(GenerationConfig)}
    task = {name: value for name, value in model.setting.options.items() if name in known}
    said = {name: value for name, value in options.items() if value is not None}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if total in said and new not in said:
            task.pop(new, None)  # the task's would win, as it counts from another place
    config = decoding.fitted(model.model, decoding.resolve(model.raw, model.location, **(task | said)))
    languages = model.setting.languages
    if languages and not {config.decoder_start_token_id, config.forced_bos_token_id} & set(languages.values()):
        raise UserError(f"{where}: give --target-language, the model writes several; choices: {', '.join(languages)}")
    return config


def limit_of(model: TextModel, asked: int | None) -> int | None:
    """Most tokens of a source: as asked, or what the model takes.

    Raises:
        UserError: More were asked for than the model has positions.
    """
    if asked is None:
        return model.max_source
    if model.max_positions is not None and asked > model.max_positions:
        raise UserError(f"--max-source-tokens is {asked}; the model has {number_of(model.max_positions, 'position')}")
    return asked


def made_from(model: TextModel, texts: Sequence[str], config: GenerationConfig, rows: int, seed: int) -> dict[str, Any]:
    """What decides the answers, for a journal: JSON values by names that an error can show.

    The program, the devices and the rows of a batch are among them: sums in another order may turn a search.
    """
    return {
        "input": digest(json.dumps(list(texts)).encode()),
        "model": model.identity(),
        "prefix": model.setting.prefix,
        "mtl_jax": version("mtl_jax"),
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
        long: What becomes of a text of more tokens than the limit: divided at ends of sentences, or cut.
        limit: Most tokens of a source, special tokens and prefix included; None: any number.

    Raises:
        UserError: The limit leaves no room for text, or the model can read none of the texts.
    """
    prefix = model.setting.prefix
    # What stands beside every text, prefix and special tokens; a space that ends the prefix may be in the text's first token.
    try:
        beside = {tuple(ids.tolist()) for ids in map(np.asarray, model.encode([prefix, prefix.rstrip()], None))}
    except RowError as error:
        raise UserError(f"what stands beside every text: {error.reason}") from error
    if limit is not None and limit <= min(map(len, beside)):
        tokens = number_of(limit, "token leaves", "tokens leave")
        raise UserError(f"{tokens} no room for the text beside special tokens and prefix; allow more")
    full = [i for i, text in enumerate(texts) if text.strip()]
    encoded, refused = _encoded(model, [prefix + texts[i] for i in full])
    if refused and len(refused) == len(full):
        raise UserError(f"text {full[0] + 1}: {refused[0]}")
    readable = [place for place in range(len(full)) if place not in refused]
    remarks = model.remarks([texts[full[place]] for place in readable], [encoded[place] for place in readable])
    refused = {full[place]: reason for place, reason in refused.items()}
    full, encoded = [full[place] for place in readable], [encoded[place] for place in readable]
    sources: list[np.ndarray] = []
    text_of: list[int] = []
    too_long: list[int] = []
    unknown = [i for i, ids in zip(full, encoded, strict=True) if tuple(ids.tolist()) in beside]

    def sizes(pieces: Sequence[str]) -> list[int]:
        return [len(ids) for ids in model.encode([prefix + piece for piece in pieces], None)]

    for i, ids in zip(full, encoded, strict=True):
        if tuple(ids.tolist()) in beside:
            continue
        fitting = [ids]
        if limit is not None and len(ids) > limit:
            too_long.append(i)
            if long == "divide":
                fitting = model.encode([prefix + piece for piece in divide(texts[i].strip(), sizes, limit)], None)
            else:
                fitting = model.encode([prefix + texts[i]], limit)
        fitting = [piece for piece in fitting if tuple(piece.tolist()) not in beside]
        sources += fitting
        text_of += [i] * len(fitting)
    return Plan(sources, text_of, too_long, unknown, refused, remarks)


def _encoded(model: TextModel, texts: Sequence[str]) -> tuple[list[np.ndarray], dict[int, str]]:
    """model.encode() of all texts, empty where it refuses one, and {text: why}; shows how far it is where it takes long."""
    found: list[np.ndarray] = []
    refused: dict[int, str] = {}
    began, progress = time.monotonic(), None
    with contextlib.ExitStack() as stack:
        for first in range(0, len(texts), AT_ONCE):
            part = list(texts[first : first + AT_ONCE])
            try:
                found += model.encode(part, None)
            except RowError as error:
                refused |= {first + place: error.reason for place in error.rows}
                readable = iter(model.encode([text for place, text in enumerate(part) if place not in error.rows], None))
                found += [np.zeros(0, np.int32) if place in error.rows else next(readable) for place in range(len(part))]
            if progress is not None:
                progress.update(len(found) - first)
            elif time.monotonic() - began > PATIENCE and len(found) < len(texts):
                progress = stack.enter_context(contextlib.closing(Progress("tokenising", len(texts), len(found), unit="text")))
    return found, refused


def generate(
    model: TextModel,
    plan: Plan,
    config: GenerationConfig,
    count: int,
    *,
    rows: int,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Answered]:
    """The answers to all texts, in order.

    Args:
        model: The model.
        plan: From make_plan().
        config: How to search.
        count: The number of texts.
        rows: Rows of a batch, on each device of this process.
        seed: Of sampling.
        journal: Where finished sources are kept and found again. A batch of which any is missing is computed again as a whole,
            so that an answer does not depend on when a process was stopped.
        progress: Told of each finished source.
        stopped: Asked after each; True ends the work.

    Raises:
        Interrupted: stopped() said so.
    """
    done: dict[int, Any] = {} if journal is None else journal.done
    key = jax.random.key(seed)
    how: dict[str, Any] = {"rows": rows, "key": key, "done": done, "devices": jax.local_devices()}
    for answer in decoding.generate_all(model.model, model.params, plan.sources, config, **how):
        new = answer.index not in done
        scores = [float(score) if math.isfinite(score) else None for score in answer.scores]
        item = {
            "texts": ["" if score is None else model.decode(t) for t, score in zip(answer.tokens, scores, strict=True)],
            "scores": scores,
            "ended": all(answer.ended) and not any(_forced(config, tokens) for tokens in answer.tokens),
        }
        if journal is None:
            done[answer.index] = item
        else:
            journal.add(answer.index, item)
        if progress is not None and new:
            progress.update(1, sum(len(tokens) for tokens in answer.tokens))
        if stopped() and len(done) < len(plan.sources):
            kept = "nothing kept without --output" if journal is None else f"kept in {journal.part}; the same command goes on"
            raise Interrupted(f"stopped with {len(done)} of {number_of(len(plan.sources), 'text')} done, {kept}")
    pieces: list[list[Any]] = [[] for _ in range(count)]
    for source, text in enumerate(plan.text_of):
        pieces[text].append(done[source])
    return [_joined(items) for items in pieces]


def _forced(config: GenerationConfig, tokens: np.ndarray) -> bool:
    """Whether a sequence got its end token because it was as long as it may be, start and end included."""
    return config.forced_eos_token_id is not None and len(tokens) + 2 >= config.length


def _joined(items: list[Any]) -> Answered:
    if not items:
        return BLANK
    return Answered(
        tuple(" ".join(filter(None, texts)) for texts in zip(*(item["texts"] for item in items), strict=True)),
        tuple(
            _finite(np.mean([files.number_of(score) for score in scores]))
            for scores in zip(*(item["scores"] for item in items), strict=True)
        ),
        all(item["ended"] for item in items),
    )


def _finite(score: Any) -> float | None:
    return float(score) if np.isfinite(score) else None


def note(numbers: Sequence[int], file: str, what: str) -> None:
    """Tells on standard error what happened to some of the texts.

    Args:
        numbers: Their places, from 0.
        file: The file of which they are lines, or "".
        what: What happened, after "3 lines".
    """
    if numbers:
        places = ", ".join(str(number + 1) for number in numbers[:SHOWN]) + (", ..." if len(numbers) > SHOWN else "")
        which = number_of(len(numbers), "line" if file else "text")
        log.warning("%s%s %s: %s", f"{file}: " if file else "", which, what, places)
