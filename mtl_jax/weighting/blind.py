"""Rules without a view of the data: the weights of private training must not depend on the rows of a batch.

A weight that follows from the losses of a batch carries one row's influence past the clipping of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from mtl_jax.core.errors import UserError
from mtl_jax.weighting.base import Rule, Signals, Weights

HARMLESS = ("objective", "solve", "weighs_heads", "name")  # fields of a Rule that do not ask for anything


def blind(rule: Rule) -> Rule:
    """The rule as it acts on the step and the key alone: its losses are 0, and every task counts as present.

    Args:
        rule: A rule that does not compare task gradients.
    """

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        zeros = {name: jnp.zeros(()) for name in signals.losses}
        return rule.update(state, signals._replace(losses=zeros, gram=None, counts=None))

    return Rule(init=rule.init, update=update, weighs_heads=rule.weighs_heads, name=rule.name)


def reads_losses(rule: Rule, names: Sequence[str]) -> bool:
    """Whether a rule's weights, or its state, depend on losses or on task gradients, by the program of its update.

    It follows every operation from the losses on: a rule that multiplies a loss by 0 counts as one that reads it.

    Args:
        rule: The rule, its combinators included; one of ours, or the user's.
        names: The names of the tasks.

    Examples:
        >>> from mtl_jax.weighting import blind, dwa, equal
        >>> blind.reads_losses(equal(), ("a", "b")), blind.reads_losses(dwa(), ("a", "b"))
        (False, True)
    """
    # Whatever else a rule declares, such as needs_gram, is something that it reads.
    if any(getattr(rule, field) != default for field, default in Rule._field_defaults.items() if field not in HARMLESS):
        return True

    def program(losses: dict[str, jax.Array]) -> Any:
        signals = Signals(losses, None, jnp.zeros((), jnp.int32), jax.random.key(0))
        return rule.update(rule.init(names), signals)

    try:
        jaxpr = jax.make_jaxpr(program)({name: jax.ShapeDtypeStruct((), jnp.float32) for name in names}).jaxpr
    except UserError:  # it asks for a signal that is not there
        return True
    dependent = set(jaxpr.invars)

    def depends(variables: Sequence[Any]) -> bool:
        return any(variable in dependent for variable in variables if not isinstance(variable, Literal))

    for equation in jaxpr.eqns:
        if depends(equation.invars):
            dependent.update(equation.outvars)
    return depends(jaxpr.outvars)
