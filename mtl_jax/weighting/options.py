"""Checks of the options of rules and combinators: each is one line that names the rule and the option.

A traced value, as in an ablation whose runs differ in the option, cannot be checked and passes.
"""

from __future__ import annotations

import math

import jax

from mtl_jax.core.errors import UserError


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
    """The value of an option, after a check that it is a number within bounds. Traced values cannot be checked and pass.

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
        UserError: The value is not such a number.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where} is {value!r}; it must be a number")
    valid = not math.isnan(value) and (infinite or math.isfinite(value)) and (not whole or int(value) == value)
    valid = valid and (above is None or value > above) and (least is None or value >= least)
    valid = valid and (below is None or value < below) and (most is None or value <= most)
    if not valid:
        kind = "a whole number" if whole else "a number" if infinite else "a finite number"
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("above", above), ("of at least", least), ("below", below), ("of at most", most))
            if bound is not None
        ]
        raise UserError(f"{where} is {value}; it must be {' '.join([kind, ' and '.join(bounds)]).strip()}")
    return int(value) if whole else value


def choice(where: str, value: str, choices: tuple[str, ...]) -> str:
    """The value of an option, after a check that it is one of the choices.

    Raises:
        UserError: The value is not one of them.
    """
    if value not in choices:
        raise UserError(f"{where} is {value!r}; it must be {' or '.join(choices)}")
    return value
