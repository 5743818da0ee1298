"""Answers prompts with a decoder-only checkpoint, or any other model that writes texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.data import conversations
from mtl_jax.data.formats.rows import Row
from mtl_jax.inference.answer_texts import Answers, AnyModel, from_python
from mtl_jax.inference.predict import Model, is_workdir
from mtl_jax.inference.text_kinds import GENERATE
from mtl_jax.inference.text_model import TextRequest

TEXT = "text"


def generate(
    model: AnyModel,
    texts: Sequence[str],
    *,
    prompt: str = "",
    chat: bool = False,
    task: str = "",
    max_source_tokens: int | None = None,
    scores: bool = False,
    rows: int = 32,
    dtype: str = "auto",
    seed: int | Sequence[int] = 0,
    **options: Any,
) -> Answers:
    """Answers to prompts, as the command mtl-jax generate gives them.

    Args:
        model: A decoder-only checkpoint, or one of translate's: a directory, pip:ASSET/MEMBER, gguf:NAME, a hub id, or the
            result of pretrained.load; or a run: its workdir, or load_model() of it.
        texts: The texts; an empty one has an empty answer.
        prompt: A prompt with {text} in the place of the text; "": the text itself.
        chat: Whether the prompt is a user's message in the chat template of the checkpoint's tokenizer.
        task: For a run: the task whose decoder writes the answers, if the run has several.
        max_source_tokens: Fewer tokens than the model takes; a longer prompt loses its beginning.
        scores: Return objects with the text, the answer and its score.
        rows: Texts per batch and device.
        dtype: Compute dtype of a checkpoint that is opened here: auto, float32 or bfloat16.
        seed: Seed of sampling; or one for each text, whose answer then does not depend on the other texts.
        options: How answers are searched for: fields of decoding.GenerationConfig, such as max_new_tokens, by default 20.

    Returns:
        A text for each text. With scores, or with several num_return_sequences, {"text": ..., "answer": ..., "answer_score":
        ...} for each text, several answers as lists, the best first.

    Raises:
        UserError: The model cannot be opened or writes no texts, or an option is refused.

    Examples:
        >>> [answer] = mtl_jax.generate("llama", ["the man"], prompt="who is {text} ?", max_new_tokens=5)
        >>> type(answer)
        <class 'str'>
    """
    check_prompt(model, prompt)
    texts = texts if isinstance(texts, str) else list(texts)  # an iterator is read once
    given = texts
    if isinstance(texts, Sequence) and not isinstance(texts, str) and all(isinstance(text, str) for text in texts):
        texts = prompts(prompt, [{TEXT: text} for text in texts], texts, "")
    request = TextRequest(GENERATE.task, chat=chat)
    answers = from_python(GENERATE, model, texts, request, task, None, max_source_tokens, scores, rows, dtype, seed, options)
    objects = [answer | {TEXT: text} for answer, text in zip(answers, given, strict=True) if isinstance(answer, dict)]
    return objects or answers


def check_prompt(model: Any, prompt: str) -> None:
    """Raises UserError where a prompt is given for a run, whose task has its own."""
    if prompt and (isinstance(model, Model) or (isinstance(model, str | Path) and is_workdir(Path(model)))):
        raise UserError(f"{getattr(model, 'workdir', model)}: a run's task has its own prompt; leave out --prompt")


def columns(prompt: str) -> list[str]:
    """The columns that a prompt names.

    Raises:
        UserError: Its braces do not match.
    """
    try:
        return conversations.columns(prompt)
    except ValueError as error:
        raise UserError(f"--prompt {prompt!r} is not a text with columns in braces ({error})") from error


def prompts(prompt: str, rows: Sequence[Mapping[str, Any] | None], texts: Sequence[str], file: str) -> list[str]:
    """The prompt of each row; blank texts stay blank.

    Args:
        prompt: A text with columns in braces; "": the texts themselves.
        rows: The columns of each text.
        texts: The texts.
        file: The file that they are lines of, for errors; "": they are not.

    Raises:
        UserError: A row lacks a column that the prompt names.
    """
    if not prompt:
        return list(texts)
    where = [f"{file}:{number}" if file else f"text {number}" for number in range(1, len(texts) + 1)]
    return [
        conversations.filled(prompt, Row(dict(row), place), "--prompt") if row is not None and text.strip() else ""
        for row, text, place in zip(rows, texts, where, strict=True)
    ]
