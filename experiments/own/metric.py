"""A metric of one's own: the area under the ROC curve, which decides which checkpoint is the best.

    python experiments/own/metric.py
    python experiments/own/metric.py --tasks.0.metric accuracy --tasks.0.more-metrics roc_auc
    mtl-jax evaluate runs/own_metric --import experiments/own/metric.py --task movies --path FILE

A metric is a function of predictions and references that returns one number, higher is better. What it compares depends on the
kind of task (Task.compared): here outputs f32[N, 2] and labels i32[N] of the examples that have a label.
"""

import dataclasses

import numpy as np
from sklearn.metrics import roc_auc_score
from two_tasks import EXPERIMENT

from mtl_jax import main
from mtl_jax.tasks import register_metric


@register_metric("roc_auc")
def roc_auc(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a random example of the second label has a larger logit than one of the first; NaN with one label."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(roc_auc_score(labels, outputs[:, 1] - outputs[:, 0]))


if __name__ == "__main__":
    tasks = tuple(dataclasses.replace(task, metric="roc_auc") for task in EXPERIMENT.tasks)
    main(dataclasses.replace(EXPERIMENT, name="own_metric", tasks=tasks))
