"""Workdirs of finished runs that were not trained: their parameters moved by chance."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import Checkpoints, trunks
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.experiment_json import tasks_to_json, to_json
from mtl_jax.training.setup import prepare
from mtl_jax.training.train_state import create
from mtl_jax.transfer.adapters import ADAPTERS


def moved(tree, seed=0, size=0.3):
    """The tree with random numbers added to all leaves."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.asarray(leaf) + size * rng.normal(size=leaf.shape).astype(np.float32), tree)


def write(folder, experiment, seed=0):
    """Writes a workdir whose adapters, sharing and heads moved; returns its parameters."""
    prepared = prepare(experiment)
    params = jax.device_get(prepared.params)
    trunk = params["trunk"] | ({ADAPTERS: moved(params["trunk"][ADAPTERS], seed)} if ADAPTERS in params["trunk"] else {})
    params = {"trunk": trunk, "heads": moved(params["heads"], seed)}
    trunks.save(prepared.trunk, folder / "trunk")
    data = prepared.corpus.describe() | {"tasks": tasks_to_json(prepared.corpus.tasks)}
    for name, value in (("config", to_json(experiment)), ("data", data), ("results", {})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    put(folder, params)
    return params


def put(folder, params):
    """Puts parameters in place of a workdir's checkpoints."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "checkpoints").mkdir()
    with contextlib.closing(Store(folder, Checkpoints())) as store:
        store.save(2, jax.tree.map(jnp.asarray, create(params, (), (), 0)), {"step": 2}, 0.5)
        store.wait()
