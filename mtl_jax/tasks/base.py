"""The base class of task kinds: how to read a label, the head's outputs, its loss and its metrics."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.parts import Part
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.data.tokenize import Encodings
from mtl_jax.models.layers import Head
from mtl_jax.models.trunk_output import Encoded, TrunkFacts
from mtl_jax.tasks.facts import TaskFacts
from mtl_jax.tasks.metrics import METRICS, registered_scores
from mtl_jax.tasks.reading import labelled
from mtl_jax.tasks.row_statistics import RowStatistics

# Outputs of N examples: f32[N, O], or a sequence of N arrays f32[len, O].
PerExample = Sequence[np.ndarray] | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(TaskFacts, Part):
    """What is predicted from the rows of a source: how to read a label, the head, its loss and its metrics.

    A minimal kind has a metric, outputs, parse(), loss() and metrics(). A kind whose outputs or labels are not those of whole
    texts declares so in level, label_level, needs and dtype; the other properties follow from these four.

    Losses come as sums and counts, so that a mean is divided once, after the sum over rows and devices. A missing label
    (`missing`) adds nothing to either. Shapes in names: R rows, T tokens a row, S examples a row, U target tokens a row,
    O outputs, N examples.

    The fields and the facts that a kind declares are those of TaskFacts.
    """

    @property
    def corrupts(self) -> bool:
        """Whether the task changes its source's tokens: it defines corrupt()."""
        return type(self).corrupt is not Task.corrupt

    @property
    def makes_tokens(self) -> bool:
        """Whether the task makes the tokens of its source's rows: it defines encode_rows()."""
        return type(self).encode_rows is not Task.encode_rows

    def check(self) -> None:
        """Raises UserError where a field makes no sense."""
        if self.metric not in (*self.metric_names, *METRICS):
            raise unknown(f"metric of task {self.name!r}:", self.metric, (*self.metric_names, *METRICS))
        for name in self.more_metrics:
            METRICS.find(name, f"metric in more_metrics of task {self.name!r}, which names registered ones:")
        if self.registered_metrics and self.level != "example" and type(self).compared is Task.compared:
            kind, name = type(self).__name__, self.registered_metrics[0]
            raise UserError(f"task {self.name!r}: a {kind} has no predictions that the metric {name!r} could compare")
        if not 0 <= self.dropout < 1:
            raise UserError(f"task {self.name!r}: dropout is {self.dropout}; it must be at least 0 and below 1")

    def check_source(self, source: Source) -> None:
        """Raises UserError where the task does not fit its source, for example where they name different text columns."""
        return

    def on(self, trunk: TrunkFacts) -> Self:
        """The task with the sizes and constants that it takes from the trunk.

        Raises:
            UserError: The task cannot be put on this trunk.
        """
        return self

    def raw_label(self, row: Row) -> Any:
        """A row's label as the file has it, read without a label set; None where there is none.

        Raises:
            UserError: The row has no such column, or a value of another type in it.
        """
        return None

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        """The task with the fields that the data decides, such as the label set.

        Args:
            rows: The rows of the training file: the training rows, and those that were split off as dev and test.
            tokenizer: The trunk's.
        """
        return self

    def fitted(self, train: Examples) -> Self:
        """The task with the fields that are computed from the training labels, such as class weights.

        Args:
            train: The training examples of its source, with this task's labels.
        """
        return self

    def remarks(self, parts: Sequence[Examples]) -> list[str]:
        """Remarks on this task's data for the log, a line each: whatever was changed or lost.

        Args:
            parts: The examples of its source, split by split.
        """
        return []

    @abc.abstractmethod
    def parse(self, row: Row) -> Any:
        """A row's label, None where it has none.

        Raises:
            ValueError: The label is wrong; a few words say why.
            UserError: The same, with file and line.
        """

    def texts_of(self, row: Row, source: Source) -> Sequence[str | tuple[str, str]]:
        """The texts of a row that is read as several examples: all of them texts, or all of them pairs.

        A text that the row does not have is "": its place stays empty. window_label() then sees a window for each of them.

        Args:
            row: The row.
            source: Its source.

        Raises:
            UserError: The row lacks a column, or has something else than text in it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no texts_of()")

    def encode_rows(
        self, rows: Sequence[Row], source: Source, tokenizer: Any, max_length: int, cache: Path | None = None
    ) -> Encodings:
        """For a task whose rows are more than their texts, such as prompt and answer: the tokens of each row, one window each.

        No other task can then have the source.

        Args:
            rows: The rows; in predictions they have the source's text columns only.
            source: Their source.
            tokenizer: The trunk's.
            max_length: Most tokens of a row.
            cache: As for data.tokenize.encode.

        Raises:
            UserError: A row cannot be read.
            RowError: A text is not valid Unicode.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encode_rows()")

    def prompt_of(self, examples: Examples, number: int) -> np.ndarray:
        """For a head that is a decoder: the tokens i32[length] of an example that texts are generated from."""
        return examples.tokens[number]

    def generator(self, trunk: nn.Module) -> Any:
        """For a head that is a decoder: the model that generates, of the trunk with this head."""
        raise NotImplementedError(f"{type(self).__name__} has no generator()")

    def unit_key(self, row: Row) -> str:
        """What rows that stay together have in common, such as the query of a list; where texts_of() is not used."""
        raise NotImplementedError(f"{type(self).__name__} has no unit_key()")

    def window_label(self, label: Any, window: Window) -> np.ndarray:
        """A window's label: [*label_shape], or [len] where labels are those of words or tokens.

        By default the first window has the row's label, and the others have none.

        Args:
            label: The result of parse().
            window: A window of that row.
        """
        value = self.missing if label is None or window.number else label
        return np.broadcast_to(np.asarray(value, self.dtype), self.label_shape)

    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """For tasks that change their source's tokens: new tokens i32[len] and labels [len], anew in every pass.

        Args:
            tokens: i32[len], a window.
            rng: In training a new generator at every pass; in evaluation the same one for a window every time.
        """
        raise NotImplementedError(f"{type(self).__name__} has no corrupt()")

    def head_module(self) -> nn.Module:
        """The head as a linen module, called as (vectors f[..., H], deterministic) -> f[..., O]."""
        return Head(self.outputs, self.hidden, self.dropout)

    def init(self, key: jax.Array, width: int) -> Any:
        """The head's parameters.

        Args:
            key: A PRNG key.
            width: H, the size of the trunk's vectors.
        """
        return self.head_module().init(key, jnp.zeros((1, 1, width)))["params"]

    def from_head(self, head: Any, key: jax.Array) -> Any:
        """Its parameters where they start as the decoder of the trunk's checkpoint, from that and a key."""
        return head

    def start_from(self, trunk: Any, fresh: Any) -> Any:
        """The head's parameters before training.

        Args:
            trunk: The trunk's, before training.
            fresh: The result of init().
        """
        return fresh

    def from_classifier(self, classifier: Mapping[str, Any], fresh: Any) -> Any:
        """The head's parameters before training, where the trunk's checkpoint has a text classifier.

        Args:
            classifier: The parameters that the checkpoint has of it, as pretrained.text_classifier.parameters() gives them.
            fresh: The result of init().
        """
        return fresh

    def apply(self, params: Any, encoded: Encoded, batch: Batch, key: jax.Array | None) -> jax.Array:
        """The head: outputs f32[R, S, O] or f32[R, T, O], by level; a key means dropout."""
        rngs = None if key is None else {"dropout": key}
        vectors = getattr(encoded, self.text_vector) if self.level == "example" else encoded.tokens
        outputs: Any = self.head_module().apply({"params": params}, vectors, deterministic=key is None, rngs=rngs)
        return outputs

    @abc.abstractmethod
    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of the losses over labelled examples (or tokens), and their number, both f32[].

        Args:
            outputs: f32[R, S, O], f32[R, T, O] or f32[R, U, O], by level.
            labels: As in Batch.labels.
            batch: The rows.
        """

    @abc.abstractmethod
    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        """Metrics over all examples that have a label, on the host.

        Args:
            outputs: f32[N, O], or for each window an f32[len, O], by level.
            examples: The N windows.
        """

    @property
    def registered_metrics(self) -> tuple[str, ...]:
        """The registered metrics that are measured: the main one, if it is one, and more_metrics."""
        return tuple(name for name in dict.fromkeys((self.metric, *self.more_metrics)) if name in METRICS)

    def compared(self, outputs: PerExample, examples: Examples) -> tuple[Any, Any]:
        """Predictions and references for registered metrics, of the examples that have a label.

        By default the outputs f32[M, O] and the labels [M, *label_shape]; for Tagging the tags of each row's labelled words,
        for Span the answers and the lists of gold answers, for Seq2Seq the texts and the lists of target texts.
        """
        return labelled(self, outputs, examples)

    def all_metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        """metrics(), and the registered metrics; those of generated texts are measured with the texts.

        Raises:
            UserError: A metric is not registered, because the file that does so is not imported.
        """
        scores = self.metrics(outputs, examples)
        for name in (self.metric, *self.more_metrics):
            if name not in METRICS and name not in self.metric_names:
                raise UserError(
                    f"task {self.name!r}: the metric {name!r} is not registered here; import its file, which the run's "
                    "config.json names under parts (--import FILE)"
                )
        if self.decodes or not self.registered_metrics:
            return scores
        return scores | registered_scores(self.registered_metrics, *self.compared(outputs, examples))

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics | None:
        """What the main metric needs to know of each row, so that it is exact on any resample of the rows.

        By default None: mtl_jax.compare then calls metrics() on each resample, of which it takes fewer. A kind that defines it
        does so for the metrics in metric_names.

        Args:
            outputs: As for metrics(); of a metric of generated texts, the text of each row.
            examples: The N windows.
        """
        return None

    def signatures(self, rows: Sequence[Row]) -> dict[str, str]:
        """{metric: how it is computed}, of metrics that have variants.

        Args:
            rows: The rows that they are computed on.
        """
        return {}

    def constant(self, train: Examples, test: Examples) -> PerExample | None:
        """Outputs for test that ignore the text and fit train best, such as its majority class; None: no such baseline."""
        return None

    def lead(self, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float] | None:
        """Metrics of the baseline that answers with each text's first sentence; None where answers are not summaries."""
        return None

    def probe(self, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray | None:
        """Test outputs f32[N, O] of a linear model on fixed features; None where the kind has none.

        Args:
            features: {split: f32[N, H]} of "train", "dev" and "test".
            labels: {split: [N]}; those of train and dev have no missing label.
        """
        return None

    def probabilities(self, output: np.ndarray) -> dict[str, float] | None:
        """{label: its probability} of an example's outputs f32[O]; None for kinds that have no such probabilities."""
        return None

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        """One row's prediction as a JSON object; by default the numbers of its first window.

        Args:
            outputs: For each window of the row f32[O] or f32[len, O], by level.
            windows: Those windows.
            row: The row.
        """
        return {"outputs": np.asarray(outputs[0]).round(6).tolist()}
