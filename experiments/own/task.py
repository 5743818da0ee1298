"""A task kind of one's own: grades, ranges of a rating in their order.

    python experiments/own/task.py
    python experiments/own/task.py --tasks.0.grades 7 --tasks.0.metric accuracy
    mtl-jax predict runs/own_task --import experiments/own/task.py --task movies --text "a fine film"

A kind is a subclass of mtl_jax.tasks.Task. This one says how to read a label, how many outputs the head has, the loss, the
metrics, and what a prediction looks like; everything else has a default.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from two_tasks import EXPERIMENT

from mtl_jax import main
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.tasks import Task
from mtl_jax.tasks.reading import labelled, text_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded(Task):
    """A grade 0, 1, ... for each text; output i is the logit of "above i" (Frank and Hall, 2001).

    Attributes:
        column: The column of the source with a rating.
        low: The lowest rating.
        high: The highest rating; the range between is divided into grades of equal width.
        grades: The number of grades.
        metric: The main metric: within_one or accuracy.
    """

    column: str = "rating"
    low: float = -4.0
    high: float = 4.0
    grades: int = 5
    metric: str = "within_one"

    metric_names = ("within_one", "accuracy")

    @property
    def outputs(self) -> int:
        return self.grades - 1

    def parse(self, row: Row) -> int | None:
        text = text_of(row, self.column, self)
        share = (float(text) - self.low) / (self.high - self.low) if text else None
        return None if share is None else min(max(int(share * self.grades), 0), self.grades - 1)

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        known = labels != self.missing
        above = (labels[..., None] > jnp.arange(self.outputs)).astype(jnp.float32)
        losses = optax.sigmoid_binary_cross_entropy(outputs, above).mean(axis=-1)
        return jnp.where(known, losses, 0.0).sum(), known.sum().astype(jnp.float32)

    def metrics(self, outputs: Any, examples: Examples) -> dict[str, float]:
        outputs, labels = labelled(self, outputs, examples)
        error = np.abs((outputs > 0).sum(axis=1) - labels)
        return {"accuracy": float((error == 0).mean()), "within_one": float((error <= 1).mean())}

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Any], row: Row) -> dict[str, Any]:
        return {"grade": int((outputs[0] > 0).sum()), "of": self.grades}


if __name__ == "__main__":
    graded = tuple(Graded(name=task.name, source=task.source, column="sentiment") for task in EXPERIMENT.tasks)
    main(dataclasses.replace(EXPERIMENT, name="own_task", tasks=graded))
