"""Weighting rules and combinators by name: RULES, COMBINATORS, make() and combine(), register() for those of a script."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.parts import Registry
from mtl_jax.weighting import (
    balance,
    combinators,
    coordinates,
    double_sampling,
    geometry,
    gram_rules,
    loss_rules,
    preferences,
    static,
    target_rules,
)
from mtl_jax.weighting.base import Rule, asks_for_signals, example_signals

OWN_RULES: dict[str, Callable[..., Rule]] = {
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
    # from the losses and a preference
    "cosmos": preferences.cosmos,
    "pbi": preferences.pbi,
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
    "imtl": geometry.imtl,
    "aligned": geometry.aligned,
    "upgrad": gram_rules.upgrad,
    "dualproj": gram_rules.dualproj,
    "config": geometry.config,
    "moco": balance.moco,
    "sdmgrad": double_sampling.sdmgrad,
    "krum": geometry.krum,
    # from two independent halves of a batch
    "modo": double_sampling.modo,
    # knows its target
    "gcs": target_rules.gcs,
    "pcd": target_rules.pcd,
    "auto_lambda": target_rules.auto_lambda,
    # from every coordinate of the task gradients
    "excess_risk": coordinates.excess_risk,
    "graddrop": coordinates.graddrop,
    "trimmed_mean": coordinates.trimmed_mean,
}

# Those with weighs_heads=False, whose names say so already.
PLAIN_HEADS = frozenset(
    {
        "gradnorm",
        "db_mtl",
        "mgda",
        "pcgrad",
        "gradvac",
        "cagrad",
        "imtl_g",
        "aligned",
        "upgrad",
        "dualproj",
        "config",
        "moco",
        "sdmgrad",
        "krum",
        "modo",
        "gcs",
        "pcd",
        "graddrop",
        "trimmed_mean",
    }
)

OWN_COMBINATORS: dict[str, Callable[..., Rule]] = {
    "normalized": combinators.normalized,
    "every": combinators.every,
    "subset": combinators.subset,
    "clipped": combinators.clipped,
    "ema": combinators.ema,
}

RULES = Registry("weighting rule", OWN_RULES)
COMBINATORS = Registry("combinator", OWN_COMBINATORS)
# @register("mine") above a function that makes a Rule: --weighting mine, its arguments are --weighting-options.
register = RULES.register
# @register_combinator("mine") above a function from a Rule and options to a Rule: --combinators mine:option=1.
register_combinator = COMBINATORS.register


def make(name: str, **options: Any) -> Rule:
    """A rule by name: make("cagrad", c=0.5) is cagrad(c=0.5).

    Raises:
        UserError: The name or an option is unknown (the message lists the known ones), or an option's value is refused.
    """
    if "@" in name:
        raise UserError(f"weighting {name} is a Rule that a script made itself: run that script")
    rule = _call(f"weighting {name!r}", RULES.find(name, "weighting"), (), options)
    return rule if rule.name == name else asks_for_signals(rule._replace(name=name))


def required_options(name: str) -> list[str]:
    """The options of a rule that have no default, such as the target of a rule that knows it."""
    parameters = inspect.signature(RULES[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]


def takes_weights(name: str) -> bool:
    """Whether a rule has the option `weights`, a number for each task: Experiment.weights."""
    return name in RULES and "weights" in inspect.signature(RULES[name]).parameters


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
    rule = maker(*inner, **options)
    if not isinstance(rule, Rule):
        raise UserError(f"{name} returned a {type(rule).__name__}; its function must return a weighting.Rule")
    return rule


def name_of(rule: str | Rule, tasks: Sequence[str]) -> str:
    """A rule's name in files and tables; that of a Rule that a script made has a digest of its program.

    The digest changes with every constant of the rule, also of its transform, so that a resumed run notices another rule. Only
    a transform that needs the trunk's own tree, such as a leaf by its name, is not in it.

    Args:
        rule: Experiment.weighting.
        tasks: The names of the run's tasks.
    """
    return rule if isinstance(rule, str) else _name_of_program(rule, tuple(sorted(tasks)))


@functools.cache  # tracing takes a while, and an ablation asks once for each run
def _name_of_program(rule: Rule, names: tuple[str, ...]) -> str:
    one = jax.ShapeDtypeStruct((), jnp.float32)
    compares = rule.needs_gram or rule.needs_cross or rule.held_out
    gram = jax.ShapeDtypeStruct((len(names), len(names)), jnp.float32) if compares else None
    losses = dict.fromkeys(names, one)

    def program(losses: Any, gram: Any, counts: Any) -> Any:
        signals = example_signals(rule, losses, gram)._replace(counts=counts)
        return rule.update(rule.init(names), signals)

    digest = hashlib.sha256(_traced(program, losses, gram, losses))
    for more in _beside_update(rule, names, losses):
        digest.update(more)
    return f"{rule.name or rule.update.__qualname__.partition('.')[0]}@{digest.hexdigest()[:12]}"


def _beside_update(rule: Rule, names: tuple[str, ...], losses: Any) -> list[bytes]:
    """What decides the gradient besides a rule's update, if the rule has such; else nothing, so that older names stay."""
    parts: list[bytes] = []
    if rule.weighs_heads == (rule.name in PLAIN_HEADS):
        parts.append(f"weighs_heads {rule.weighs_heads}".encode())
    if rule.held_out is not None:
        parts.append(repr(tuple(rule.held_out)).encode())
    if rule.head_weights is not None:
        of_heads = rule.head_weights
        parts.append(_traced(lambda: of_heads(rule.init(names))))
    if rule.transform is not None:
        transform = rule.transform
        rows = {leaf: jax.ShapeDtypeStruct((len(names), *shape), jnp.float32) for leaf, shape in _ROWS.items()}

        def change(rows: Any, losses: Any, counts: Any) -> Any:
            signals = example_signals(rule, losses)._replace(gram=None, transformed=None, counts=counts)
            start = transform.init(rows)
            changed, state = transform.update(start, signals._replace(rule_key=jax.random.key(1)), rows)
            return changed, start, state, () if transform.tells is None else transform.tells(state, rows)

        try:
            parts.append(_traced(change, rows, losses, losses))
        except (LookupError, AttributeError, TypeError, ValueError):
            parts.append(b"transform")
    return parts


_ROWS = {"kernel": (3, 2), "bias": (2,)}  # the shapes of a task gradient by which a transform's program is traced


def _traced(function: Callable[..., Any], *arguments: Any) -> bytes:
    """The program of a function, with its constants."""
    traced = jax.make_jaxpr(function)(*arguments)
    constants = b"".join(np.asarray(constant).tobytes() for constant in traced.consts)
    text = re.sub(r" at 0x[0-9a-f]+", "", str(traced.jaxpr))  # addresses of functions
    return text.encode() + constants
