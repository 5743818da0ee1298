"""Prompts and their answers: from columns or messages to the tokens that a causal LM learns.

The tokens of a row are those of the prompt, of the answer, and of the end. The answer is tokenised apart from the prompt, since
the model that has read the prompt alone must find the same tokens.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.row_texts import quoted
from mtl_jax.data import tokenize as tokenizing
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.ragged import Ragged
from mtl_jax.data.tokenize import Encodings
from mtl_jax.pretrained.locate import foreign

ANSWER = "0answer0"  # a text to find in a template
NO_LIMIT = 10**9  # tokens

Messages = Sequence[Mapping[str, str]]


class Conversation(NamedTuple):
    """Messages, divided where the model is to go on.

    Attributes:
        prompt: {"role": ..., "content": ...} of each message before the answer.
        answers: The answer; empty if there is none.
    """

    prompt: Messages
    answers: tuple[str, ...]


class SpecialTokens(NamedTuple):
    """The tokens around prompts and answers.

    Attributes:
        start: The number of special tokens that the tokenizer puts in front of a text.
        end: The token that ends an answer.
    """

    start: int
    end: int


def special_tokens(tokenizer: Any, chat: bool, where: str) -> SpecialTokens:
    """The tokens around prompts and answers of a tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        chat: Whether prompts are in its chat template; the answer then ends as an assistant's message does.
        where: The task's name, for errors.

    Raises:
        UserError: It has no chat template, or no token that ends a text.
    """
    start, _ = _around(tokenizer)
    end = tokenizer.eos_token_id
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{where}: the trunk's tokenizer has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): take the checkpoint that is for chats, or leave chat and messages out and give prompt"
            )
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        text = _apply_template(tokenizer, turns, where, add_generation_prompt=False)
        after = tokenizer(text[text.rfind(ANSWER) + len(ANSWER) :], add_special_tokens=False)["input_ids"]
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        end = next((token for token in after if token in special), end) if ANSWER in text else end
    if end is None:
        raise UserError(f"{where}: the trunk's tokenizer has no token that ends a text (eos_token in tokenizer_config.json)")
    return SpecialTokens(start, end)


def _around(tokenizer: Any) -> tuple[int, int]:
    """The numbers of special tokens that a tokenizer puts in front of a text and after it."""
    whole, inner = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    places = range(len(whole) - len(inner) + 1)
    start = next((place for place in places if whole[place : place + len(inner)] == inner), 0)
    return start, len(whole) - len(inner) - start


def _apply_template(tokenizer: Any, messages: Messages, where: str, add_generation_prompt: bool) -> str:
    with foreign(f"{where}: the tokenizer's chat template refuses the messages"):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return str(text)


def rendered(tokenizer: Any, messages: Messages, where: str) -> str:
    """The prompt of messages in the tokenizer's chat template, up to where the assistant's answer begins.

    Args:
        tokenizer: A transformers tokenizer.
        messages: The messages.
        where: The row, for errors.

    Raises:
        UserError: The template refuses the messages, for example for the order of their roles.
    """
    return _apply_template(tokenizer, messages, where, add_generation_prompt=True)


def columns(template: str) -> list[str]:
    """The columns that a prompt names.

    Raises:
        ValueError: Its braces do not match.
    """
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def read_columns(template: str) -> list[str]:
    """The columns that a prompt may read: those that it names, and of a name with a dot or a bracket the part before it.

    Raises:
        ValueError: Its braces do not match.
    """
    names = columns(template)
    return list(dict.fromkeys(column for name in names for column in (name, re.split(r"[.\[]", name, maxsplit=1)[0]) if column))


def filled(template: str, row: Row, where: str) -> str:
    """A prompt: the template with the row's columns in place of their names in braces.

    Raises:
        UserError: The row has no such column, or no text in it, or the template is not one.
    """
    try:
        return _Formatter().vformat(template, (), _Columns(row, where))
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{where}: prompt {template!r} is not a text with columns in braces ({error})") from error


class _Formatter(string.Formatter):
    """As str.format, but a dot may be a part of a column's name, as in those of nested values."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Any) -> Any:
        if field_name in kwargs.row.columns:
            return kwargs[field_name], field_name
        return super().get_field(field_name, args, kwargs)


class _Columns(dict[str, str]):
    def __init__(self, row: Row, where: str):
        super().__init__()
        self.row, self.where = row, where

    def __missing__(self, name: str) -> str:
        value = self.row.columns.get(name)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return " ".join(value)
        if not isinstance(value, str):
            has = f"has {quoted(value)} in column {name!r}" if name in self.row.columns else f"has no column {name!r}"
            raise UserError(f"{self.row.where}: {self.where}: the row {has}, which prompt names")
        return value


def of_text(text: str) -> Conversation:
    """A user's only message."""
    return Conversation(({"role": "user", "content": text},), ())


def parse(value: Any) -> Conversation:
    """The conversation of a column.

    Args:
        value: A list of {"role": str, "content": str} or its JSON text; any other text is a user's message.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return of_text(value)
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a list of messages: {quoted(value)} ({error.msg})") from error
    fields = ("role", "content")
    if not isinstance(value, list) or not value:
        raise ValueError(f"{quoted(value)} is not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(field), str) for field in fields):
            raise ValueError(f"the message {quoted(message)} lacks {listed(fields)}, or they are not texts")
    messages = [{field: message[field] for field in fields} for message in value]
    if messages[-1]["role"] == "assistant":
        if len(messages) < 2:
            raise ValueError("a conversation with an answer and no message before it")
        return Conversation(tuple(messages[:-1]), (messages[-1]["content"],) if messages[-1]["content"].strip() else ())
    return Conversation(tuple(messages), ())


def of_row(row: Row, column: str, where: str) -> Conversation:
    """parse() of a row's column.

    Raises:
        UserError: It is no conversation; names file, line and task.
    """
    try:
        return parse(row.columns.get(column))
    except ValueError as error:
        raise UserError(f"{row.where}: {where}: {error}") from error


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    end: int,
    start: int,
    max_length: int,
    target_length: int,
    cache: Path | None = None,
) -> Encodings:
    """The tokens of prompt, answer and end of N rows.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: N texts.
        answers: N texts; "" for none, and then the row has no end either.
        end: The token after an answer.
        start: The number of the tokenizer's special tokens that stay in front of a prompt.
        max_length: Most tokens of a row; a longer prompt loses tokens after its special ones.
        target_length: Most tokens of an answer with its end; a longer answer loses those before its end.
        cache: As for data.tokenize.encode.

    Returns:
        Encodings with types 1 at the tokens of answer and end, 0 at those of the prompt.

    Raises:
        RowError: A text is not valid Unicode.
    """
    before, after = _around(tokenizer)
    prompt_tokens, answer_tokens = (
        tokenizing.encode(tokenizer, texts, max_length=NO_LIMIT, cache=cache).tokens for texts in (prompts, answers)
    )
    rows, types, truncated = [], [], []
    for number, (prompt, answer) in enumerate(zip(prompt_tokens, answer_tokens, strict=True)):
        prompt = prompt[before - start : len(prompt) - after]
        answer = answer[before : len(answer) - after]
        cut = len(answer) >= target_length
        answer = np.append(answer[: target_length - 1], np.int32(end)) if answers[number] else answer[:0]
        room = max_length - len(answer)
        kept = prompt if len(prompt) <= room else np.concatenate([prompt[:start], prompt[len(prompt) - room + start :]])
        if cut or len(kept) < len(prompt):
            truncated.append(number)
        rows.append(np.concatenate([kept, answer]).astype(np.int32))
        types.append(np.repeat(np.array([0, 1], np.int32), [len(kept), len(answer)]))
    has_answers = any(part.any() for part in types)
    return Encodings(
        tokens=Ragged.of(rows, np.int32),
        types=Ragged.of(types, np.int32) if has_answers else None,
        words=None,
        offsets=None,
        rows=np.arange(len(rows), dtype=np.int32),
        truncated=np.array(truncated, np.int64),
    )
