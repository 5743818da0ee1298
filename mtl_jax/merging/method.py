"""A merge method and its numbers, checked before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.transfer import merge_methods

# The options of each method.
OPTIONS: dict[str, tuple[str, ...]] = {
    "average": ("weights",),
    "soup": (),
    "greedy": (),
    "wise": ("alpha",),
    "arithmetic": ("scale",),
    "ties": ("keep", "scale"),
    "dare": ("drop", "scale", "seed"),
    "dare_ties": ("drop", "keep", "scale", "seed"),
}
WITHOUT_BASE = ("average", "soup", "greedy")
ONE_SOURCE = ("wise",)
ANY_NUMBER = ("arithmetic", "dare")  # of sources, and a scale for each
DEFAULTS: dict[str, Any] = {"alpha": 0.5, "scale": (1.0,), "keep": 0.2, "drop": 0.9, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Method(Configuration):
    """A merge method and its numbers; transfer.merge_methods documents each method.

    Attributes:
        name: A key of OPTIONS. average has weights, soup is the plain mean; dare ends in task arithmetic, dare_ties in TIES.
        weights: One weight for each source, for average.
        alpha: Position between the base (0) and the source (1), for wise.
        scale: Factor of the task vectors; for arithmetic and dare also one for each source.
        keep: Share of each task vector that is kept, for TIES.
        drop: Share of each task vector that is dropped, for DARE.
        seed: Seed of the drops, for DARE.
    """

    name: str
    weights: tuple[float, ...] | None = None
    alpha: float | None = None
    scale: tuple[float, ...] | None = None
    keep: float | None = None
    drop: float | None = None
    seed: int | None = None

    def describe(self) -> dict[str, Any]:
        """The name and the options of the method, as JSON values."""
        return {"name": self.name, **{option: getattr(self, option) for option in OPTIONS[self.name]}}


def checked(method: Method, sources: Sequence[str], base: str) -> Method:
    """The method with its defaults filled in, checked.

    Args:
        method: The requested method; options that are None get their defaults.
        sources: The models to merge.
        base: The model that they started from; "": not given.

    Raises:
        UserError: The method is unknown, does not have an option, a number is outside its bounds, or sources or base do not
            fit the method.
    """
    if method.name not in OPTIONS:
        raise unknown("method", method.name, OPTIONS)
    allowed = OPTIONS[method.name]
    for field in dataclasses.fields(method)[1:]:
        if getattr(method, field.name) is not None and field.name not in allowed:
            used = [name for name, options in OPTIONS.items() if field.name in options]
            raise UserError(f"method {method.name} has no {field.name}; that is for {', '.join(used)}")
    repeated = {source for source in sources if sources.count(source) > 1}
    if repeated:
        raise UserError(
            f"{min(repeated)} is given twice; each source counts once (to weigh them, use --method average --weights)"
        )
    _check_count(method.name, len(sources))
    if method.name in WITHOUT_BASE and base:
        raise UserError(f"method {method.name} has no base; leave --base out")
    if method.name not in WITHOUT_BASE and not base:
        raise UserError(
            f"method {method.name} needs --base: the run or checkpoint that the sources started from, such as the trunk.path "
            "of their experiment"
        )
    method = dataclasses.replace(
        method, **{name: DEFAULTS[name] for name in allowed if getattr(method, name) is None and name in DEFAULTS}
    )
    if method.name == "average" and not method.weights:
        raise UserError("method average needs --weights, one for each source; the method soup weighs them equally")
    if method.weights:
        merge_methods.check_weights(method.weights, len(sources))
    if method.alpha is not None:
        merge_methods.check_share("alpha", method.alpha)
    if method.keep is not None:
        merge_methods.check_keep(method.keep)
    if method.drop is not None:
        merge_methods.check_drop(method.drop)
    if method.seed is not None and method.seed < 0:
        raise UserError(f"seed is {method.seed}; it must not be negative")
    if method.scale is not None:
        several = method.name in ANY_NUMBER and len(method.scale) > 1
        merge_methods.check_scales(method.scale, len(sources) if several else 1)
    return method


def _check_count(name: str, count: int) -> None:
    if name in ONE_SOURCE and count != 1:
        raise UserError(f"method {name} is for the base and one source, not {count}; merge several first, by soup")
    if name not in (*ONE_SOURCE, *ANY_NUMBER) and count < 2:
        raise UserError(f"method {name} needs at least two sources, not {count}")
    if not count:
        raise UserError("no source given")
