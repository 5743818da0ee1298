"""The commands mtl-jax translate and mtl-jax summarize: one text, or a file line by line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import to_json
from mtl_jax.core.progress import Progress
from mtl_jax.core.text_lines import STANDARD_INPUT, STANDARD_OUTPUT, kind_of, lines_of, object_of, print_lines, read_bytes
from mtl_jax.inference.resumable_output import Journal, check_writable

if TYPE_CHECKING:
    from mtl_jax.decoding import GenerationConfig
    from mtl_jax.inference.generate_texts import TextAnswer
    from mtl_jax.inference.text_model import TextModel, TextRequest

log = logging.getLogger(__name__)

Texts = tyro.conf.Positional[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Files:
    """Where texts come from and answers go to.

    Attributes:
        file: A UTF-8 file with one text a line, or of lines of JSON objects if its name ends in .jsonl; "-", or no file
            and no text: standard input. Every line gets a line, in order; empty ones stay empty.
        output: The file to write; without it, or "-", standard output. It is replaced when everything is done. Until then
            OUTPUT.part keeps what is done, and the same command, started again, goes on from there.
        column: The text's name in the objects; given, standard input is read as objects too. Default: text.
        field: What the answer is called in the objects. Default: translation, or summary.
        scores: Give scores too, as FIELD_score; lines of text then become objects.
    """

    file: str = ""
    output: str = ""
    column: str = ""
    field: str = ""
    scores: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What the model is asked to do.

    Attributes:
        task: Of a run: the task whose decoder writes, where there are several.
        source_language: The language of the texts, where the model must be told (mBART: en_XX; T5: en).
        target_language: The language of the answers, where the model must be told (mBART: fr_XX; Marian: fra; T5: fr).
        prefix: What stands before every text, as T5 needs it. Default: what the checkpoint says for this task.
        long: What becomes of a text of more tokens than the model takes: "divide" it at ends of sentences, the answers being
            joined; or "cut" off what is too much. Default: divide to translate, cut to summarize. Both are reported.
        max_source_tokens: Fewer tokens than the model takes; or more, where it has no table of positions (T5).
    """

    task: str = ""
    source_language: str = ""
    target_language: str = ""
    prefix: str | None = None
    long: Literal["divide", "cut"] | None = None
    max_source_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Search:
    """How answers are searched for, by the names of transformers. What is not given is what the checkpoint says.

    Attributes:
        num_beams: Beams; 1 is greedy search.
        max_new_tokens: Most tokens of an answer.
        min_new_tokens: Fewest tokens of an answer.
        max_length: Most tokens of an answer, the one that decoding starts with included.
        min_length: Fewest tokens of an answer, the one that decoding starts with included.
        length_penalty: Scores are divided by the length to this power: above 0 prefers longer answers.
        early_stopping: Whether beam search ends as soon as there are enough answers; "never": only when none can be better.
        no_repeat_ngram_size: No so many tokens stand twice in an answer.
        repetition_penalty: Above 1 makes tokens that are there already less likely.
        num_return_sequences: Answers to a text; more than one needs objects (a .jsonl file, or --scores).
        sample: Draw tokens at random, of a single beam unless --num-beams says otherwise.
        no_sample: Take the likeliest tokens, also where the checkpoint says to draw.
        temperature: Sampling: logits are divided by it.
        top_k: Sampling: only so many of the most likely tokens.
        top_p: Sampling: only the most likely tokens that together have this probability.
        seed: Of sampling.
    """

    num_beams: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    max_length: int | None = None
    min_length: int | None = None
    length_penalty: float | None = None
    early_stopping: Literal["true", "false", "never"] | None = None
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    num_return_sequences: int | None = None
    sample: tyro.conf.FlagCreatePairsOff[bool] = False
    no_sample: tyro.conf.FlagCreatePairsOff[bool] = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """As GenerationConfig calls them; None where nothing was said."""
        values = {
            name: value for name, value in dataclasses.asdict(self).items() if name not in ("sample", "no_sample", "seed")
        }
        values["early_stopping"] = {"true": True, "false": False}.get(self.early_stopping or "", self.early_stopping)
        if self.sample or self.no_sample:
            values["do_sample"] = self.sample
        if self.sample and self.num_beams is None:
            values["num_beams"] = 1
        return values

    def without_effect(self, config: GenerationConfig) -> list[str]:
        """The options that were given and change nothing in such a search, and why."""
        found = []
        for names, there, why in (
            (("temperature", "top_k", "top_p"), config.do_sample, "without --sample"),
            (("length_penalty", "early_stopping"), config.num_beams > 1, "with one beam"),
        ):
            given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
            found += [f"{', '.join(given)} changes nothing {why}"] if given and not there else []
        return found


@dataclasses.dataclass(frozen=True)
class Work:
    """How the work is done.

    Attributes:
        rows: Texts in a batch, on each device.
        dtype: What is computed in: auto is bfloat16 on accelerators, float32 on CPU; of a run, what it was trained in.
    """

    rows: int = 32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


_FLAT = tyro.conf.arg(name="")


def translate(
    text: Texts = (),
    /,
    *,
    model: str,
    files: Annotated[Files, _FLAT] = Files(),
    task: Annotated[Task, _FLAT] = Task(),
    search: Annotated[Search, _FLAT] = Search(),
    work: Annotated[Work, _FLAT] = Work(),
) -> None:
    """Translations of texts, or of the lines of a file: mtl-jax translate --model DIR "Hello, how are you?"

    Args:
        text: Texts to translate.
        model: A Marian, BART, mBART, Pegasus or T5 checkpoint: a directory, pip:ASSET/MEMBER, or a hub id ORG/NAME; or a
            run's workdir.
        files: Where texts come from and answers go to.
        task: What the model is asked to do.
        search: How answers are searched for.
        work: How the work is done.
    """
    _run(_Command("translate", "translation", "translation", "divide"), text, model, files, task, search, work)


def summarize(
    text: Texts = (),
    /,
    *,
    model: str,
    files: Annotated[Files, _FLAT] = Files(),
    task: Annotated[Task, _FLAT] = Task(),
    search: Annotated[Search, _FLAT] = Search(),
    work: Annotated[Work, _FLAT] = Work(),
) -> None:
    """Summaries of texts, or of the lines of a file: mtl-jax summarize --model DIR --file in.jsonl --output out.jsonl

    Args:
        text: Texts to summarize.
        model: A BART, T5, Pegasus, Marian or mBART checkpoint: a directory, pip:ASSET/MEMBER, or a hub id ORG/NAME; or a
            run's workdir.
        files: Where texts come from and answers go to.
        task: What the model is asked to do.
        search: How answers are searched for.
        work: How the work is done.
    """
    _run(_Command("summarize", "summarization", "summary", "cut"), text, model, files, task, search, work)


class _Command(NamedTuple):
    """What tells the commands apart: name, name of the task in checkpoints, name of an answer, and what long texts become."""

    name: str
    task: str
    field: str
    long: Literal["divide", "cut"]


class _Input(NamedTuple):
    """What was given: its file or "", its texts in order, and for JSON the objects, None at empty lines."""

    name: str
    texts: list[str]
    objects: list[dict[str, Any] | None] | None


def _run(command: _Command, text: tuple[str, ...], path: str, files: Files, task: Task, search: Search, work: Work) -> None:
    to_file = files.output not in ("", STANDARD_OUTPUT)
    output = check_writable(files.output, [files.file] if files.file else []) if to_file else None
    if output is None and sys.stdout is None:
        raise UserError("standard output is closed; give --output")
    field, long = files.field or command.field, task.long or command.long
    for name, value in (("rows", work.rows), ("max-source-tokens", task.max_source_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if search.sample and search.no_sample:
        raise UserError("give --sample or --no-sample, not both")
    if not 0 <= search.seed < 1 << 63:
        raise UserError(f"--seed is {search.seed}; it must be at least 0 and below 2^63")
    given = _read(text, files, field)

    from mtl_jax.inference import generate_texts, text_model  # imported late: --help and mistakes need none of it
    from mtl_jax.training.preemption import asked_to_stop

    with asked_to_stop() as stop, contextlib.ExitStack() as stack:
        asked = text_model.TextRequest(command.task, task.source_language, task.target_language, task.prefix)
        model = _open(path, asked, task.task, work.dtype)
        config = generate_texts.configure(model, search.options(), path)
        if config.num_return_sequences > 1 and given.objects is None and not files.scores:
            raise UserError(f"{config.num_return_sequences} answers do not fit on a line of text; --scores makes lines of JSON")
        for line in search.without_effect(config):
            log.warning("%s", line)
        limit = generate_texts.source_limit(model, task.max_source_tokens)
        plan = generate_texts.make_plan(model, given.texts, long, limit)
        how = "divided at ends of sentences" if long == "divide" else "cut"
        generate_texts.warn_of_texts(plan.long, given.name, f"of more than {limit} tokens, {how}")
        generate_texts.warn_of_texts(plan.unknown, given.name, "of which the vocabulary knows nothing, left empty")
        if plan.refused:
            generate_texts.warn_of_texts(
                [*plan.refused], given.name, f"left empty, the first because {next(iter(plan.refused.values()))}"
            )
        for line in plan.remarks:
            log.warning("%s", line)
        journal = None
        if output is not None:
            made_from = generate_texts.provenance(model, given.texts, config, work.rows, search.seed)
            journal = Journal(output, {"command": command.name, **made_from, "limit": limit, "long": long}, generate_texts.ITEM)
            stack.callback(journal.close)
        progress = None
        if not text:
            done = 0 if journal is None else len(journal.done)
            progress = Progress(command.name, len(plan.sources), done, unit="text")
            stack.callback(progress.close)
        answers = generate_texts.generate(
            model,
            plan,
            config,
            len(given.texts),
            rows=work.rows,
            seed=search.seed,
            journal=journal,
            progress=progress,
            stopped=stop.flag.is_set,
        )
        unfinished = [i for i, answer in enumerate(answers) if not answer.ended]
        generate_texts.warn_of_texts(unfinished, given.name, "with an answer that the length limit ended (--max-new-tokens)")
        broken = [i for i, answer in enumerate(answers) if None in answer.scores]
        generate_texts.warn_of_texts(broken, given.name, "left empty, as the model's output is not finite")
        lines = [_line(given, i, answer, field, files.scores) for i, answer in enumerate(answers)]
        if journal is None:
            print_lines(lines)
        else:
            journal.finish(lines)


def _open(path: str, asked: TextRequest, task: str, dtype: str) -> TextModel:
    from mtl_jax.inference import text_model
    from mtl_jax.inference.predict import is_workdir
    from mtl_jax.training import mesh as meshes

    if not is_workdir(Path(path)):
        if task:
            raise UserError(f"--task {task}: {path} is no workdir of a run; leave it out")
        return text_model.from_checkpoint(path, asked, meshes.compute_dtype(dtype))
    if dtype != "auto":
        raise UserError(f"--dtype {dtype}: {path} is a run, which is computed in what it was trained in; leave it out")
    return text_model.from_run(Path(path), asked, task)


def _read(text: tuple[str, ...], files: Files, field: str) -> _Input:
    for flag, value in (("--file", files.file), ("--column", files.column)):
        if text and value:
            raise UserError(f"give a text, or {flag}, not both")
    if text:
        for number, one in enumerate(text, start=1):
            if not one.strip():
                raise UserError(f"text {number} is empty; give a text, or --file")
            _check_unicode(one, f"text {number}")
        return _Input("", list(text), None)
    name = files.file or STANDARD_INPUT
    lines = lines_of(read_bytes(name), name)
    if not (files.column or name.endswith(".jsonl")):
        return _Input(name, lines, None)
    column = files.column or "text"
    objects: list[dict[str, Any] | None] = []
    texts = []
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        found = object_of(line, where) if line.strip() else None
        objects.append(found)
        texts.append("" if found is None else _text(found, column, field, where))
    return _Input(name, texts, objects)


def _text(found: dict[str, Any], column: str, field: str, where: str) -> str:
    if not isinstance(found.get(column), str):
        what = f"is {kind_of(found[column])}, not a text" if column in found else "is missing"
        raise UserError(f"{where}: {column!r} {what}; the object has {listed(found)} (choose by --column)")
    taken = [name for name in (field, f"{field}_score") if name in found]
    if taken:
        raise UserError(f"{where}: there is a {taken[0]!r} already; name the answer by --field")
    _check_unicode(json.dumps(found, ensure_ascii=False), where)
    return found[column]


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: no valid Unicode ({error.object[error.start]!r} is half a character)") from error


def _line(given: _Input, place: int, answer: TextAnswer, field: str, scores: bool) -> str:
    """A line of the output."""
    if given.objects is None and not scores:
        return answer.texts[0] if answer.texts else ""
    found = {"text": given.texts[place]} if given.objects is None else given.objects[place]
    if found is None:
        return ""
    texts, numbers = list(answer.texts), [None if score is None else round(score, 4) for score in answer.scores]
    several = len(texts) > 1
    added: dict[str, Any] = {field: texts if several else "".join(texts)}
    if scores:
        added[f"{field}_score"] = numbers if several else next(iter(numbers), None)
    return to_json(found | added, ensure_ascii=False)
