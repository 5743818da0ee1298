"""Fields of a config.json, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mtl_jax.errors import UserError, unknown

REQUIRED: Any = object()


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

    def integer(self, name: str, default: Any = REQUIRED, minimum: int = 1) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(f"{self.where}: {name} is {value!r}; it must be a whole number of at least {minimum}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise UserError(f"{self.where}: {name} is {value!r}; it must be a number of at least 0")
        return float(value)

    def rate(self, name: str, default: Any = REQUIRED) -> float:
        value = self.number(name, default)
        if value >= 1:
            raise UserError(f"{self.where}: {name} is {value!r}; a dropout rate is below 1")
        return value

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} is {value!r}; it must be true or false")
        return value

    def choice(self, name: str, choices: Any, default: Any = REQUIRED) -> str:
        value = self.get(name, default)
        if value not in choices:
            raise unknown(f"{name} in {self.where}:", str(value), choices)
        return value

    def num_labels(self, default: int = 2) -> int:
        """transformers writes id2label, or num_labels, or neither for the family's default."""
        labels = self.get("id2label", None)
        if labels is None:
            return self.integer("num_labels", default)
        if not isinstance(labels, Mapping) or not labels:
            raise UserError(f"{self.where}: id2label is {labels!r}; it must be an object of numbers and names")
        return len(labels)

    def heads_divide(self, hidden: int, heads: int) -> None:
        if hidden % heads:
            raise UserError(f"{self.where}: the hidden size {hidden} is not a multiple of the {heads} attention heads")
