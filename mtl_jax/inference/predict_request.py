"""A request to predict the lines of a file: what is asked for, and the lines, read and checked one at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from mtl_jax.core import text_lines
from mtl_jax.core.errors import UserError, listed
from mtl_jax.inference import answer_rows
from mtl_jax.inference.answer_rows import Reading

CHUNK = 4096  # lines that are read, computed and kept at once
FIELD = "prediction"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be predicted, and how.

    Attributes:
        tasks: Names of tasks. One: a line of the answers is its prediction; several: {task: prediction}.
        texts: Texts, which are answered before those of the file.
        file: A file with a text in each line, or, if its name ends in .jsonl, a JSON object with the text columns; "-" is
            standard input; "": none.
        top_k: As for predict().
        deidentify: As for predict().
        field: The field of the prediction beside the fields of its line; "": the prediction alone.
        rows: Rows of a batch on each device; 0: those of the run's batches.
        chunk: Lines that are read, computed and kept at once.
    """

    tasks: tuple[str, ...]
    texts: tuple[str, ...] = ()
    file: str = ""
    top_k: int | None = None
    deidentify: bool = False
    field: str = ""
    rows: int = 0
    chunk: int = CHUNK

    @property
    def has_objects(self) -> bool:
        """Whether lines of the file are JSON objects."""
        return self.file.endswith(".jsonl")


class Line(NamedTuple):
    """One input: its number, from 1; the text of its line; whether that is a JSON object."""

    number: int
    text: str
    is_object: bool


def check(request: Request) -> None:
    """Raises UserError where a field of a request makes no sense."""
    if not (request.texts or request.file):
        raise UserError("nothing to predict: give --text or --file")
    if not request.tasks:
        raise UserError("task is empty; name a task of the run")
    if len(set(request.tasks)) < len(request.tasks):
        raise UserError(f"task names a task twice: {listed(request.tasks)}")
    for name, value, least in (("top_k", request.top_k, 1), ("rows", request.rows, 0), ("chunk", request.chunk, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")


def read_lines(request: Request, stream: BinaryIO | None) -> Iterator[Line]:
    """All inputs: the texts, then the lines of the file from its start."""
    numbers = itertools.count(1)
    for given in request.texts:
        yield Line(next(numbers), given, False)
    if stream is not None:
        stream.seek(0)
        for line in text_lines.read_lines(stream, request.file):
            yield Line(next(numbers), line, request.has_objects)


def value_of(request: Request, line: Line) -> str | dict[str, Any]:
    """The text or the object of a line; {} for an empty line where others are objects."""
    if not line.is_object:
        return line.text
    where = f"{request.file}:{line.number - len(request.texts)}"
    return text_lines.object_of(line.text, where) if line.text.strip() else {}


def checked(request: Request, stream: BinaryIO | None, readings: Sequence[Reading]) -> tuple[int, str]:
    """Checks every input; returns their number, and the SHA-256 of how they are read and what they are.

    Raises:
        UserError: An input cannot be read.
    """
    digest, number = hashlib.sha256(), 0
    for line in read_lines(request, stream):
        value, number = value_of(request, line), line.number
        for reading in readings:
            answer_rows.check_row(reading, row_of(request, reading, value, number))
        if request.field:
            _check_fields(request, value, number)
        digest.update(f"{'object' if line.is_object else 'text'} {line.text}\n".encode("utf-8", "surrogatepass"))
    return number, digest.hexdigest()


def row_of(request: Request, reading: Reading, value: Any, number: int) -> Any:
    """An input as a row of the tasks that read it in one way.

    Raises:
        UserError: It has no text in a text column.
    """
    messages = reading.as_messages
    return answer_rows.row_of(reading.source, value, number, reading.as_words, request.file, as_messages=messages)


def _check_fields(request: Request, value: Any, number: int) -> None:
    """Raises UserError where the fields of an input cannot stand beside the prediction."""
    where = f"{request.file}: input {number}" if request.file else f"input {number}"
    fields = fields_of(value)
    if request.field in fields:
        raise UserError(f"{where}: there is a {request.field!r} already; name the prediction by --field")
    text_lines.check_unicode(json.dumps(fields, ensure_ascii=False), where)


def fields_of(value: Any) -> Mapping[str, Any]:
    """The fields of an input."""
    return value if isinstance(value, Mapping) else {"text": value}


def chunks(request: Request, stream: BinaryIO | None, total: int) -> Iterator[tuple[int, list[Line]]]:
    """The first `total` inputs, `request.chunk` at a time, with the number of each chunk from 0."""
    inputs = itertools.islice(read_lines(request, stream), total)  # others were added since they were checked
    for number in itertools.count():
        chunk = list(itertools.islice(inputs, request.chunk))
        if not chunk:
            return
        yield number, chunk
