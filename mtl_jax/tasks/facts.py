"""The facts that a kind of task declares: the levels of its outputs and labels, what its head reads, its labels and metrics."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np

from mtl_jax.tasks.label_names import shown_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFacts(abc.ABC):
    """The fields of every task, and what the rest of the system asks of a kind without calling it.

    A kind must say `outputs`. For most, level, label_level, needs and dtype are all that differs: the other facts follow from
    these four. Task adds what a kind does.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        hidden: Width of a hidden ReLU layer in the head, 0 for none.
        dropout: Dropout rate in front of the head.
        metric: The main metric, one of metric_names, or a registered one.
        more_metrics: Registered metrics that are measured beside those of the kind.
    """

    name: str
    source: str
    hidden: int = 0
    dropout: float = 0.0
    metric: str = ""
    more_metrics: tuple[str, ...] = ()

    door: ClassVar[str] = "task"
    # The level of the outputs: "example" (f32[R, S, O]), "token" (f32[R, T, O]), or "target" (f32[R, U, O], the tokens of
    # target texts, which are the labels).
    level: ClassVar[str] = "example"
    # The numpy dtype of labels: integers, or floats.
    dtype: ClassVar[type[np.generic]] = np.int32
    # How transfer.divergence compares two models' outputs: "softmax", "sigmoid", "number", or "" where it cannot.
    compared_as: ClassVar[str] = ""
    # The advice on texts that occur in several rows with different labels; the first row counts.
    conflict_advice: ClassVar[str] = (
        "only the first row of a text is learned from; correct the labels, or give each text one row"
    )

    @property
    def label_level(self) -> str:
        """The level of the labels: "example", "word" (the text is then read as words), "token" or "target"."""
        return self.level

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of Encoded that the head reads."""
        return {"example": (self.text_vector,), "token": ("tokens",), "target": ("tokens", "table")}[self.level]

    @property
    def text_vector(self) -> str:
        """The field of Encoded that a head over texts reads: one of models.trunk_output.TEXT_VECTORS."""
        return "pooled"

    @property
    def missing(self) -> float:
        """The value of a label that does not exist."""
        return -1 if np.issubdtype(self.dtype, np.integer) else math.nan

    @property
    def words(self) -> bool:
        """Whether the text is read as words."""
        return self.label_level == "word"

    @property
    def windows(self) -> bool:
        """Whether a row that is too long becomes several windows; else it is cut, and counted.

        Where another task of the source asks for windows, a task that does not reads the first one.
        """
        return self.level == "token"

    @property
    def needs_offsets(self) -> bool:
        """Whether windows carry the positions of their tokens in the text: an example's label then points at tokens."""
        return self.level == "token" and self.label_level == "example"

    @property
    def shift_free(self) -> bool:
        """Whether the loss compares tokens: a vector added to all of them changes nothing.

        The gradient over a representation is then always 0.
        """
        return self.level == "token" and self.label_level == "example"

    @property
    def decodes(self) -> bool:
        """Whether the head is a decoder: it may start as a checkpoint's, and is evaluated by generated texts."""
        return self.level == "target"

    @property
    def large(self) -> bool:
        """Whether the head is so expensive that it gets only its source's rows: true if it reads the token table."""
        return "table" in self.needs

    @property
    def is_linen(self) -> bool:
        """Whether apply() hands the head's parameters to a linen module and reads none itself.

        Parameters that are cut over devices are then gathered one layer at a time (Experiment.sharding).
        """
        return False

    @property
    def begins_as_classifier(self) -> bool:
        """Whether the head begins as the text classifier of the trunk's checkpoint, where that has one."""
        return False

    @property
    def generates(self) -> bool:
        """Whether evaluations generate texts for the task's metrics; only for a head that is a decoder."""
        return self.decodes

    @property
    def scores_texts(self) -> bool:
        """Whether the main metric compares generated texts with those of the rows."""
        return False

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics that can be the main one; higher is better."""
        return (self.metric,) if self.metric else ()

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """O, how many numbers the head computes for each example or token."""

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one label."""
        return ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set; empty where labels have no names."""
        return ()

    @functools.cached_property
    def shown_labels(self) -> tuple[str, ...]:
        """The label set in the names of the field label_names, for a kind that has it; else as it is."""
        return shown_labels(self.labels, getattr(self, "label_names", {}))

    @functools.cached_property
    def index_of(self) -> dict[str, int]:
        """The index of each label in the label set."""
        return {label: index for index, label in enumerate(self.labels)}

    @property
    def stride(self) -> int:
        """Tokens that consecutive windows of a row share."""
        return 0

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns with texts, in addition to the source's, that a vocabulary must cover."""
        return ()

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Other columns that the model reads beside the source's texts, such as those of a prompt."""
        return ()

    @property
    def unit_size(self) -> int:
        """The most examples that the loss compares with each other, and that therefore share a row of a batch; 1: none.

        Each of their texts then has 1 / unit_size of a row's tokens, and is cut there.
        """
        return 1

    @property
    def several_texts(self) -> bool:
        """Whether a row is read as several examples, those of texts_of(); they stay together."""
        return False

    @property
    def whole_batch(self) -> bool:
        """Whether the loss compares examples of different rows of a batch, so that it is not a sum over rows."""
        return False

    @property
    def compares_examples(self) -> bool:
        """Whether the loss compares examples with each other, so that a single one has none of its own."""
        return self.unit_size > 1 or self.whole_batch

    @property
    def target_length(self) -> int:
        """Most tokens of a target text."""
        return 0

    @property
    def leading(self) -> int:
        """Special tokens in front of a target text that are not learned."""
        return 0

    @property
    def languages(self) -> tuple[str, str]:
        """Codes of the languages of texts and target texts, with which the tokenizer marks them; "" for its own."""
        return "", ""
