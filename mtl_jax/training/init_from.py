"""Initial parameters that a run loads from another run, or from a checkpoint in addition to its trunk's."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import pretrained, trunk_compatibility
from mtl_jax.core import digests, trees
from mtl_jax.core.errors import UserError, count
from mtl_jax.experiment import Experiment
from mtl_jax.models.trunk_output import token_table
from mtl_jax.pretrained.checkpoint import AUTO
from mtl_jax.sharing.base import Hard
from mtl_jax.tasks import Task
from mtl_jax.training import restore
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.train_state import init_params, made_by_cpu
from mtl_jax.transfer import loading
from mtl_jax.transfer.adapters import ADAPTERS, Adapted
from mtl_jax.transfer.adapters.base import RUN
from mtl_jax.transfer.loading import FIELD, Account, InitFrom
from mtl_jax.trunk_compatibility import TrunkSignature

RECORD = "init_from.json"
_PURPOSE = "be loaded into each other"


class InitialParams(NamedTuple):
    """Parameters to load.

    Attributes:
        leaves: {path: array on the host}.
        kin: Family, vocabulary and constants of their trunk.
        facts: The run and step, or the checkpoint, that they are from, for the record.
        separate_adapters: Whether its sources or tasks have their own adapters, and those of this run may be others.
    """

    leaves: dict[str, np.ndarray]
    kin: TrunkSignature
    facts: dict[str, Any]
    separate_adapters: bool = False


def load_parameters(prepared: Prepared) -> tuple[Prepared, dict[str, Any], str]:
    """The run with the parameters that experiment.init_from names.

    Adapters, a sharing and heads that start as parts of the trunk, such as copies of its layers, start as those of the loaded
    trunk, unless parameters of the same adapter, sharing or head are loaded.

    Args:
        prepared: The run with the initial parameters of its trunk and seed.

    Returns:
        The run with the loaded parameters; the contents of init_from.json: their origin, a SHA-256 of the loaded ones, and for
        every parameter whether it was loaded; and a line for the log.

    Raises:
        UserError: The path is not a run or checkpoint, the run is not finished, its family, vocabulary or shapes differ, or its
            paths do not match.
    """
    init = prepared.experiment.init_from
    is_run = restore.is_workdir(Path(init.path))
    source = _from_run(init, prepared.experiment) if is_run else _from_checkpoint(init)
    params, account = loading.load_into(prepared.params, source.leaves, init)
    _check(prepared, init, source, account)
    params, account = _made_again(prepared, params, account)
    record = {"path": init.path, **source.facts, "sha256": _digest(source.leaves, account), **account._asdict()}
    return prepared._replace(params=params), record, _line(init, source, account)


def _made_again(prepared: Prepared, params: Any, account: Account) -> tuple[Any, Account]:
    """Makes what starts as a part of the trunk again from the loaded trunk, where nothing of its part was loaded."""
    module, tasks = prepared.trunk.module, prepared.corpus.tasks
    starts = isinstance(module, Adapted) or any(type(task).start_from is not Task.start_from for task in tasks)
    added = f"trunk/{ADAPTERS}/"
    if not starts or not any(path.startswith("trunk/") and not path.startswith(added) for path in account.loaded):
        return params, account

    def part(path: str) -> str:
        """trunk/adapters/NAME, or heads/TASK."""
        return "/".join(path.split("/")[: 3 if path.startswith(added) else 2])

    trunk = {name: jax.tree.map(jnp.asarray, tree) for name, tree in params["trunk"].items() if name != ADAPTERS}
    making = contextlib.nullcontext if prepared.experiment.sharding == "replicated" else made_by_cpu  # as in prepare()
    with making():
        fresh = trees.flat(init_params(prepared.trunk._replace(params=trunk), tasks, prepared.experiment.seed))
    result, loaded_parts = trees.flat(params), {part(path) for path in account.loaded}
    made_again = []
    for path in account.initialised:
        if path.startswith((added, "heads/")) and path in fresh and part(path) not in loaded_parts:
            leaf = np.asarray(fresh[path])
            if not np.array_equal(leaf, result[path]):
                result[path] = leaf
                made_again.append(path)
    kept = tuple(path for path in account.initialised if path not in set(made_again))
    return trees.nested(result), account._replace(initialised=kept, made_again=tuple(made_again))


def _from_run(init: InitFrom, experiment: Experiment) -> InitialParams:
    folder = Path(init.path)
    if init.step == "best" and not any((folder / name).exists() for name in ("results.json", "merge.json")):
        raise UserError(
            f"{FIELD}: the run in {folder} is not finished (it has no results.json); let it end, or choose one of its steps by "
            f"{FIELD}.step"
        )
    run = restore.open_run(folder, init.step)
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flat(jax.device_get(run.params)).items()}
    facts = {"experiment": run.experiment.name, "seed": run.experiment.seed, "step": run.step, "dev": run.dev}
    tasks, others = ([task.name for task in of_run.tasks] for of_run in (experiment, run))
    same_sharing = run.experiment.sharing == experiment.sharing and tasks == others
    separate = any(adapter.per != RUN for adapter in run.experiment.adapters)
    separate = separate or not (same_sharing or isinstance(run.experiment.sharing, Hard))
    return InitialParams(leaves, trunk_compatibility.of_trunk(run.trunk), facts, separate)


def _from_checkpoint(init: InitFrom) -> InitialParams:
    if init.step != "best":
        raise UserError(
            f"{FIELD}.step is {init.step!r}, but {init.path} is not the workdir of a run, and a checkpoint has no steps"
        )
    checkpoint = pretrained.load(init.path, head=AUTO)
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flat(jax.device_get(checkpoint.params)).items()}
    return InitialParams(
        leaves, trunk_compatibility.of_checkpoint(checkpoint), {"architectures": checkpoint.raw.get("architectures")}
    )


def _check(prepared: Prepared, init: InitFrom, source: InitialParams, account: Account) -> None:
    """Raises UserError where the trunks are not compatible; for heads alone equal shapes are enough."""
    into_trunk = [path for path in account.loaded if path.startswith("trunk/")]
    if not into_trunk:
        return
    if source.separate_adapters and any(path.startswith(f"trunk/{ADAPTERS}/") for path in into_trunk):
        raise UserError(
            f"{FIELD}: each source or task of {init.path} has its own adapters, and it is not known which ones those of this "
            f"run should get; leave them out by {FIELD}.leave_out trunk/{ADAPTERS}/.*"
        )
    names, both = ("this experiment", init.path), (trunk_compatibility.of_trunk(prepared.trunk), source.kin)
    trunk_compatibility.check_family(names, both, _PURPOSE)
    paths = trees.flat(prepared.params)
    if all(path in account.loaded for path in paths if path.startswith("trunk/") and f"/{ADAPTERS}/" not in path):
        trunk_compatibility.check_constants(names, both, _PURPOSE)
    try:
        table = token_table(prepared.params["trunk"])
    except UserError:  # a user's trunk may keep its vectors of tokens anywhere
        table = None
    if table is None or any(paths[path] is table for path in into_trunk):
        trunk_compatibility.check_vocabulary(names, both, _PURPOSE)


def _digest(leaves: dict[str, np.ndarray], account: Account) -> str:
    digest = hashlib.sha256()
    for path, source_path in sorted(account.loaded.items()):
        digest.update(f"{path} {digests.of_array(leaves[source_path])}\n".encode())
    return digest.hexdigest()


def _line(init: InitFrom, source: InitialParams, account: Account) -> str:
    step = f", step {source.facts['step']}" if "step" in source.facts else ""
    parts = [f"beginning from {init.path}{step}: {count(len(account.loaded), 'parameter')} loaded"]
    for paths, reason in (
        (account.made_again, "not in it and made again from the loaded trunk"),
        (account.initialised, "not in it and initialised by trunk and seed"),
        (account.left_out, "left out"),
        (account.without_place, "not in this model"),
    ):
        if paths:
            parts.append(f"{len(paths)} {reason} ({loading.shown(paths)})")
    return "; ".join(parts)
