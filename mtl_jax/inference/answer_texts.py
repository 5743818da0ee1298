"""Translates, summarises, answers prompts: opens the model, plans the texts, generates; for the commands and from Python."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from mtl_jax.core import log_lines
from mtl_jax.core.errors import UserError, count, unknown
from mtl_jax.core.progress import Progress
from mtl_jax.core.row_texts import hiding
from mtl_jax.core.text_lines import as_list, kind_of
from mtl_jax.decoding import GenerationConfig
from mtl_jax.inference import generate_texts, text_model
from mtl_jax.inference.generate_texts import Long, TextAnswer
from mtl_jax.inference.predict import Model, is_workdir
from mtl_jax.inference.resumable_output import Journal
from mtl_jax.inference.text_kinds import SUMMARIZE, TRANSLATE, Kind, answer_object, check_numbers
from mtl_jax.inference.text_model import TextModel, TextRequest
from mtl_jax.pretrained import Checkpoint
from mtl_jax.training import mesh as meshes

log = logging.getLogger(__name__)

AnyModel = str | Path | Model | Checkpoint
Answers = list[str] | list[dict[str, Any]]


def translate(
    model: AnyModel,
    texts: Sequence[str],
    *,
    task: str = "",
    source_language: str = "",
    target_language: str = "",
    prefix: str | None = None,
    long: Long | None = None,
    max_source_tokens: int | None = None,
    scores: bool = False,
    rows: int = 32,
    dtype: str = "auto",
    seed: int = 0,
    **options: Any,
) -> Answers:
    """Translations of texts, as the command mtl-jax translate gives them.

    Args:
        model: A Marian, BART, mBART, Pegasus or T5 checkpoint: a directory, pip:ASSET/MEMBER, a hub id, or the result of
            pretrained.load; or a run: its workdir, or load_model() of it.
        texts: The texts; an empty one has an empty answer.
        task: For a run: the task whose decoder writes the answers, if the run has several.
        source_language: The language of the texts, if the model must be told.
        target_language: The language of the answers, if the model must be told.
        prefix: A text in front of every text; None: the checkpoint's for this task.
        long: What happens to a text with more tokens than the model takes: "divide" it at ends of sentences and join the
            answers, or "cut" off the end; None: divide to translate, cut to summarize.
        max_source_tokens: Fewer tokens than the model takes, or more, if it has no table of positions.
        scores: Return objects with the text, the answer and its score.
        rows: Texts per batch and device.
        dtype: Compute dtype of a checkpoint that is opened here: auto, float32 or bfloat16.
        seed: Seed of sampling.
        options: How answers are searched for: fields of decoding.GenerationConfig, such as num_beams.

    Returns:
        A text for each text. With scores, or with several num_return_sequences, {"text": ..., "translation": ...,
        "translation_score": ...} for each text, several answers as lists, the best first.

    Raises:
        UserError: The model cannot be opened or writes no texts, or an option is refused.

    Examples:
        >>> [answer] = mtl_jax.translate("marian", ["hello"], num_beams=2, max_new_tokens=5)
        >>> type(answer)
        <class 'str'>
    """
    request = TextRequest(TRANSLATE.task, source_language, target_language, prefix)
    return from_python(TRANSLATE, model, texts, request, task, long, max_source_tokens, scores, rows, dtype, seed, options)


def summarize(
    model: AnyModel,
    texts: Sequence[str],
    *,
    task: str = "",
    source_language: str = "",
    target_language: str = "",
    prefix: str | None = None,
    long: Long | None = None,
    max_source_tokens: int | None = None,
    scores: bool = False,
    rows: int = 32,
    dtype: str = "auto",
    seed: int = 0,
    **options: Any,
) -> Answers:
    """Summaries of texts, as the command mtl-jax summarize gives them; arguments as for translate.

    Raises:
        UserError: The model cannot be opened or writes no texts, or an option is refused.

    Examples:
        >>> [answer] = mtl_jax.summarize(mtl_jax.pretrained.load("marian"), ["hello hello"], max_new_tokens=5, scores=True)
        >>> sorted(answer)
        ['summary', 'summary_score', 'text']
    """
    request = TextRequest(SUMMARIZE.task, source_language, target_language, prefix)
    return from_python(SUMMARIZE, model, texts, request, task, long, max_source_tokens, scores, rows, dtype, seed, options)


def from_python(
    kind: Kind,
    model: AnyModel,
    texts: Sequence[str],
    request: TextRequest,
    task: str,
    long: Long | None,
    max_source_tokens: int | None,
    scores: bool,
    rows: int,
    dtype: str,
    seed: int | Sequence[int],
    options: dict[str, Any],
) -> Answers:
    """The answers of a command's Python form, whose arguments these are: see translate.

    Raises:
        UserError: The model cannot be opened or writes no texts, or an option is refused.
    """
    log_lines.show()
    if long not in (None, *get_args(Long)):
        raise unknown("long", str(long), get_args(Long))
    texts = as_list(texts, "texts")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"texts: {kind_of(text)} is given; it must be a list of texts")
    if isinstance(seed, Sequence) and len(seed) != len(texts):
        raise UserError(f"seed: {count(len(seed), 'seed')} for {count(len(texts), 'text')}; give one for each, or one for all")
    for number in seed if isinstance(seed, Sequence) else [seed]:
        check_numbers(rows, max_source_tokens, number)
    opened, where = open_text_model(model, request, task, dtype)
    config = generate_texts.configure(opened, options, where)
    answers = generate(opened, texts, config, long or kind.long, max_source_tokens, rows=rows, seed=seed)
    if not scores and config.num_return_sequences == 1:
        return ["".join(answer.texts) for answer in answers]
    return [answer_object({"text": text}, answer, kind.field, True) for text, answer in zip(texts, answers, strict=True)]


def open_text_model(model: AnyModel, request: TextRequest, task: str, dtype: str) -> tuple[TextModel, str]:
    """The model that generates, and its name for errors.

    Args:
        model: As for translate.
        request: The task, its languages and prefix.
        task: For a run: the task whose decoder writes the answers.
        dtype: auto, float32 or bfloat16, for a checkpoint that is opened here.

    Raises:
        UserError: It cannot be opened, or an argument is not for such a model.
    """
    if isinstance(model, Checkpoint):
        where = str(model.location) if model.location is not None else "the checkpoint"
    else:
        where = str(model.workdir if isinstance(model, Model) else model)
    is_run = isinstance(model, Model) or (not isinstance(model, Checkpoint) and is_workdir(Path(model)))
    if task and not is_run:
        raise UserError(f"--task {task}: {where} is not the workdir of a run; leave the flag out")
    if dtype != "auto" and is_run:
        raise UserError(f"--dtype {dtype}: {where} is a run, which computes in the dtype of its training; leave the flag out")
    if dtype != "auto" and isinstance(model, Checkpoint):
        raise UserError(f"dtype {dtype}: the checkpoint is open already; give dtype to pretrained.load")
    if isinstance(model, Model):
        return text_model.of_run(model.run, model.workdir, request, task), where
    if isinstance(model, Checkpoint):
        return text_model.of_checkpoint(model, where, request), where
    if is_run:
        return text_model.from_run(Path(model), request, task), where
    return text_model.from_checkpoint(where, request, meshes.compute_dtype(dtype)), where


def generate(
    model: TextModel,
    texts: Sequence[str],
    config: GenerationConfig,
    long: Long,
    max_source_tokens: int | None,
    *,
    rows: int,
    seed: int | Sequence[int],
    file: str = "",
    progress_title: str = "",
    open_journal: Callable[[int | None], Journal] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[TextAnswer]:
    """The answer to each text; logs the texts that are divided, cut or left empty, and why.

    Args:
        model: The model.
        texts: The texts.
        config: The generation options.
        long: Whether long texts are divided or cut.
        max_source_tokens: Most tokens of a source; None: as many as the model takes.
        rows: Texts per batch and device.
        seed: Seed of sampling, or one for each text.
        file: The file that the texts are lines of, for the log; "": they are not.
        progress_title: The title of a progress bar; "": none.
        open_journal: From the most tokens of a source to the journal that keeps finished answers; the caller closes it.
        stopped: Called after each text; True ends the work.
    """
    limit = generate_texts.source_limit(model, max_source_tokens)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hiding(model.private))
        plan = generate_texts.make_plan(model, texts, long, limit)
        _report_texts(plan, file, long, limit)
        journal = None if open_journal is None else open_journal(limit)
        progress = None
        if progress_title:
            progress = Progress(progress_title, len(plan.sources), 0 if journal is None else len(journal.done), unit="text")
            stack.callback(progress.close)
        answers = generate_texts.generate(
            model, plan, config, len(texts), rows=rows, seed=seed, journal=journal, progress=progress, stopped=stopped
        )
    unfinished = [place for place, answer in enumerate(answers) if not answer.ended]
    generate_texts.warn_of_texts(unfinished, file, "with an answer that the length limit ended (--max-new-tokens)")
    not_finite = [place for place, answer in enumerate(answers) if None in answer.scores]
    generate_texts.warn_of_texts(not_finite, file, "left empty, as the model's output is not finite")
    return answers


def _report_texts(plan: generate_texts.Plan, file: str, long: str, limit: int | None) -> None:
    """Logs which texts are shortened or left empty, and the characters that the vocabulary does not know."""
    change = "divided at ends of sentences" if long == "divide" else "cut"
    generate_texts.warn_of_texts(plan.long, file, f"of more than {limit} tokens, {change}")
    generate_texts.warn_of_texts(plan.unknown, file, "of which the vocabulary knows nothing, left empty")
    if plan.refused:
        reason = next(iter(plan.refused.values()))
        generate_texts.warn_of_texts([*plan.refused], file, f"left empty, the first because {reason}")
    for line in plan.remarks:
        log.warning("%s", line)
