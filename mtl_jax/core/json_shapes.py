"""Shapes of parsed JSON: what a file that mtl_jax wrote must look like before anything is taken out of it.

A shape is a function from a value to what is wrong with it: "" where nothing is, else "tasks.topic.metric is null, not a text".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax.core.files import INFINITIES

Shape = Callable[[Any], str]


def anything(value: Any) -> str:
    """No demand."""
    return ""


def text(value: Any) -> str:
    """A string."""
    return "" if isinstance(value, str) else _is(value, "a text")


def whole(value: Any) -> str:
    """A whole number."""
    return "" if isinstance(value, int) and not isinstance(value, bool) else _is(value, "a whole number")


def number(value: Any) -> str:
    """A number; one that is not finite as files.to_json() writes it."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if value is None or is_number or value in list(INFINITIES) else _is(value, "a number")


def list_of(each: Shape) -> Shape:
    """A list, all of one shape."""

    def check(value: Any) -> str:
        if not isinstance(value, list):
            return _is(value, "a list")
        return next((_within(str(place), problem) for place, one in enumerate(value) if (problem := each(one))), "")

    return check


def mapping(each: Shape, *, none: bool = False) -> Shape:
    """An object, all of whose values are of one shape.

    Args:
        each: The shape.
        none: Whether null may stand in its place.
    """

    def check(value: Any) -> str:
        if value is None and none:
            return ""
        if not isinstance(value, dict):
            return _is(value, "an object")
        return next((_within(name, problem) for name, one in value.items() if (problem := each(one))), "")

    return check


def object_of(needed: Mapping[str, Shape], **may: Shape) -> Shape:
    """An object with some fields; what others it has is not looked at.

    Args:
        needed: {field that must be there: its shape}.
        may: Fields that may be there.
    """

    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return _is(value, "an object")
        for name, shape in {**needed, **may}.items():
            if name not in value:
                if name in needed:
                    return f"{name} is missing"
            elif problem := shape(value[name]):
                return _within(name, problem)
        return ""

    return check


def _is(value: Any, wanted: str) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return f" is {kinds.get(type(value), 'a number')}, not {wanted}"


def _within(name: str, problem: str) -> str:
    """A problem of a part as one of the whole."""
    name = name if len(name) <= 60 else f"{name[:60]}..."
    return f"{name}{problem}" if problem.startswith(" ") else f"{name}.{problem}"
