"""parallel: files side by side, line i of each is row i."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

from mtl_jax import assets
from mtl_jax.counting import count
from mtl_jax.data.formats.lines import lines
from mtl_jax.data.formats.rows import Read, Row, check_columns
from mtl_jax.errors import UserError

if TYPE_CHECKING:
    from mtl_jax.data.sources import Source


def parts(path: str) -> list[str]:
    """The names between the braces of a path.

    Raises:
        UserError: There are no braces, or more than one pair.
    """
    found = re.findall(r"\{([^{}]+)\}", path)
    if len(found) != 1 or path.count("{") != 1 or path.count("}") != 1:
        raise UserError(f'{path}: parallel files are named with one pair of braces, for example "train.{{en,fr}}"')
    return found[0].split(",")


def matches(path: str) -> list[str]:
    """The paths, one pair of braces in each, that a pattern with wildcards stands for, in sorted order.

    Raises:
        UserError: Nothing matches, or one file matches and another of its row does not.
    """
    names = parts(path)
    before, after = re.split(r"\{[^{}]+\}", path)
    if not assets.has_wildcard(before + after):
        return [path]
    braces = "{" + ",".join(names) + "}"
    found: list[set[str]] = []
    for name in names:
        # The texts that the wildcards stand for are the name of a set of files.
        pattern = _regex(before) + re.escape(name) + _regex(after)
        hits = [re.fullmatch(pattern, file) for file in assets.matches(before + name + after)]
        found.append({_fill(before + braces + after, hit.groups()) for hit in hits if hit})
    alone = sorted(found[0].union(*found) - found[0].intersection(*found))
    if alone:
        raise UserError(f"{alone[0]}: not all of these files exist")
    return sorted(found[0])


def _regex(pattern: str) -> str:
    return "".join({"*": "([^/]*)", "?": "([^/])"}.get(c, re.escape(c)) for c in pattern)


def _fill(pattern: str, texts: tuple[str, ...]) -> str:
    filled = iter(texts)
    return re.sub(r"[*?]", lambda _: next(filled), pattern)


def read_parallel(path: str, source: Source) -> Iterator[Read]:
    """Rows of files whose names differ between the braces only. Those parts name the columns, unless source.columns does.

    Raises:
        UserError: The files are not of one length: from some line on the rows would be wrong, and none can say which.
    """
    names = source.columns or tuple(parts(path))
    if len(names) != len(parts(path)):
        raise UserError(
            f"{path}: {count(len(parts(path)), 'file')}, but source {source.name!r} names {count(len(names), 'column')}"
        )
    check_columns(source, path, names)
    before, after = re.split(r"\{[^{}]+\}", path)
    files = [before + part + after for part in parts(path)]
    for number, row in enumerate(zip_longest(*map(lines, files)), start=1):
        ended = [file for file, line in zip(files, row, strict=True) if line is None]
        if ended:
            longer = next(file for file, line in zip(files, row, strict=True) if line is not None)
            raise UserError(
                f"{longer}:{number}: {ended[0]} has only {count(number - 1, 'line')}; parallel files must be of one length"
            )
        errors = [line.error for line in row if line.error]
        where = f"{path}:{number}"
        yield errors[0] if errors else Row({name: line.text for name, line in zip(names, row, strict=True)}, where)
