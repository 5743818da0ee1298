"""The texts that a command answers, from its arguments or a file, and the lines that hold the answers.

A file has a text in each line, or a JSON object with the text in one of its columns. The answers have the same lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.files import to_json
from mtl_jax.core.text_lines import STANDARD_INPUT, check_unicode, kind_of, lines_of, object_of, read_bytes
from mtl_jax.inference.text_kinds import answer_object

if TYPE_CHECKING:
    from mtl_jax.inference.generate_texts import TextAnswer


class Rows(NamedTuple):
    """Texts in order.

    Attributes:
        file: The file that they are from; "" where they are arguments.
        texts: The texts; "" for an empty line.
        objects: For lines of JSON: the objects, None for an empty line. None for lines of text.
    """

    file: str
    texts: list[str]
    objects: list[dict[str, Any] | None] | None


def of_arguments(texts: Sequence[str]) -> Rows:
    """The texts of the command line.

    Raises:
        UserError: One is empty, or is not valid Unicode.
    """
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"text {number} is empty; give a text, or --file")
        check_unicode(text, f"text {number}")
    return Rows("", list(texts), None)


def of_file(file: str, column: str, field: str) -> Rows:
    """The texts of a file.

    Args:
        file: A UTF-8 file with a text in each line; "" or "-": standard input.
        column: The name of the text in lines of JSON; "": text if the file's name ends in .jsonl, else lines are texts.
        field: The name that the answer will have in an object.

    Raises:
        UserError: The file cannot be read, a line is not an object with such a text, or already has the answer's name.
    """
    file = file or STANDARD_INPUT
    lines = lines_of(read_bytes(file), file)
    if not (column or file.endswith(".jsonl")):
        return Rows(file, lines, None)
    objects: list[dict[str, Any] | None] = []
    texts = []
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        row = object_of(line, where) if line.strip() else None
        objects.append(row)
        texts.append("" if row is None else _text_of(row, column or "text", field, where))
    return Rows(file, texts, objects)


def answer_line(rows: Rows, place: int, answer: TextAnswer, field: str, scores: bool) -> str:
    """The line of the output for a text: the answer alone, or a JSON object with the text's object and the answer.

    Args:
        rows: All texts.
        place: The place of the text, from 0.
        answer: Its answers.
        field: The name of the answer in an object.
        scores: Whether scores are written, too, as FIELD_score; a line of text then becomes an object.
    """
    if rows.objects is None and not scores:
        return answer.texts[0] if answer.texts else ""
    row = {"text": rows.texts[place]} if rows.objects is None else rows.objects[place]
    if row is None:
        return ""
    return to_json(answer_object(row, answer, field, scores), ensure_ascii=False)


def _text_of(row: dict[str, Any], column: str, field: str, where: str) -> str:
    if not isinstance(row.get(column), str):
        problem = f"is {kind_of(row[column])}, not a text" if column in row else "is missing"
        raise UserError(f"{where}: {column!r} {problem}; the object has {listed(row)} (choose by --column)")
    taken = [name for name in (field, f"{field}_score") if name in row]
    if taken:
        raise UserError(f"{where}: there is a {taken[0]!r} already; name the answer by --field")
    check_unicode(json.dumps(row, ensure_ascii=False), where)
    return row[column]
