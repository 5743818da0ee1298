"""Parameters that checkpoints leave out: they never train, and are where the trunk was loaded from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat, nested, sha256
from mtl_jax.transfer.adapters import ADAPTERS


class Base(NamedTuple):
    """Where left out parameters are.

    Attributes:
        load: Gives {"trunk": ...} as it was before training.
        path: The experiment's trunk.path.
    """

    load: Callable[[], Any]
    path: str


def to_leave_out(masks: Iterable[Any], params: Any, loaded: Any) -> dict[str, str]:
    """Of the trunk's parameters those that train in no phase and are still as they were loaded: {path: SHA-256}.

    Args:
        masks: For each phase, which parameters train.
        params: The parameters.
        loaded: The same before training, on the host.
    """
    trained: set[str] = set()
    for mask in masks:
        trained |= {path for path, trains in flat(mask).items() if trains}
    now, found = flat(params), {}
    for path, leaf in flat(loaded).items():
        if path in trained or not path.startswith("trunk/") or path.startswith(f"trunk/{ADAPTERS}/"):
            continue
        digest = sha256(leaf)
        if sha256(now[path]) == digest:  # else it was trained by an earlier configuration
            found[path] = digest
    return found


def without(params: Any, paths: Iterable[str]) -> Any:
    """The parameters except those."""
    gone = set(paths)
    return nested({path: leaf for path, leaf in flat(params).items() if path not in gone}) if gone else params


def put_back(params: Any, hashes: Mapping[str, str], base: Base | None, place: Callable[[str, np.ndarray], Any]) -> Any:
    """The parameters with those that were left out.

    Args:
        params: The others.
        hashes: {path: SHA-256} of those.
        base: Where they are.
        place: (path, host array) -> the leaf.

    Raises:
        UserError: They are not there, or not what they were.
    """
    if not hashes:
        return params
    if base is None:
        raise UserError("the checkpoint leaves out parameters of its trunk, and it is not said where that was loaded from")
    there, found = flat(base.load()), flat(params)
    for path, digest in hashes.items():
        if path not in there or sha256(there[path]) != digest:
            raise UserError(
                f"the checkpoint leaves out what it has in common with trunk.path {base.path}, but {path} is "
                f"{'another' if path in there else 'not'} there now: put the trunk back that the run started from"
            )
        found[path] = place(path, np.array(there[path]))  # a copy: the step donates its state
    return nested(found)
