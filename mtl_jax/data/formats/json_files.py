"""JSON files: jsonl, an object a line, and SQuAD's nested articles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from mtl_jax.core.errors import UserError
from mtl_jax.core.text_lines import not_by_line
from mtl_jax.data.formats.lines import lines, opened
from mtl_jax.data.formats.records import columns
from mtl_jax.data.formats.rows import Read, Row, check_columns
from mtl_jax.data.source import Source

SQUAD_COLUMNS = ("id", "question", "context", "answers", "title")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair that is one character


class _Float(float):
    """A number that prints as it is written in the file."""

    text: str

    def __new__(cls, text: str) -> _Float:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def read_jsonl(path: str, source: Source) -> Iterator[Read]:
    """Rows of a file with an object on every line that is not blank; records.columns makes its columns.

    Raises:
        UserError: The file is one JSON value: an array, or an object over several lines.
    """
    first = True
    for line in lines(path):
        where = f"{path}:{line.number}"
        if line.text.strip():
            if first and (problem := not_by_line(line.text)):
                raise UserError(f"{where}: {problem}")
            first = False
        if line.error:
            yield line.error
        elif line.text.strip():
            yield _row(line.text, where)


def parse(text: str) -> Any:
    """A JSON value; numbers print as they are written.

    Raises:
        ValueError: The text is not JSON, or not Unicode (half of a surrogate pair).
    """
    value = json.loads(text, parse_float=_Float, parse_constant=_constant)
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("an escape \\ud... that is only half of a character") from error
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null where there is no value")


def _row(text: str, where: str) -> Read:
    try:
        value = parse(text)
        if not isinstance(value, dict):
            return UserError(f"{where}: not a JSON object")
        return Row(columns(value), where)
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: {error}")


def read_squad(path: str, source: Source) -> Iterator[Read]:
    """A row for each question: id, question, context, the article's title ("" where it has none), and answers.

    Answers are a list of {"text": str, "start": int}, start in characters of the context; empty if the question has no answer.
    An answer that several people gave is repeated as often. A row is located by its path in the JSON, and its id.
    """
    check_columns(source, path, SQUAD_COLUMNS)
    with opened(path) as file:
        data = file.read()
    if not data.strip():
        raise UserError(f"{path}: the file is empty")
    try:
        articles = parse(data.decode("utf-8-sig"))["data"]
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not in SQuAD's format: no list 'data' of articles") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(articles, list):
        raise UserError(f"{path}: not in SQuAD's format: no list 'data' of articles")
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_get(article, "paragraphs", list, f"{path}: data[{a}]")):
            where = f"{path}: data[{a}].paragraphs[{p}]"
            context = _get(paragraph, "context", str, where)
            for q, question in enumerate(_get(paragraph, "qas", list, where)):
                try:
                    yield _question_row(question, context, article.get("title", ""), f"{where}.qas[{q}]")
                except UserError as error:
                    yield error


def _question_row(question: Any, context: str, title: str, where: str) -> Row:
    name = str(_get(question, "id", (str, int), where))
    where = f"{where} (question {name})"
    answers = [] if question.get("is_impossible") else _get(question, "answers", list, where)
    return Row(
        {
            "id": name,
            "question": _get(question, "question", str, where),
            "context": context,
            "answers": [
                {"text": _get(answer, "text", str, where), "start": _get(answer, "answer_start", int, where)}
                for answer in answers
            ],
            "title": title,
        },
        where,
    )


def _get(value: Any, key: str, kind: Any, where: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise UserError(f"{where}: not in SQuAD's format: no {key!r}, or of the wrong type")
    return value[key]
