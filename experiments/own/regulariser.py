"""Two regularisers of one's own: a penalty of parameters, and a loss of outputs.

    python experiments/own/regulariser.py
    python experiments/own/regulariser.py --regularisers.0.weight 0.1 --regularisers.1.weight 0
    mtl-jax ablate experiments/own/regulariser.py --vary regularisers.0.weight=0,0.01,0.1

A regulariser is a subclass of mtl_jax.transfer.Regulariser with one of two methods: penalty() of the parameters that train, or
output_loss() of a task's outputs. Its weight is a number or a schedule, it may begin in a later phase, and the weighting rule
does not see it.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from two_tasks import EXPERIMENT

from mtl_jax import main
from mtl_jax.tasks import Task
from mtl_jax.transfer import Regulariser


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfidencePenalty(Regulariser):
    """The negative entropy of the predicted labels, in nats: confident predictions cost more (Pereyra et al., 2017).

    Attributes:
        tasks: The tasks that it is about; empty: all of a distribution over labels.
    """

    name: str = "confidence"
    tasks: tuple[str, ...] = ()

    def output_loss(self, outputs: jax.Array, task: Task) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(outputs)
        return (jnp.exp(log_probabilities) * log_probabilities).sum(axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsAlike(Regulariser):
    """Half the squared distance of the heads' parameters from their mean over tasks: similar tasks get similar heads.

    It is the task regularisation of Evgeniou and Pontil, 2004, for heads of one shape.

    Attributes:
        layer: The end of the paths that are compared.
    """

    name: str = "heads_alike"
    layer: str = "output/kernel"

    reads_start = False

    def penalty(self, trained: Mapping[str, jax.Array], references: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        heads = [leaf for path, leaf in trained.items() if path.startswith("heads/") and path.endswith(self.layer)]
        stacked = jnp.stack(heads) if heads else jnp.zeros((1, 1))
        return jnp.square(stacked - stacked.mean(axis=0)).sum() / 2


if __name__ == "__main__":
    regularisers = (ConfidencePenalty(weight=0.05), HeadsAlike(weight=0.01))
    main(dataclasses.replace(EXPERIMENT, name="own_regulariser", regularisers=regularisers))
