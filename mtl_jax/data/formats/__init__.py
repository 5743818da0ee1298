"""Readers of formats by name: a function from a file to its rows for each, those of mtl_jax and those of a script."""

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mtl_jax.core import assets
from mtl_jax.core.parts import Registry, origin_of
from mtl_jax.data.formats.conll import read_conll
from mtl_jax.data.formats.json_files import read_jsonl, read_squad
from mtl_jax.data.formats.python_rows import as_rows
from mtl_jax.data.formats.rows import Read
from mtl_jax.data.formats.text_files import read_csv, read_lines, read_parallel, read_tsv
from mtl_jax.data.source import NAMED, Source

READERS: Registry[Callable[..., Any]] = Registry(
    "format",
    {
        "csv": read_csv,
        "tsv": read_tsv,
        "lines": read_lines,
        "jsonl": read_jsonl,
        "conll": read_conll,
        "parallel": read_parallel,
        "squad": read_squad,
    },
)


def register_format(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for a function that reads a file: Source(format=name) and --sources.N.format then use it.

    The function takes the path (str), and the Source if it has a second parameter called `source`. It returns, or yields, a
    dict of columns for each row. A value is a text, a list of words, a number, true or false, None for no value, or answers,
    [{"text": str, "start": int}, ...]; numbers become text as in jsonl. In place of a row it may give a UserError, which says
    why the row cannot be read; or a Row, which has its own place for error lines.

    Examples:
        >>> import mtl_jax
        >>> @mtl_jax.data.register_format("shouted")
        ... def read_shouted(path):
        ...     with open(path, encoding="utf-8") as file:
        ...         for line in file:
        ...             yield {"text": line.strip().lower(), "label": "!" in line}
        >>> mtl_jax.Source("forum", "forum.txt", format="shouted").format
        'shouted'

    Args:
        name: The format's name: letters, digits and "_".

    Raises:
        UserError: The name is taken.
    """
    return READERS.register(name)


def takes_source(name: str) -> bool:
    """Whether the reader of a format takes the Source beside the path."""
    return "source" in inspect.signature(READERS[name]).parameters


def names_columns(name: str) -> bool:
    """Whether a Source of this format may name columns: of some of our formats, and of a script's that takes the Source."""
    return name in NAMED or (origin_of(READERS[name]) is not None and takes_source(name))


def read_file(path: str, source: Source) -> Iterator[Read]:
    """The rows of a file in the format of a source, in place of a bad one its error.

    Raises:
        UserError: The file cannot be read; or the reader of a script fails, which names its format, its file and the row.
    """
    reader = READERS[source.format]
    origin = origin_of(reader)
    if origin is None:
        yield from reader(path, source)
        return
    with _local(path) as file:
        arguments = (file, source) if takes_source(source.format) else (file,)
        what = f"the reader of format {source.format}, {origin.file},"
        yield from as_rows(lambda: reader(*arguments), lambda number: f"{path}: row {number + 1}", what)


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    """The path of a file that open() can read; a file of a wheel is copied for the time being."""
    located = assets.locate(path)
    if isinstance(located, Path):
        yield str(located)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, located.name)
        copy.write_bytes(located.read_bytes())
        yield str(copy)
