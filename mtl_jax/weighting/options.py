"""What a rule's number may be."""

from __future__ import annotations

import math

import jax

from mtl_jax.errors import UserError


def number(
    where: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    infinite: bool = False,
    whole: bool = False,
) -> float:
    """The value, if it is a number within its bounds. A traced value passes: inside a program nothing can be refused.

    Args:
        where: Rule and option, for the error: "weighting cagrad: c".
        value: The option.
        above: It must be larger than this.
        least: It must not be smaller.
        below: It must be smaller.
        most: It must not be larger.
        infinite: Whether it may be inf.
        whole: Whether it must be a whole number.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where} is {value!r}; it must be a number")
    sound = not math.isnan(value) and (infinite or math.isfinite(value)) and (not whole or int(value) == value)
    sound = sound and (above is None or value > above) and (least is None or value >= least)
    sound = sound and (below is None or value < below) and (most is None or value <= most)
    if not sound:
        kind = "a whole number" if whole else "a number" if infinite else "a finite number"
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("above", above), ("of at least", least), ("below", below), ("of at most", most))
            if bound is not None
        ]
        raise UserError(f"{where} is {value}; it must be {' '.join([kind, ' and '.join(bounds)]).strip()}")
    return int(value) if whole else value


def choice(where: str, value: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices.

    Raises:
        UserError: It is not.
    """
    if value not in choices:
        raise UserError(f"{where} is {value!r}; it must be {' or '.join(choices)}")
    return value
