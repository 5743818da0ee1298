"""Mixtures: how often each source is seen, by functions from the sizes of the sources to a number for each.

A mixture is text, "NAME" or "NAME:option=number,option=number", and NAME is a function in MIXTURES:
    uniform            equal shares
    proportional       shares by size, in tokens of training data
    temperature:t=T    shares by size^(1/T); T = 1 is proportional, a large T nearly uniform
    capped:cap=C       shares by min(size, C)
    fixed              shares by given numbers
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from mtl_jax.core import name_options
from mtl_jax.core.configuration import Limits
from mtl_jax.core.errors import UserError, listed, nearest, unknown
from mtl_jax.core.parts import Registry, origin_of
from mtl_jax.data.formats.python_rows import failure

ABOVE_0 = Limits(0, math.inf, above=True, below=True)
NEITHER = ("sizes", "shares")  # parameters of a mixture that are not options


def uniform(sizes: Mapping[str, float]) -> dict[str, float]:
    """Equal shares."""
    return dict.fromkeys(sizes, 1.0)


def proportional(sizes: Mapping[str, float]) -> dict[str, float]:
    """Shares by size."""
    return {source: float(size) for source, size in sizes.items()}


def temperature(sizes: Mapping[str, float], t: Annotated[float, ABOVE_0]) -> dict[str, float]:
    """Shares by size^(1/t): https://arxiv.org/abs/1907.05019, section 4."""
    # Sizes are divided by the largest, so that the power stays finite for a small t.
    largest = max(max(sizes.values()), 1)
    return {source: (size / largest) ** (1 / t) for source, size in sizes.items()}


def capped(sizes: Mapping[str, float], cap: Annotated[float, ABOVE_0]) -> dict[str, float]:
    """Shares by min(size, cap), "examples-proportional mixing": https://arxiv.org/abs/1910.10683, section 3.5.2."""
    return {source: min(float(size), cap) for source, size in sizes.items()}


def fixed(sizes: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """The numbers of the field shares, which need not sum to 1."""
    missing = [source for source in sizes if source not in shares]
    if missing:
        raise UserError(f"batch.shares lacks {listed(missing)}; give every source a number")
    for source, number in shares.items():
        if source not in sizes:
            raise unknown("source in batch.shares:", source, sizes)
        if not 0 <= number < math.inf:
            raise UserError(f"batch.shares: {source} is {number}; a share must be a finite number, not negative")
    if not any(shares.values()):
        raise UserError("batch.shares are all 0; at least one source must be seen")
    return {source: float(shares[source]) for source in sizes}


MIXTURES: Registry[Callable[..., Any]] = Registry(
    "mixture",
    {"uniform": uniform, "proportional": proportional, "temperature": temperature, "capped": capped, "fixed": fixed},
)


def register_mixture(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for a function that says how often each source is seen: --batch.mixture NAME:option=number then uses it.

    The function takes {source: tokens of training data}, and returns {source: number}: finite, not negative, in any unit. Its
    other parameters are the options of the mixture, all of them numbers; a limit of an option is declared as
    Annotated[float, Limits]. If it has a parameter called `shares`, it gets the field batch.shares, or that of the phase.

    Examples:
        >>> import math
        >>> import mtl_jax
        >>> @mtl_jax.data.register_mixture("logarithmic")
        ... def logarithmic(sizes, offset=0.0):
        ...     return {source: math.log(offset + size) for source, size in sizes.items()}
        >>> mtl_jax.Batching(mixture="logarithmic:offset=10").mixture
        'logarithmic:offset=10'

    Args:
        name: The mixture's name: letters, digits and "_".

    Raises:
        UserError: The name is taken.
    """
    return MIXTURES.register(name)


def parse(mixture: str, field: str = "batch.mixture") -> tuple[str, dict[str, float]]:
    """A mixture's name and the values of its options.

    Raises:
        UserError: The name or an option is unknown, or an option is missing or refused; the message names the field.
    """
    forms = {name: ":".join(filter(None, (name, ",".join(f"{o}=NUMBER" for o in _options(name))))) for name in MIXTURES}
    name, arguments, given = name_options.parse(mixture, field, MIXTURES, form=forms, arguments=True)
    options = _options(name)
    if not options and (arguments or given):
        raise UserError(f"{field} is {mixture!r}; {name} has no option")
    values = {option: name_options.number(value) for option, value in given.items()}
    wrong = next((option for option in given if option not in options), "")
    near = nearest(wrong, options) if wrong else ""
    missing = [option for option, limits in options.items() if limits.needed and option not in given]
    if arguments or wrong or missing or any(math.isnan(number) for number in values.values()):
        hint = f"; it has no option {wrong!r}" + (f" (did you mean {near!r}?)" if near else "") if wrong else ""
        raise UserError(f"{field} is {mixture!r}{hint}; write {forms[name]}")
    for option, number in values.items():
        limits = options[option].limits
        if limits is not None and not limits.allow(number):
            raise UserError(f"{field} is {mixture!r}; {option} must be {'a number above 0' if limits == ABOVE_0 else limits}")
    return name, values


def takes_shares(name: str) -> bool:
    """Whether a mixture uses the field shares, as fixed does."""
    return "shares" in _parameters(name)


def check(mixture: str, mixture_end: str, given: Mapping[str, float], at: str = "batch") -> None:
    """Checks a run's mixtures before its sources are known.

    Raises:
        UserError: A mixture or its shares are wrong; names the field.
    """
    names = [parse(mixture, f"{at}.mixture")[0]] + ([parse(mixture_end, f"{at}.mixture_end")[0]] if mixture_end else [])
    taking = [name for name in names if takes_shares(name)]
    if taking and not given:
        raise UserError(f"{at}.shares is empty, but the mixture is {taking[0]}: give every source a number")
    if not taking and given:
        known = listed(name for name in MIXTURES if takes_shares(name))
        raise UserError(f"{at}.shares is for the mixture {known}, but {at}.mixture is {mixture!r}")


def shares(
    mixture: str, sizes: Mapping[str, float], given: Mapping[str, float] | None = None, field: str = "batch.mixture"
) -> dict[str, float]:
    """{source: share of the rows}; the shares sum to 1.

    Args:
        mixture: The mixture's text.
        sizes: {source: tokens of training data}.
        given: {source: number} for the mixture fixed, which need not sum to 1.
        field: The field with the text, for errors.

    Raises:
        UserError: The text is not a mixture, its function fails, or its numbers cannot be shares.
    """
    name, options = parse(mixture, field)
    values = _call(name, field, sizes, {**options, **({"shares": dict(given or {})} if takes_shares(name) else {})})
    total = math.fsum(values.values())
    if not total > 0:
        raise UserError(f"{field} is {mixture!r}, but no source has any training data")
    return {source: number / total for source, number in values.items()}


class _Option(typing.NamedTuple):
    """A parameter of a mixture that is an option: its limits, if any are declared, and whether it has no default."""

    limits: Limits | None
    needed: bool


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(MIXTURES[name]).parameters)


def _options(name: str) -> dict[str, _Option]:
    parameters = list(_parameters(name).values())[1:]  # the first has the sizes, whatever it is called
    limits = _limits(MIXTURES[name])
    return {
        parameter.name: _Option(limits.get(parameter.name), parameter.default is inspect.Parameter.empty)
        for parameter in parameters
        if parameter.name not in NEITHER
    }


@functools.cache
def _limits(function: Callable[..., Any]) -> dict[str, Limits]:
    """{parameter: its Limits}, of those that are annotated with one."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations of a script that mean nothing
        return {}
    pairs = ((name, value) for name, hint in hints.items() for value in getattr(hint, "__metadata__", ()))
    return {name: value for name, value in pairs if isinstance(value, Limits)}


def _call(name: str, field: str, sizes: Mapping[str, float], options: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a mixture returns, in the order of the sources."""
    function = MIXTURES[name]
    origin = origin_of(function)
    if origin is None:
        values: dict[str, float] = function(sizes, **options)
        return values
    prefix = f"{field}: the mixture {name} of {origin.file}"
    try:
        returned = function(dict(sizes), **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{prefix} failed: {failure(error)}") from error
    if not isinstance(returned, Mapping):
        raise UserError(f"{prefix} returned a {type(returned).__name__}; it must return {{source: number}}")
    lacking = [source for source in sizes if source not in returned]
    if lacking:
        raise UserError(f"{prefix} returned no number for {listed(lacking)}; give every source one, 0 for never")
    for source, number in returned.items():
        if source not in sizes:
            raise unknown(f"source in what {prefix} returned:", source, sizes)
        if not isinstance(number, numbers.Real) or not 0 <= float(number) < math.inf:
            raise UserError(f"{prefix} returned {number!r} for {source}; it must be a finite number, not negative")
    if not any(returned.values()):
        raise UserError(f"{prefix} returned 0 for every source; at least one must be seen")
    return {source: float(returned[source]) for source in sizes}
