"""What every task kind declares: how to read a label, what the head outputs, its loss and its metrics."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np


class Task(Protocol):
    """A frozen dataclass that says what is predicted from a source's rows.

    Losses come as sums and counts, so that a mean is divided once, after the sum over rows and devices. A missing label
    (`missing`) adds nothing to either.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source that holds the label.
        hidden: Width of a hidden layer in the head, 0 for none.
        dropout: Dropout rate in front of the head.
        metric: The metric (one of metric_names) that stands for the task.
        metric_names: Those of metrics() that can stand for a task: higher is better.
        labels: The label set; empty where labels are numbers.
    """

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def column(self) -> str: ...
    @property
    def hidden(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def metric(self) -> str: ...
    @property
    def metric_names(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> int:
        """O, numbers the head gives per example."""
        ...

    @property
    def missing(self) -> float:
        """The value that stands for no label."""
        ...

    @property
    def dtype(self) -> type[np.generic]:
        """Numpy dtype of labels."""
        ...

    def parse(self, text: str) -> float:
        """A label as written in the source to its number; ValueError says in a few words what is wrong."""
        ...

    def loss(self, outputs_RxSxO: jax.Array, labels_RxS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sum of the per-example losses and the number of labelled examples, both f32[]."""
        ...

    def metrics(self, outputs_NxO: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
        """Metrics over N labelled examples, on the host."""
        ...

    def constant(self, labels_N: np.ndarray) -> np.ndarray:
        """f32[O], the outputs that ignore the input and fit the labels best: majority class or mean."""
        ...

    def probe(self, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray:
        """Test outputs f32[N, O] of a linear model on fixed features; keys are "train", "dev" and "test"."""
        ...

    def describe(self, outputs_O: np.ndarray) -> dict[str, Any]:
        """One prediction as a JSON object."""
        ...
