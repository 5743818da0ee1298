"""What every task kind declares: how to read a label, what the head outputs, its loss and its metrics."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.files import shown
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.models.head import Head
from mtl_jax.models.trunk_output import Encoded, TrunkFacts

# Outputs of N examples: f32[N, O], or for each of them an f32[len, O].
PerExample = Sequence[np.ndarray] | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Configuration, abc.ABC):
    """What is predicted from a source's rows.

    Losses come as sums and counts, so that a mean is divided once, after the sum over rows and devices. A missing label
    (`missing`) adds nothing to either. Shapes in names: R rows, T tokens a row, S examples a row, O outputs, N examples.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        hidden: Width of a hidden ReLU layer in the head, 0 for none.
        dropout: Dropout rate in front of the head.
        metric: The metric (one of metric_names) that stands for the task.
    """

    name: str
    source: str
    hidden: int = 0
    dropout: float = 0.0
    metric: str = ""

    # What the outputs are of: "example" (f32[R, S, O]), "token" (f32[R, T, O]), or "target" (f32[R, U, O], the tokens of target
    # texts, which are the labels); and what the labels are of.
    level: ClassVar[str] = "example"
    label_level: ClassVar[str] = "example"
    # A label's value where there is none, and the numpy dtype of labels.
    missing: ClassVar[float] = -1
    dtype: ClassVar[type[np.generic]] = np.int32
    # Whether labels belong to words: the text is then read as words.
    words: ClassVar[bool] = False
    # Whether a row longer than a packed row's length becomes several windows; else it is cut, and counted. Where another task
    # of the source asks for windows, a task that does not reads the first one.
    windows: ClassVar[bool] = False
    # Whether windows carry the places of their tokens in the text.
    needs_offsets: ClassVar[bool] = False
    # Whether the head is a decoder: it starts as that of an encoder-decoder checkpoint, and is measured by what it generates.
    decodes: ClassVar[bool] = False
    # Whether the head costs so much that rows of other sources, which have no labels for it, are kept from it.
    large: ClassVar[bool] = False
    # Whether the task changes its source's tokens, by corrupt().
    corrupts: ClassVar[bool] = False
    # Whether one vector added to every token's leaves the loss as it is: then it has no gradient over the representation.
    shift_free: ClassVar[bool] = False
    # What to do with a text that stands in several rows with different labels: the first row counts.
    several: ClassVar[str] = "only the first row of a text is learned from; correct the labels, or give each text one row"
    # What the outputs are, for transfer.divergence: softmax, sigmoid, number; "": nothing to compare models by.
    compared_as: ClassVar[str] = ""
    # The parts of Encoded that the head reads.
    needs: ClassVar[tuple[str, ...]] = ("pooled",)

    @property
    @abc.abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Those of metrics() that can stand for a task: higher is better."""

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """O, numbers the head gives per example or token."""

    @property
    def stride(self) -> int:
        """Tokens that consecutive windows of a row share."""
        return 0

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns with texts, beside the source's, that a vocabulary must know."""
        return ()

    @property
    def target_length(self) -> int:
        """Most tokens of a target text."""
        return 0

    @property
    def leading(self) -> int:
        """Special tokens in front of a target text that are not learned."""
        return 0

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one label."""
        return ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set; empty where labels are no names."""
        return ()

    @functools.cached_property
    def place_of(self) -> dict[str, int]:
        """The place of each label in the label set."""
        return {label: place for place, label in enumerate(self.labels)}

    def check(self) -> None:
        """Raises UserError where a field makes no sense."""
        if self.metric not in self.metric_names:
            raise unknown(f"metric of task {self.name!r}:", self.metric, self.metric_names)
        if not 0 <= self.dropout < 1:
            raise UserError(f"task {self.name!r}: dropout is {self.dropout}; it must be at least 0 and below 1")

    def check_source(self, source: Source) -> None:
        """Raises UserError where the task does not fit its source, such as where they name different text columns."""
        return

    def on(self, trunk: TrunkFacts) -> Self:
        """The task with what it must know of the trunk.

        Raises:
            UserError: It does not go with such a trunk.
        """
        return self

    def written(self, row: Row) -> Any:
        """What a row says of its label, as far as that can be read without a label set; None: nothing.

        Raises:
            UserError: It has no such column, or something of another kind there.
        """
        return None

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        """The task with what is found in the data: its label set, for a start.

        Args:
            rows: The rows of the training file: the training rows, and those that were cut from them.
            tokenizer: The trunk's.
        """
        return self

    def fitted(self, train: Examples) -> Self:
        """The task with what is computed from the training labels, such as class weights.

        Args:
            train: The training examples of its source, with this task's labels.
        """
        return self

    def remarks(self, parts: Sequence[Examples]) -> list[str]:
        """What must be said about this task's data, a line each, so that nothing happens to it in silence.

        Args:
            parts: The examples of its source, split by split.
        """
        return []

    @abc.abstractmethod
    def parse(self, row: Row) -> Any:
        """A row's label, None where it has none; ValueError says in a few words what is wrong, UserError also where."""

    def place(self, label: Any, window: Window) -> np.ndarray:
        """A window's label: [*label_shape], or [len] where labels are of tokens.

        Here: the row's label on its first window.

        Args:
            label: What parse() returned.
            window: A window of that row.
        """
        value = self.missing if label is None or window.number else label
        return np.broadcast_to(np.asarray(value, self.dtype), self.label_shape)

    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """For tasks that change their source's tokens: new tokens i32[len] and labels [len], anew in every pass.

        Args:
            tokens: i32[len], a window.
            rng: In training another one at every pass; in evaluation always the same one for a window.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it changes tokens, and has no corrupt()")

    def init(self, key: jax.Array, width: int) -> Any:
        """The head's parameters.

        Args:
            key: A PRNG key.
            width: H, the size of the trunk's vectors.
        """
        return Head(self.outputs, self.hidden).init(key, jnp.zeros((1, 1, width)))["params"]

    def start_from(self, trunk: Any, fresh: Any) -> Any:
        """The head's parameters before training.

        Args:
            trunk: The trunk's, before training.
            fresh: What init() gave.
        """
        return fresh

    def apply(self, params: Any, encoded: Encoded, batch: Batch, key: jax.Array | None) -> jax.Array:
        """The head: outputs f32[R, S, O] or f32[R, T, O], by level; a key means dropout."""
        head = Head(self.outputs, self.hidden, self.dropout)
        rngs = None if key is None else {"dropout": key}
        vectors = encoded.pooled if self.level == "example" else encoded.tokens
        outputs: Any = head.apply({"params": params}, vectors, deterministic=key is None, rngs=rngs)
        return outputs

    @abc.abstractmethod
    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of the losses over labelled examples (or tokens), and their number, both f32[]."""

    @abc.abstractmethod
    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        """Metrics over all examples that have a label, on the host.

        Args:
            outputs: f32[N, O], or for each window an f32[len, O], by level.
            examples: The N windows.
        """

    def signatures(self, rows: Sequence[Row]) -> dict[str, str]:
        """{metric: how it is computed}, of metrics that have variants.

        Args:
            rows: What they are computed on.
        """
        return {}

    def constant(self, train: Examples, test: Examples) -> PerExample | None:
        """Outputs for test that ignore the text and fit train best, such as its majority class; None: there is none."""
        return None

    def lead(self, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float] | None:
        """Metrics on rows where each answer is the first sentence of the text; None: the kind answers with no texts."""
        return None

    def probe(self, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray | None:
        """Test outputs f32[N, O] of a linear model on fixed features f32[N, H]; None where the kind has none.

        Args:
            features: By split: "train", "dev" and "test".
            labels: The same; train and dev without rows that have no label.
        """
        return None

    @abc.abstractmethod
    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        """One row's prediction as a JSON object.

        Args:
            outputs: For each window of the row f32[O] or f32[len, O], by level.
            windows: Those windows.
            row: The row.
        """


def column(row: Row, name: str, task: Task) -> Any:
    """A row's value in a column that a task names.

    Raises:
        UserError: There is no such column.
    """
    if name not in row.columns:
        raise UserError(
            f"{row.where}: source {task.source!r} has no column {name!r} for task {task.name!r}; "
            f"columns: {listed(row.columns)} (where a row has no label, it is null or empty there)"
        )
    return row.columns[name]


def text_of(row: Row, name: str, task: Task) -> str | None:
    """A row's value in a column that a task names, where that must be text, or nothing.

    Raises:
        UserError: There is no such column, or it holds a list.
    """
    value = column(row, name, task)
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{row.where}: task {task.name!r}: column {name!r} holds a list, {shown(repr(value))}; one value is needed"
        )
    return value


def known_rows(task: Task, examples: Examples) -> np.ndarray:
    """bool[N], which examples have a label; a label of several numbers is there if one of them is."""
    labels = examples.labels[task.name]
    there = ~np.isnan(labels) if np.isnan(task.missing) else labels != task.missing
    return there.reshape(len(labels), -1).any(axis=1)


def known(task: Task, examples: Examples) -> np.ndarray:
    """The labels that are there: [M, *label_shape]."""
    return examples.labels[task.name][known_rows(task, examples)]


def labelled(task: Task, outputs: PerExample, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Outputs f32[M, O] and labels [M, *label_shape] of the examples that have a label."""
    return np.asarray(outputs)[known_rows(task, examples)], known(task, examples)
