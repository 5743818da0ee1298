"""Shapes of parsed JSON: the structure that a file of mtl_jax must have before its values are used.

A shape is a function from a value to its fault: "" where it fits, else for example "tasks.topic.metric is null, not a text".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax.core.files import INFINITIES

Shape = Callable[[Any], str]


def anything(value: Any) -> str:
    """Any value."""
    return ""


def text(value: Any) -> str:
    """A string."""
    return "" if isinstance(value, str) else _is(value, "a text")


def whole(value: Any) -> str:
    """A whole number."""
    return "" if isinstance(value, int) and not isinstance(value, bool) else _is(value, "a whole number")


def number(value: Any) -> str:
    """A number; null and texts stand for those that are not finite, as files.to_json() writes them."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if value is None or is_number or value in list(INFINITIES) else _is(value, "a number")


def list_of(element: Shape) -> Shape:
    """A list whose elements have one shape."""

    def check(value: Any) -> str:
        if not isinstance(value, list):
            return _is(value, "a list")
        return next((_within(str(i), problem) for i, item in enumerate(value) if (problem := element(item))), "")

    return check


def mapping(element: Shape, *, none: bool = False) -> Shape:
    """An object whose values have one shape.

    Args:
        element: The shape of the values.
        none: Whether null is allowed in place of the object.
    """

    def check(value: Any) -> str:
        if value is None and none:
            return ""
        if not isinstance(value, dict):
            return _is(value, "an object")
        return next((_within(name, problem) for name, item in value.items() if (problem := element(item))), "")

    return check


def object_of(required: Mapping[str, Shape], **optional: Shape) -> Shape:
    """An object with some fields; other fields are not checked.

    Args:
        required: Shapes of the fields that must be present, by name.
        optional: Shapes of the fields that may be absent, by name.
    """

    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return _is(value, "an object")
        for name, shape in {**required, **optional}.items():
            if name not in value:
                if name in required:
                    return f"{name} is missing"
            elif problem := shape(value[name]):
                return _within(name, problem)
        return ""

    return check


def _is(value: Any, wanted: str) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return f" is {kinds.get(type(value), 'a number')}, not {wanted}"


def _within(name: str, problem: str) -> str:
    """The fault of a part, with the path of the part in the whole."""
    name = name if len(name) <= 60 else f"{name[:60]}..."
    return f"{name}{problem}" if problem.startswith(" ") else f"{name}.{problem}"
