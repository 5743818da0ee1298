"""The beginning of a run whose parameters come from another run, or from a checkpoint beside its trunk's own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import pretrained, trunk_compatibility
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count
from mtl_jax.pretrained.checkpoint import AUTO
from mtl_jax.training import restore
from mtl_jax.training.setup import Prepared
from mtl_jax.transfer import loading
from mtl_jax.transfer.adapters import ADAPTERS
from mtl_jax.transfer.adapters.base import RUN
from mtl_jax.transfer.loading import FIELD, Account, InitFrom
from mtl_jax.trunk_compatibility import TrunkSignature
from mtl_jax.trunks import token_table

RECORD = "init_from.json"
_ABLE = "be loaded into each other"


class Beginning(NamedTuple):
    """Parameters to begin with.

    Attributes:
        leaves: {path: array on the host}.
        kin: The trunk that they are of.
        facts: Where exactly they are from, for the record.
        own_adapters: Whether each source of the run had adapters of its own.
    """

    leaves: dict[str, np.ndarray]
    kin: TrunkSignature
    facts: dict[str, Any]
    own_adapters: bool = False


def begin(prepared: Prepared) -> tuple[Prepared, dict[str, Any], str]:
    """The run with the parameters that experiment.init_from names.

    Args:
        prepared: The run, its parameters as trunk and seed say.

    Returns:
        The run; the contents of init_from.json: where the parameters are from, a SHA-256 over what was loaded, and what became
        of every parameter; and a line to show.

    Raises:
        UserError: The source is no run or checkpoint, not finished, of another family, vocabulary or shape, or its paths do not
            fit.
    """
    init = prepared.experiment.init_from
    found = _of_run(init) if restore.is_workdir(Path(init.path)) else _of_checkpoint(init)
    params, account = loading.load_into(prepared.params, found.leaves, init)
    _check(prepared, init, found, account)
    record = {"path": init.path, **found.facts, "sha256": _digest(found.leaves, account), **account._asdict()}
    return prepared._replace(params=params), record, _line(init, found, account)


def _of_run(init: InitFrom) -> Beginning:
    folder = Path(init.path)
    if init.step == "best" and not any((folder / name).exists() for name in ("results.json", "merge.json")):
        raise UserError(
            f"{FIELD}: the run in {folder} is not finished (it has no results.json); let it end, or name one of its steps by "
            f"{FIELD}.step"
        )
    run = restore.open_run(folder, init.step)
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flat(jax.device_get(run.params)).items()}
    facts = {"experiment": run.experiment.name, "seed": run.experiment.seed, "step": run.step, "dev": run.dev}
    own = any(adapter.per != RUN for adapter in run.experiment.adapters)
    return Beginning(leaves, trunk_compatibility.of_trunk(run.trunk), facts, own)


def _of_checkpoint(init: InitFrom) -> Beginning:
    if init.step != "best":
        raise UserError(f"{FIELD}.step is {init.step!r}, but {init.path} is no workdir of a run, and a checkpoint has no steps")
    checkpoint = pretrained.load(init.path, head=AUTO)
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flat(jax.device_get(checkpoint.params)).items()}
    return Beginning(
        leaves, trunk_compatibility.of_checkpoint(checkpoint), {"architectures": checkpoint.raw.get("architectures")}
    )


def _check(prepared: Prepared, init: InitFrom, found: Beginning, account: Account) -> None:
    """Raises UserError where the trunks are no kin; heads alone fit wherever their shapes do."""
    into_trunk = [path for path in account.loaded if path.startswith("trunk/")]
    if not into_trunk:
        return
    if found.own_adapters and any(path.startswith(f"trunk/{ADAPTERS}/") for path in into_trunk):
        raise UserError(
            f"{FIELD}: each source of {init.path} has its own adapters, and it is not known which are for the sources here; "
            f"leave them out by {FIELD}.leave_out trunk/{ADAPTERS}/.*"
        )
    names, both = ("this experiment", init.path), (trunk_compatibility.of_trunk(prepared.trunk), found.kin)
    trunk_compatibility.check_family(names, both, _ABLE)
    paths = trees.flat(prepared.params)
    if all(path in account.loaded for path in paths if path.startswith("trunk/") and f"/{ADAPTERS}/" not in path):
        trunk_compatibility.check_constants(names, both, _ABLE)
    table = token_table(prepared.params["trunk"])
    if any(paths[path] is table for path in into_trunk):
        trunk_compatibility.check_vocabulary(names, both, _ABLE)


def _digest(leaves: dict[str, np.ndarray], account: Account) -> str:
    total = hashlib.sha256()
    for path, old in sorted(account.loaded.items()):
        total.update(f"{path} {trees.sha256(leaves[old])}\n".encode())
    return total.hexdigest()


def _line(init: InitFrom, found: Beginning, account: Account) -> str:
    step = f", step {found.facts['step']}" if "step" in found.facts else ""
    parts = [f"beginning from {init.path}{step}: {count(len(account.loaded), 'parameter')} loaded"]
    for paths, what in (
        (account.initialised, "not in it, as trunk and seed say"),
        (account.left_out, "left out"),
        (account.without_place, "without a place here"),
    ):
        if paths:
            parts.append(f"{len(paths)} {what} ({loading.shown(paths)})")
    return "; ".join(parts)
