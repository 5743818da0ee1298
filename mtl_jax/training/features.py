"""The features of a frozen trunk, its vectors of all examples: computed once, and cached on disk by content.

Entries are in features/ of the cache, beside those of tokens, and are written and checked in the same way (data.array_cache).
The name of an entry is a SHA-256 of everything that decides its bits:

- the program that computes the vectors of a batch, as jax gives it to XLA. It contains the trunk's sizes, its adapters, its
  code, the compute dtype, the precision of products and the shape of a batch;
- the number of devices over which the rows are cut: the program's mesh but for this may be that of a run or of an ablation;
- the trunk's parameters;
- every batch, in order: token ids, types, segments, positions, sources and ids of the examples. The last bits of a vector
  depend on the other examples of its row;
- the versions of jax and jaxlib, the kind of device, XLA_FLAGS.

It does not depend on heads, labels, seed and phases, nor on choices that XLA makes anew on the same kind of device, such as the
fastest algorithm of a GPU: a run resumes there with the same bits because the features are read, not computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from typing import Any

import jax
import numpy as np

from mtl_jax.core import assets, digests
from mtl_jax.core.errors import count
from mtl_jax.core.progress import Progress
from mtl_jax.core.versions import installed
from mtl_jax.data import array_cache
from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.models.trunk_output import TEXT_VECTORS
from mtl_jax.training import evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import encode_tokens, text_vector
from mtl_jax.training.preemption import Stop
from mtl_jax.training.prepared import Prepared

log = logging.getLogger(__name__)

WHAT = "feature"  # the cache's name in the log
FILE = "features"  # the name of an entry's file, and of the cache's folder
FORMAT = 1  # the version of the entries' format
WORTH = 10**10  # parameters times tokens: less is computed in about a second, and not cached


class Features:
    """The features of a run's examples.

    Args:
        prepared: The run.
        stop: Checked before every batch.

    Attributes:
        apply: The jitted function to the vectors of a batch.
    """

    def __init__(self, prepared: Prepared, stop: Stop):
        self.mesh, self.batching, self.stop = prepared.mesh, prepared.experiment.batch, stop
        self.placement = prepared.placement
        fields = (text_vector(prepared.corpus.tasks) or TEXT_VECTORS[0],)
        encode = encode_tokens(prepared.trunk.module, fields, prepared.savings._replace(remat="none"))
        self.apply = evaluation.make_features(encode, prepared.mesh)
        self.examples = [part for split in prepared.corpus.splits.values() for part in split.values()]

    def table(self, params: Any, title: str) -> jax.Array:
        """f32[N, H] on the devices: the trunk's vector of every example, by id; from the cache, or computed.

        Args:
            params: The model's parameters, on the devices.
            title: The title of the progress bar.

        Raises:
            Interrupted: The process was asked to stop.
        """
        trunk = {"trunk": params["trunk"]}
        size = sum(leaf.size for leaf in jax.tree.leaves(trunk))
        tokens = sum(len(ids) for part in self.examples for ids in part.tokens)
        name = meshes.gather(self._name(trunk))[0] if size * tokens >= WORTH else ""
        entry = array_cache.load(assets.cache_dir() / FILE, name, WHAT) if name else None
        if all(meshes.gather(entry is not None)):  # all hosts must compute together, and their caches may differ
            assert entry is not None
            table_NxH = np.array(entry[FILE])  # a copy in memory: the file may be removed
            log.info("features of %s from the cache", count(len(table_NxH), "text"))
        else:
            table_NxH = self._compute(trunk, title, tokens)
            if name:
                self._store(name, table_NxH)
        return meshes.place(table_NxH, meshes.replicated(self.mesh))

    def _compute(self, trunk: Any, title: str, tokens: int) -> np.ndarray:
        with contextlib.closing(Progress(title, tokens, unit="tok")) as progress:

            def on_batch(batch: Batch) -> None:
                self.stop.check()
                progress.update(int((batch.segments > 0).sum()))

            return evaluation.features(self.apply, trunk, self.examples, self.batching, self.mesh, on_batch=on_batch)

    def _name(self, trunk: Any) -> str:
        """SHA-256 (hex) as in the module's docstring; under a second for 33,000 texts and MiniLM."""
        about = {
            "format": FORMAT,
            "versions": {name: installed(name) for name in ("jax", "jaxlib")},
            "device": [jax.devices()[0].platform, jax.devices()[0].device_kind],
            "flags": os.environ.get("XLA_FLAGS", ""),
            "devices": self.mesh.shape[meshes.DATA],
            "params": digests.of_tree(self.placement.on_host(trunk)),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for number, batch in enumerate(eval_batches(self.examples, self.batching)):
            if number == 0:
                program = self.apply.lower(trunk, meshes.place(batch, meshes.by_rows(self.mesh)), None)  # type: ignore[attr-defined]
                lines = program.as_text().splitlines()
                digest.update("\n".join(line for line in lines if not line.lstrip().startswith("sdy.mesh")).encode())
            for field, array in zip(Batch._fields, batch, strict=True):
                if isinstance(array, np.ndarray):
                    digest.update(f"\0{field} {array.dtype} {array.shape}\0".encode())
                    digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _store(self, name: str, table_NxH: np.ndarray) -> None:
        """Writes an entry: first host 0 does, then every host that does not see its files."""
        folder, arrays = assets.cache_dir() / FILE, {FILE: table_NxH}
        about = {"texts": len(table_NxH), "width": table_NxH.shape[1]}
        if jax.process_index() == 0:
            array_cache.store(folder, name, arrays, about, WHAT)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)
            if not (folder / name).exists():
                array_cache.store(folder, name, arrays, about, WHAT)
