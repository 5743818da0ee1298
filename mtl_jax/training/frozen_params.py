"""Parameters that checkpoints omit: they never train, and can be read again from where the trunk was loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from mtl_jax.core import digests
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat, nested
from mtl_jax.transfer.adapters import ADAPTERS


class TrunkSource(NamedTuple):
    """Where the trunk of a run was loaded from.

    Attributes:
        load: () -> {"trunk": ...} as it was before training.
        path: The experiment's trunk.path.
    """

    load: Callable[[], Any]
    path: str


def untrained_hashes(masks: Iterable[Any], params: Any, loaded: Any) -> dict[str, str]:
    """{path: SHA-256} of the trunk's parameters that train in no phase and still equal the loaded ones.

    Args:
        masks: For each phase, which parameters train.
        params: The parameters.
        loaded: The same before training, on the host.
    """
    trained: set[str] = set()
    for mask in masks:
        trained |= {path for path, trains in flat(mask).items() if trains}
    current, hashes = flat(params), {}
    for path, leaf in flat(loaded).items():
        if path in trained or not path.startswith("trunk/") or path.startswith(f"trunk/{ADAPTERS}/"):
            continue
        digest = digests.of_array(leaf)
        if digests.of_array(current[path]) == digest:  # else an earlier configuration has trained it
            hashes[path] = digest
    return hashes


def omit(params: Any, paths: Iterable[str]) -> Any:
    """The parameters except those at the paths."""
    omitted = set(paths)
    return nested({path: leaf for path, leaf in _flat(params).items() if path not in omitted}) if omitted else params


def _flat(params: Any) -> dict[str, Any]:
    """As trees.flat, with the heads that have no parameters, so that nested() gives them back."""
    return dict(traverse_util.flatten_dict(params, keep_empty_nodes=True, sep="/"))


def restore(params: Any, hashes: Mapping[str, str], source: TrunkSource | None, place: Callable[[str, np.ndarray], Any]) -> Any:
    """The parameters together with those that a checkpoint omits.

    Args:
        params: The parameters in the checkpoint.
        hashes: {path: SHA-256} of the omitted ones.
        source: Where the omitted ones are.
        place: (path, host array) -> the leaf.

    Raises:
        UserError: An omitted parameter is missing in the source, or is not what it was.
    """
    if not hashes:
        return params
    if source is None:
        raise UserError("the checkpoint leaves out parameters of its trunk, and it is not known where that was loaded from")
    loaded, leaves = flat(source.load()), _flat(params)
    for path, digest in hashes.items():
        if path not in loaded or digests.of_array(loaded[path]) != digest:
            raise UserError(
                f"the checkpoint leaves out parameters that are the same in trunk.path {source.path}, but {path} "
                f"{'has changed' if path in loaded else 'is missing'} there: put the trunk back that the run started from"
            )
        leaves[path] = place(path, np.array(loaded[path]))  # a copy: the step donates its state
    return nested(leaves)
