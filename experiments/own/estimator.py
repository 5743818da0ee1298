"""An affinity estimator of one's own: the proxy A-distance of source and target (Ben-David et al. 2007).

    mtl-jax affinity experiments/own/estimator.py --estimators proxy_a_distance text_similarity
    mtl-jax affinity experiments/quickstart.py --import experiments/own/estimator.py --rows 128

How well can a linear model tell the source's texts from the target's? If it cannot, their texts are of one kind: the distance
is 0; if it always can, it is 2. The estimate is minus the distance, as higher must be better.
"""

from __future__ import annotations

import numpy as np
from two_tasks import EXPERIMENT

from mtl_jax import UserError, affinity, main


@affinity.register("proxy_a_distance")
def proxy_a_distance(source_texts: np.ndarray, texts: np.ndarray, most: int = 256) -> float:
    """Minus the proxy A-distance, -2 (1 - 2 error), of as many texts of each side; from -2 to 0.

    Args:
        source_texts: f[S, H], the source's texts in the trunk before training.
        texts: f[T, H], those of the target.
        most: The most texts of each side.
    """
    count = min(len(source_texts), len(texts), most)
    if count < 2:
        raise UserError("it needs two texts of each side")
    both = np.concatenate([source_texts[:count], texts[:count]])
    accuracy = affinity.linear_probe(both, np.repeat([0, 1], count))
    return -2 * max(2 * accuracy - 1, 0.0)


if __name__ == "__main__":
    main(EXPERIMENT)
