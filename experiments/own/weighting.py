"""A weighting rule and a combinator of one's own, beside those of mtl_jax.

    python experiments/own/weighting.py
    python experiments/own/weighting.py --weighting-options power 0.5 --combinators warmup:steps=100
    mtl-jax ablate experiments/own/weighting.py --vary weighting=equal,uncertainty,inverse_norm
    mtl-jax ablate experiments/own/weighting.py --vary weighting-options.power=0.5,1.0
    python experiments/quickstart.py --import experiments/own/weighting.py --weighting inverse_norm

A rule is a function that returns a weighting.Rule: init makes its state from the names of the tasks, update makes this step's
weights from the losses and the inner products of the task gradients. A combinator takes the rule that it is around. Their
arguments are options on the command line.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from two_tasks import EXPERIMENT

from mtl_jax import main, weighting


@weighting.register("inverse_norm")
def inverse_norm(power: float = 1.0) -> weighting.Rule:
    """Each task's weight falls with the norm of its gradient: w_i is proportional to |g_i|^-power; the weights sum to K."""

    def update(state: Any, signals: weighting.Signals) -> tuple[weighting.Weights, Any]:
        assert signals.gram is not None  # f32[K, K], tasks in sorted order
        present = weighting.present(signals)  # tasks without a labelled row in this step have weight 0
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(signals.gram), 1e-12))
        weights = jnp.where(present, norms**-power, 0.0)
        weights = weights * present.sum() / jnp.maximum(weights.sum(), 1e-12)
        return weighting.unstack(jax.lax.stop_gradient(weights), signals), state

    return weighting.Rule(init=lambda tasks: (), update=update, needs_gram=True)


@weighting.register_combinator("warmup")
def warmup(rule: weighting.Rule, steps: float = 100) -> weighting.Rule:
    """Equal weights at first, and the rule's own from step `steps` on; between them on a line."""

    def update(state: Any, signals: weighting.Signals) -> tuple[weighting.Weights, Any]:
        weights, state = rule.update(state, signals)
        share = jnp.minimum(signals.step / steps, 1.0)
        present = weighting.unstack(jnp.ones(len(weights)), signals)
        return {task: share * weights[task] + (1 - share) * present[task] for task in weights}, state

    return rule._replace(update=update, solve=None)


if __name__ == "__main__":
    main(dataclasses.replace(EXPERIMENT, name="own_weighting", weighting="inverse_norm"))
