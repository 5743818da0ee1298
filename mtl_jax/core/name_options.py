"""The language in which a configuration names something and gives its options: one grammar, one parser.

    NAME
    NAME:OPTION=VALUE,OPTION=VALUE        cagrad:c=0.4
    NAME:VALUE:VALUE                      loggrid:1e-6:1e-3:8
    NAME(VALUE, ..., OPTION=VALUE)        linear_schedule(1.0, 0.0, 1000)

Weighting rules, combinators, schedules, mixtures, averages and the ranges of an ablation are written like this; commas separate
the elements of a list of them. A VALUE is a number, true, false, none, a text in quotes, or a tuple of these (in parentheses
also a list or a dict); anything else is a text as it stands. Nothing is ever executed.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import shown

WORDS = {"true": True, "false": False, "none": None}
# What ast.parse and ast.literal_eval raise for some text or other.
_NOT_A_LITERAL = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_BEFORE_A_VALUE = ",:=/("  # a quotation mark elsewhere, as in "it's", is a letter like any other


class NameOptions(NamedTuple):
    """A name and what is given with it; str() writes it so that parse() reads it back.

    Attributes:
        name: The name.
        arguments: The values without a name, in order.
        options: {option: value}.
    """

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        options = [f"{option}={_written(value)}" for option, value in self.options.items()]
        if self.arguments or any(isinstance(value, (list, dict)) for value in self.options.values()):
            return f"{self.name}({', '.join([*map(_written, self.arguments), *options])})"
        return f"{self.name}:{','.join(options)}" if options else self.name


def parse(
    text: str,
    where: str,
    known: Collection[str] | None = None,
    *,
    form: str | Mapping[str, str] = "",
    arguments: bool = False,
) -> NameOptions:
    """Reads a name with its options.

    Args:
        text: The text, in any form of the grammar.
        where: The field that it stands in, for errors: "averaging".
        known: The names that there are; None: any.
        form: How the text is written, for errors: one form for all names, or {name: form}; default: NAME:OPTION=VALUE.
        arguments: Whether values without a name are allowed.

    Raises:
        UserError: The name is unknown, an option is given twice, or the text does not follow the grammar.
    """
    name, mark, rest = _head(text)
    if mark == "(":
        call = _call(text)
        name = name if call is None else call.name
    else:
        call = None
    if known is not None and name not in known:
        raise unknown(where, name, known)
    form = form if isinstance(form, str) else form.get(name, "")
    form = form or f"{name if name.isidentifier() else 'NAME'}:OPTION=VALUE"

    def refused(reason: str = "") -> UserError:
        return UserError(f"{where} is {shown(text)!r}{reason and ': '}{reason}; write {form}")

    if mark == "(" and call is None:
        raise refused()
    parts = call or NameOptions(name, *_listed(rest, refused))
    if parts.arguments and not arguments:
        raise refused()
    return parts


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that are outside parentheses and quotation marks, without spaces around them.

    Args:
        text: The text; each of its quoted texts begins a value.
        separator: One character.
    """
    parts, start, position, depth, before = list[str](), 0, 0, 0, ","
    while position < len(text):
        character = text[position]
        opens = character in "'\"" and (before in _BEFORE_A_VALUE or (depth and before in "[{"))
        quoted = _QUOTED.match(text, position) if opens else None
        if quoted is None:
            depth = max(depth + (character == "(") - (character == ")"), 0)
            if character == separator and not depth:
                parts.append(text[start:position].strip())
                start = position + 1
        position = quoted.end() if quoted else position + 1
        before = before if character.isspace() else character
    return [*parts, text[start:].strip()]


def value(text: str) -> Any:
    """A value as it is written in a configuration: a number, a literal, true, false, none; else the text itself.

    Args:
        text: Such as "1e-5", "inf", "true", "'a text'", "(1, 2)", "pfeiffer".
    """
    text = text.strip()
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        literal = ast.literal_eval(_tree(text))
        return literal if _plain(literal) else text
    except _NOT_A_LITERAL:
        pass
    try:
        return float(text)  # inf, nan, 007
    except ValueError:
        return text


def is_option(text: str) -> bool:
    """Whether a text is OPTION=VALUE, which goes with the name before it in a list: "a:b=1,c=2,d" are a:b=1,c=2 and d."""
    option, equals, _ = text.partition("=")
    return bool(equals) and option.strip().isidentifier()


def number(parsed: Any) -> float:
    """A value as a float; NaN where it is not a number."""
    return float(parsed) if isinstance(parsed, (int, float)) and not isinstance(parsed, bool) else math.nan


def _head(text: str) -> tuple[str, str, str]:
    """The name, the character that ends it (":", "(" or none), and what follows."""
    places = [place for place in (text.find(":"), text.find("(")) if place >= 0]
    end = min(places, default=len(text))
    return text[:end].strip(), text[end : end + 1], text[end + 1 :]


def _listed(rest: str, refused: Callable[[str], UserError]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and options of what stands after NAME and a colon."""
    items = [item for item in split(rest, ",") if item]
    if not items:
        return (), {}
    if not any(len(split(item, "=")) > 1 for item in items):
        arguments = split(rest, ":")
        if not all(arguments):
            raise refused("a value is empty")
        return tuple(value(argument) for argument in arguments), {}
    options: dict[str, Any] = {}
    for item in items:
        option, _, written = item.partition("=")
        option = option.strip()
        if not is_option(item) or not written.strip():
            raise refused(f"{shown(item)!r} is not OPTION=VALUE")
        if option in options:
            raise refused(f"{option} is given twice")
        options[option] = value(written)
    return (), options


def _call(text: str) -> NameOptions | None:
    """NAME(VALUE, ..., OPTION=VALUE); None where the text is something else."""
    try:
        call = _tree(text).body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return None
        arguments = tuple(ast.literal_eval(argument) for argument in call.args)
        options = {option.arg: ast.literal_eval(option.value) for option in call.keywords if option.arg is not None}
    except _NOT_A_LITERAL:
        return None
    if len(options) < len(call.keywords) or not _plain([*arguments, *options.values()]):
        return None
    return NameOptions(call.func.id, arguments, options)


def _tree(text: str) -> ast.Expression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd texts, such as "1if"; they are refused
        return ast.parse(text.strip(), mode="eval")


def _plain(literal: Any) -> bool:
    """Whether a literal is of numbers that float holds, texts, true, false, none, and tuples, lists and dicts of them."""
    if isinstance(literal, (tuple, list)):
        return all(map(_plain, literal))
    if isinstance(literal, dict):
        return all(_plain(key) and _plain(entry) for key, entry in literal.items())
    if isinstance(literal, int):
        return literal.bit_length() < 1024
    return literal is None or isinstance(literal, (float, str))


def _written(parsed: Any) -> str:
    """A value as value() and a call read it; NaN, which a call has not, is written for value() only."""
    if isinstance(parsed, float) and math.isinf(parsed):
        return "1e999" if parsed > 0 else "-1e999"
    if isinstance(parsed, tuple):
        return f"({', '.join(map(_written, parsed))}{',' * (len(parsed) == 1)})"
    if isinstance(parsed, list):
        return f"[{', '.join(map(_written, parsed))}]"
    if isinstance(parsed, dict):
        return f"{{{', '.join(f'{_written(key)}: {_written(entry)}' for key, entry in parsed.items())}}}"
    return repr(parsed)
