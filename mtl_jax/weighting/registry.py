"""Weighting rules and combinators by name: RULES, COMBINATORS, make() and combine()."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax.core import name_options
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
        UserError: The name or an option is unknown (the message lists the known ones), or an option's value is refused.
    """
    if name not in RULES:
        raise unknown("weighting", name, RULES)
    return _call(f"weighting {name!r}", RULES[name], (), options)


def combine(rule: Rule, text: str) -> Rule:
    """A rule inside a combinator that is given as text: "normalized", "every:k=10", "subset:s=3,temperature=2".

    Raises:
        UserError: The combinator is unknown, or an option is unknown or refused.
    """
    name, _, options = name_options.parse(text, "combinator", COMBINATORS)
    return _call(f"combinator {name!r}", COMBINATORS[name], (rule,), options)


def _call(name: str, maker: Callable[..., Rule], inner: tuple[Rule, ...], options: Mapping[str, Any]) -> Rule:
    """maker(*inner, **options), with the names of the options checked; the maker checks their values."""
    parameters = dict(list(inspect.signature(maker).parameters.items())[len(inner) :])
    for option in options:
        if option not in parameters:
            raise unknown(f"option of {name}:", option, parameters)
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise UserError(f"{name} needs {option}")
    return maker(*inner, **options)
