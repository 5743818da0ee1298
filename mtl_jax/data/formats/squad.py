"""squad: the JSON of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018): questions whose answers stand in a paragraph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mtl_jax.data.formats.jsonl import parse
from mtl_jax.data.formats.lines import opened
from mtl_jax.data.formats.rows import Read, Row, check_columns
from mtl_jax.errors import UserError

if TYPE_CHECKING:
    from mtl_jax.data.sources import Source

COLUMNS = ("id", "question", "context", "answers", "title")


def read_squad(path: str, source: Source) -> Iterator[Read]:
    """A row for each question: id, question, context, the article's title ("" where it has none), and answers.

    Answers are a list of {"text": str, "start": int}, the place in characters of the context; empty where the question has
    no answer. The same answer given by several people stands there as often. A row's place is its path in the JSON, and its id.
    """
    check_columns(source, path, COLUMNS)
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
        raise UserError(f"{path}:{error.lineno}: no JSON ({error.msg})") from error
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
                    yield _row(question, context, article.get("title", ""), f"{where}.qas[{q}]")
                except UserError as error:
                    yield error


def _row(question: Any, context: str, title: str, where: str) -> Row:
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
