"""Rules and combinators by name."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.weighting import balance, combinators, geometry, gram_rules, loss_rules, static
from mtl_jax.weighting.base import Rule

RULES: dict[str, Callable[..., Rule]] = {
    # static
    "equal": static.equal,
    "fixed": static.fixed,
    "scheduled": static.scheduled,
    # from the losses
    "uncertainty": loss_rules.uncertainty,
    "dwa": loss_rules.dwa,
    "rlw": loss_rules.rlw,
    "gls": loss_rules.gls,
    "imtl_l": loss_rules.imtl_l,
    "stch": loss_rules.stch,
    "famo": loss_rules.famo,
    "excess": loss_rules.excess,
    # from the Gram matrix of the task gradients
    "gradnorm": balance.gradnorm,
    "db_mtl": balance.db_mtl,
    "mgda": gram_rules.mgda,
    "pcgrad": geometry.pcgrad,
    "gradvac": geometry.gradvac,
    "cagrad": gram_rules.cagrad,
    "nash": gram_rules.nash,
    "fairgrad": gram_rules.fairgrad,
    "imtl_g": geometry.imtl_g,
    "aligned": geometry.aligned,
    "upgrad": gram_rules.upgrad,
    "dualproj": gram_rules.dualproj,
    "config": geometry.config,
    "moco": balance.moco,
    "sdmgrad": gram_rules.sdmgrad,
    "krum": geometry.krum,
    # changes the task gradients themselves
    "graddrop": balance.graddrop,
}

COMBINATORS: dict[str, Callable[..., Rule]] = {
    "normalized": combinators.normalized,
    "every": combinators.every,
    "subset": combinators.subset,
    "clipped": combinators.clipped,
    "ema": combinators.ema,
}


def make(name: str, **options: Any) -> Rule:
    """A rule by name: make("cagrad", c=0.5) is cagrad(c=0.5).

    Raises:
        UserError: The name or an option is unknown (lists what there is), or an option's value is refused.
    """
    if name not in RULES:
        raise unknown("weighting", name, RULES)
    return _call(f"weighting {name!r}", RULES[name], (), options)


def combine(rule: Rule, text: str) -> Rule:
    """A rule inside a combinator that is given as text: "normalized", "every:k=10", "subset:s=3,temperature=2".

    Raises:
        UserError: The text is none of these, or an option is unknown or refused.
    """
    name, options = read(text, "combinator", COMBINATORS)
    return _call(f"combinator {name!r}", COMBINATORS[name], (rule,), options)


def read(text: str, what: str, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A name and its options, given as text: "cagrad:c=0.4", "subset:s=3,temperature=2".

    Args:
        text: The text.
        what: What it names, for errors.
        known: The names that there are.

    Raises:
        UserError: The name is none of them, or what follows it are no options.
    """
    name, _, rest = text.partition(":")
    if name not in known:
        raise unknown(what, name, known)
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, _, value = part.partition("=")
        if option.strip() in options:
            raise UserError(f"{what} {text!r}: {option.strip()} stands there twice")
        try:
            options[option.strip()] = float(value) if value.strip() in ("inf", "-inf") else ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{what} {text!r}: {part!r} is no option; write {name}:name=number") from error
    return name, options


def _call(what: str, maker: Callable[..., Rule], given: tuple[Rule, ...], options: Mapping[str, Any]) -> Rule:
    """maker(*given, **options), its options checked by name; their values are the maker's to check."""
    parameters = dict(list(inspect.signature(maker).parameters.items())[len(given) :])
    for option in options:
        if option not in parameters:
            raise unknown(f"option of {what}:", option, parameters)
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise UserError(f"{what} needs {option}")
    return maker(*given, **options)
