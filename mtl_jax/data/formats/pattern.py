"""lines: a row a line, its columns found by a regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtl_jax.data.formats.lines import lines
from mtl_jax.data.formats.rows import Read, Row, check_columns
from mtl_jax.errors import UserError
from mtl_jax.files import shown

if TYPE_CHECKING:
    from mtl_jax.data.sources import Source


def read_lines(path: str, source: Source) -> Iterator[Read]:
    """Rows of a text file: source.pattern must match the whole of every line that is not empty."""
    pattern = re.compile(source.pattern)
    check_columns(source, path, pattern.groupindex)
    for line in lines(path):
        where = f"{path}:{line.number}"
        match = None if line.error else pattern.fullmatch(line.text)
        if line.error:
            yield line.error
        elif match:
            yield Row(match.groupdict(default=""), where)
        elif line.text:
            yield UserError(f"{where}: the line does not match the pattern {shown(source.pattern)!r}")
