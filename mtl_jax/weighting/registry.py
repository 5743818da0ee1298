"""Rules by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mtl_jax.errors import UserError, unknown
from mtl_jax.weighting import gram_rules, rules
from mtl_jax.weighting.base import Rule

RULES: dict[str, Callable[..., Rule]] = {
    "equal": rules.equal,
    "fixed": rules.fixed,
    "dwa": rules.dwa,
    "mgda": gram_rules.mgda,
    "pcgrad": gram_rules.pcgrad,
    "cagrad": gram_rules.cagrad,
    "fairgrad": gram_rules.fairgrad,
    "imtl_g": gram_rules.imtl_g,
    "aligned": gram_rules.aligned,
    "upgrad": gram_rules.upgrad,
    "dualproj": gram_rules.dualproj,
    "config": gram_rules.config,
}


def make(name: str, **options: Any) -> Rule:
    """A rule by name: make("cagrad", c=0.5) is cagrad(c=0.5).

    Raises:
        UserError: The name or an option is unknown (lists what there is), or an option's value is refused.
    """
    if name not in RULES:
        raise unknown("weighting", name, RULES)
    parameters = inspect.signature(RULES[name]).parameters
    for option, value in options.items():
        if option not in parameters:
            raise unknown(f"option of weighting {name!r}:", option, parameters)
        default = parameters[option].default
        if isinstance(default, float) and not isinstance(value, (int, float)):
            raise UserError(f"weighting {name!r}: {option} is {value!r}; it must be a number")
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise UserError(f"weighting {name!r} needs {option}")
    return RULES[name](**options)
