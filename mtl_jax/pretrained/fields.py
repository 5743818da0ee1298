"""Fields of a config.json, checked one by one: of the right type, within bounds, and shown short where they are not."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mtl_jax.errors import UserError, unknown

REQUIRED: Any = object()
LARGEST = 2**31 - 1  # what an index of a program can be
MOST_LAYERS = 1000
MOST_LABELS = 1_000_000
MOST_NUMBER = 1e12  # its square is still a float32
MOST_COMPUTED = 2**16  # positions or distances of a table that is computed: no file vouches for its size

_BRIEF = reprlib.Repr()
_BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 100, 100, 40


def brief(value: Any) -> str:
    """A value that a file holds, as error lines print it: on one line, and cut where it is long."""
    return _BRIEF.repr(value)


def finite(value: Any) -> bool:
    """Whether it is a number that a float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) < 3.4e38 if isinstance(value, float) else abs(value) < 10**38


class Fields(NamedTuple):
    """A parsed config.json. Every method takes the field's name and a default, and raises UserError naming the field.

    null counts as absent, as transformers writes it for what is not set.

    Attributes:
        raw: The parsed file.
        where: Its name, for errors.
    """

    raw: Mapping[str, Any]
    where: str

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise UserError(f"{self.where}: the field {name!r} is missing")
        return default

    def integer(self, name: str, default: Any = REQUIRED, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be a whole number of at least {minimum}")
        if value > maximum:
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be at most {maximum}")
        return value

    def layers(self, name: str, default: Any = REQUIRED) -> int:
        return self.integer(name, default, maximum=MOST_LAYERS)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        value = self.get(name, default)
        if not finite(value) or value < 0:
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be a number of at least 0")
        if value > MOST_NUMBER:
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be at most {MOST_NUMBER:g}")
        return float(value)

    def rate(self, name: str, default: Any = REQUIRED) -> float:
        value = self.number(name, default)
        if value >= 1:
            raise UserError(f"{self.where}: {name} is {value!r}; a dropout rate is below 1")
        return value

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} is {brief(value)}; it must be true or false")
        return value

    def choice(self, name: str, choices: Any, default: Any = REQUIRED) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise unknown(f"{name} in {self.where}:", value if isinstance(value, str) else brief(value), choices)
        return value

    def num_labels(self, default: int = 2) -> int:
        """transformers writes id2label, or num_labels, or neither for the family's default."""
        labels, number = self.get("id2label", None), self.integer("num_labels", default, maximum=MOST_LABELS)
        if labels is None:
            return number
        if not isinstance(labels, Mapping) or not 0 < len(labels) <= MOST_LABELS:
            raise UserError(f"{self.where}: id2label is {brief(labels)}; it must be an object of numbers and names")
        return len(labels)

    def heads_divide(self, hidden: int, heads: int) -> None:
        if hidden % heads:
            raise UserError(f"{self.where}: the hidden size {hidden} is not a multiple of the {heads} attention heads")
