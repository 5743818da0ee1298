"""The commands mtl-jax translate, summarize and generate: one text, or a file line by line."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mtl_jax.cli import text_rows
from mtl_jax.cli.text_rows import Rows
from mtl_jax.core.errors import UserError
from mtl_jax.core.text_lines import STANDARD_OUTPUT, print_lines
from mtl_jax.inference.text_kinds import GENERATE, SUMMARIZE, TRANSLATE, Kind, check_numbers

if TYPE_CHECKING:
    from mtl_jax.decoding import GenerationConfig

log = logging.getLogger(__name__)

Texts = tyro.conf.Positional[tuple[str, ...]]
_FLAT = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True)
class Files:
    """Where texts come from and where answers go.

    Attributes:
        file: A UTF-8 file with one text per line, or with one JSON object per line if its name ends in .jsonl. "-", or neither
            a file nor a text: standard input. The output has the same lines in the same order; empty lines stay empty.
        output: The file to write; without it, or "-": standard output. The file is replaced when all answers are done. Until
            then OUTPUT.part keeps the finished answers, and the same command, started again, resumes from them.
        column: The name of the text in the objects; if it is given, standard input is read as objects, too. Default: text.
        field: The name of the answer in the objects. Default: translation, summary, or answer.
        scores: Write scores, too, as FIELD_score; lines of text then become objects.
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
        task: For a run: the task whose decoder writes the answers, if the run has several.
        source_language: The language of the texts, if the model must be told (mBART: en_XX; NLLB: eng_Latn; T5: en).
        target_language: The language of the answers, if the model must be told (mBART: fr_XX; Marian: fra; T5: fr).
        prefix: A text in front of every text, which T5 needs. Default: the checkpoint's prefix for this task.
        long: What happens to a text with more tokens than the model takes: "divide" it at ends of sentences and join the
            answers; or "cut" off the end. Default: divide to translate, cut to summarize. Both are reported.
        max_source_tokens: Fewer tokens than the model takes; or more, if it has no table of positions (T5).
    """

    task: str = ""
    source_language: str = ""
    target_language: str = ""
    prefix: str | None = None
    long: Literal["divide", "cut"] | None = None
    max_source_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        prompt: A prompt with columns of the objects in braces, such as "Question: {question} Answer:"; {text} is the line of a
            file of texts. Default: the text itself.
        chat: The prompt is a user's message in the chat template of the checkpoint's tokenizer.
        task: For a run: the task whose decoder writes the answers, if the run has several.
        max_source_tokens: Fewer tokens than the model takes; a longer prompt loses its beginning.
    """

    prompt: str = ""
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    task: str = ""
    max_source_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Search:
    """How answers are searched for, with the names that transformers uses. Default: the values of the checkpoint.

    Attributes:
        num_beams: Number of beams; 1 is greedy search.
        max_new_tokens: Most tokens of an answer.
        min_new_tokens: Fewest tokens of an answer.
        max_length: Most tokens of an answer, the token that decoding starts with included.
        min_length: Fewest tokens of an answer, the token that decoding starts with included.
        length_penalty: Scores are divided by the length to this power: above 0 prefers longer answers.
        early_stopping: Whether beam search ends as soon as there are enough answers; "never": only when none can be better.
        no_repeat_ngram_size: No sequence of this many tokens occurs twice in an answer.
        repetition_penalty: Above 1 makes tokens that already occur less likely.
        num_return_sequences: Answers per text; more than one needs objects (a .jsonl file, or --scores).
        sample: Draw tokens at random, with a single beam unless --num-beams is given.
        no_sample: Take the likeliest tokens, even if the checkpoint draws them.
        temperature: Sampling: logits are divided by it.
        top_k: Sampling: only this many of the most likely tokens.
        top_p: Sampling: only the most likely tokens that together have this probability.
        seed: Sampling: its seed.
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
        """The options with the names of GenerationConfig; None where a flag was not given."""
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
        """A line for each group of given flags that change nothing in such a search, with the reason."""
        lines = []
        for names, applies, reason in (
            (("temperature", "top_k", "top_p"), config.do_sample, "without --sample"),
            (("length_penalty", "early_stopping"), config.num_beams > 1, "with one beam"),
        ):
            flags = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
            lines += [f"{', '.join(flags)} changes nothing {reason}"] if flags and not applies else []
        return lines


@dataclasses.dataclass(frozen=True)
class Work:
    """How the work is done.

    Attributes:
        rows: Texts per batch and device.
        dtype: Compute dtype: auto is bfloat16 on accelerators and float32 on CPU; for a run, its own dtype.
    """

    rows: int = 32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


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
        files: Where texts come from and where answers go.
        task: What the model is asked to do.
        search: How answers are searched for.
        work: How the work is done.
    """
    _answer(TRANSLATE, text, model, files, task, search, work)


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
        files: Where texts come from and where answers go.
        task: What the model is asked to do.
        search: How answers are searched for.
        work: How the work is done.
    """
    _answer(SUMMARIZE, text, model, files, task, search, work)


def generate(
    text: Texts = (),
    /,
    *,
    model: str,
    files: Annotated[Files, _FLAT] = Files(),
    prompt: Annotated[Prompt, _FLAT] = Prompt(),
    search: Annotated[Search, _FLAT] = Search(),
    work: Annotated[Work, _FLAT] = Work(),
) -> None:
    """Answers to prompts, or to those of a file: mtl-jax generate --model DIR --file in.jsonl --prompt "Q: {question} A:"

    Args:
        text: Texts to answer.
        model: A Llama, Qwen or Gemma checkpoint: a directory, pip:ASSET/MEMBER, gguf:FILE, gguf:gemma3-270m, or a hub id
            ORG/NAME; or a run's workdir.
        files: Where texts come from and where answers go.
        prompt: What the model reads.
        search: How answers are searched for.
        work: How the work is done.
    """
    task = Task(task=prompt.task, max_source_tokens=prompt.max_source_tokens)
    _answer(GENERATE, text, model, files, task, search, work, prompt)


def _answer(
    kind: Kind,
    text: tuple[str, ...],
    path: str,
    files: Files,
    task: Task,
    search: Search,
    work: Work,
    prompt: Prompt = Prompt(),
) -> None:
    """Reads the texts, generates the answers and writes them, in the order in which mistakes are cheapest to find."""
    output = _output_file(files)
    check_numbers(work.rows, task.max_source_tokens, search.seed)
    if search.sample and search.no_sample:
        raise UserError("give --sample or --no-sample, not both")
    field = files.field or kind.field
    rows = _read(text, files, field, prompt.prompt)
    texts = _prompts(rows, path, prompt.prompt) if prompt.prompt else rows.texts

    from mtl_jax.inference import answer_texts, generate_texts  # imported late: --help and mistakes need none of it
    from mtl_jax.inference.resumable_output import Journal
    from mtl_jax.inference.text_model import TextRequest
    from mtl_jax.training.preemption import stop_on_signals

    journal: Journal | None = None
    with stop_on_signals() as stop, contextlib.ExitStack() as stack:
        request = TextRequest(kind.task, task.source_language, task.target_language, task.prefix, prompt.chat)
        model, _ = answer_texts.open_text_model(path, request, task.task, work.dtype)
        config = generate_texts.configure(model, search.options(), path)
        if config.num_return_sequences > 1 and rows.objects is None and not files.scores:
            raise UserError(f"{config.num_return_sequences} answers do not fit on a line of text; --scores makes lines of JSON")
        for line in search.without_effect(config):
            log.warning("%s", line)
        long = task.long or kind.long

        def open_journal(limit: int | None) -> Journal:
            nonlocal journal
            assert output is not None
            made_from = generate_texts.provenance(model, texts, config, work.rows, search.seed)
            asked = {"task": task.task, "source_language": task.source_language}  # by which the same model reads otherwise
            header = {"command": kind.name, **made_from, **asked, "limit": limit, "long": long}
            journal = Journal(output, header, generate_texts.ITEM)
            stack.callback(journal.close)
            return journal

        answers = answer_texts.generate(
            model,
            texts,
            config,
            long,
            task.max_source_tokens,
            rows=work.rows,
            seed=search.seed,
            file=rows.file,
            progress_title="" if text else kind.name,
            open_journal=None if output is None else open_journal,
            stopped=stop.flag.is_set,
        )
        lines = [text_rows.answer_line(rows, place, answer, field, files.scores) for place, answer in enumerate(answers)]
        if journal is None:
            print_lines(lines)
        else:
            journal.finish(lines)


def _output_file(files: Files) -> Path | None:
    """The file that answers go to; None for standard output."""
    from mtl_jax.inference.resumable_output import check_writable

    if files.output not in ("", STANDARD_OUTPUT):
        return check_writable(files.output, [files.file] if files.file else [])
    if sys.stdout is None:
        raise UserError("standard output is closed; give --output")
    return None


def _read(text: tuple[str, ...], files: Files, field: str, prompt: str) -> Rows:
    for flag, value in (("--file", files.file), ("--column", files.column)):
        if text and value:
            raise UserError(f"give a text, or {flag}, not both")
    if text:
        return text_rows.of_arguments(text)
    column = files.column
    if prompt and not column and files.file.endswith(".jsonl"):
        from mtl_jax.inference.answer_prompts import columns

        column = next(iter(columns(prompt)), "")
    return text_rows.of_file(files.file, column, field)


def _prompts(rows: Rows, path: str, prompt: str) -> list[str]:
    """The prompt of each text.

    Raises:
        UserError: The model is a run, or a row lacks a column.
    """
    from mtl_jax.inference import answer_prompts

    answer_prompts.check_prompt(path, prompt)
    objects = [{answer_prompts.TEXT: line} for line in rows.texts] if rows.objects is None else rows.objects
    return answer_prompts.prompts(prompt, objects, rows.texts, rows.file)
