"""Tagging: a label for each word. Entities as BIO tags, or any other label set, such as parts of speech."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np

from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row, odd_blank
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.tasks import bio
from mtl_jax.tasks.base import PerExample, Task
from mtl_jax.tasks.label_names import LabelNames, named
from mtl_jax.tasks.losses import MISSING, balanced_weights, check_weights, cross_entropy
from mtl_jax.tasks.reading import column
from mtl_jax.tasks.row_statistics import RowStatistics, by_row

ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")
NO_ENTITY = "is neither O nor B-X nor I-X, as tags of entities are"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tagging(Task):
    """One of a set of labels for each word of a text.

    The first sub-word of a word has the word's label; the others have none. A text longer than a row is read in several windows
    of whole words, and its words are joined again for metrics and predictions. A word without any token, such as a control
    character, is predicted as "O"; if there is no such label it has no prediction, which counts as wrong. Such words are
    counted when the data is read.

    A label set is one of entities if every label is O, B-something or I-something. Then the best valid sequence is predicted,
    in which I-X follows only B-X or I-X, and metrics count entities. Otherwise the best label of each word is predicted. Where
    the label set comes from the data, a single B-something or I-something makes the tags entities, and a tag of another form is
    an error; they are plain tags only if metric is token_accuracy, or if the labels are given.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source with a label for each word: a list, or text with spaces between the labels.
        text: The column with the words, the source's text: a list, or text with spaces between the words.
        labels: The label set in order; empty: all labels of the training file, sorted, and B-X for every I-X.
        label_names: The names of labels that people read, {label: name}, in predictions, logs, reports and exports; or the
            path of a file with them: a JSON object, or lines with a label, a tab and its name. In a label set of
            entities, the name of X is also that of B-X and I-X.
        unlabelled: The values that mean "no label". Such words count neither in loss nor metrics; nor do rows without labels.
        repair: Whether an I-X that follows neither B-X nor I-X is read as B-X, and counted; else it is an error.
        balanced: Whether a word's loss counts n / (K n_c): n_c of n training words have its label, K labels occur there.
        class_weights: How much a word's loss counts, by its label; 1 for labels that are not named.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        metric: The main metric: entity_f1, entity_precision, entity_recall or token_accuracy. Empty: the
            first of them for entities, else the last.

    Examples:
        >>> task = mtl_jax.Tagging(name="entities", source="sentences", column="tags")
    """

    column: str = "tags"
    text: str = "text"
    labels: tuple[str, ...] = ()
    label_names: LabelNames = dataclasses.field(default_factory=dict, metadata=ONLY_IF_SET)
    unlabelled: tuple[str, ...] = ("", "_")
    repair: bool = False
    balanced: bool = False
    class_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    metric: str = ""

    level: ClassVar[str] = "token"
    label_level: ClassVar[str] = "word"
    compared_as: ClassVar[str] = "softmax"

    @property
    def metric_names(self) -> tuple[str, ...]:
        entities = not self.labels or bio.is_bio(self.labels)
        return (*ENTITY_METRICS, "token_accuracy") if entities else ("token_accuracy",)

    @property
    def outputs(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def _entities(self) -> bool:
        """Whether the labels are BIO tags of entities."""
        return bio.is_bio(self.labels)

    @property
    def _plain(self) -> list[str]:
        """The labels that are not BIO tags."""
        return [label for label in self.labels if not bio.is_tag(label)]

    def check(self) -> None:
        if self.metric in ENTITY_METRICS and self._plain:
            label = self._plain[0]
            raise UserError(f"task {self.name!r}: metric is {self.metric}, and label {label!r} {NO_ENTITY}; correct either")
        # An empty metric is chosen with the label set.
        super(Tagging, self if self.metric else dataclasses.replace(self, metric="token_accuracy")).check()
        if len(set(self.labels)) != len(self.labels):
            raise UserError(f"task {self.name!r}: its label set has a label twice")
        if bio.is_bio(self.labels):
            for label in self.labels:
                if label.startswith("I-") and f"B-{label[2:]}" not in self.index_of:
                    raise UserError(
                        f"task {self.name!r}: the label set has {label} and lacks B-{label[2:]}, which must precede it"
                    )
        check_weights(self.name, self.balanced, self.class_weights, self.labels)

    def check_source(self, source: Source) -> None:
        if self.text != source.text:
            raise UserError(
                f"task {self.name!r}: text is {self.text!r}, but the text of source {source.name!r} is {source.text!r}"
            )
        if source.pair:
            raise UserError(f"task {self.name!r}: source {source.name!r} has pairs; only words of a single text can be tagged")

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        labels = self.labels
        if not labels:
            tags = {tag for row in rows for tag in self._tags(row) or () if tag is not None}
            if self.metric in ENTITY_METRICS or (not self.metric and bio.has_entities(tags)):
                tags = {tag for tag in tags if bio.is_tag(tag)}  # parse() refuses the others, and names their lines
            if bio.is_bio(tuple(tags)):
                tags |= {f"B-{tag[2:]}" for tag in tags if tag.startswith("I-")}
            labels = tuple(sorted(tags))
        metric = self.metric or ("entity_f1" if bio.is_bio(labels) else "token_accuracy")
        task = dataclasses.replace(self, labels=labels, metric=metric)
        task.check()
        return named(task)

    def fitted(self, train: Examples) -> Self:
        if not self.balanced:
            return self
        labels_N = np.concatenate([np.zeros(0, self.dtype), *train.labels[self.name]])
        return dataclasses.replace(self, class_weights=balanced_weights(labels_N, self.labels))

    def remarks(self, parts: Sequence[Examples]) -> list[str]:
        rows = [row for part in parts for row in part.data]
        words = sum(len(self._words(row)) for row in rows)
        with_token = sum(int((words_T >= 0).sum()) for part in parts for words_T in part.words or ())
        repaired = sum(len(bio.invalid_tags(self.raw_label(row) or ())) for row in rows) if self.repair else 0
        lines = [f"{count(repaired, 'tag')} I-X without B-X or I-X in front read as B-X"] if repaired else []
        if self._plain and bio.has_entities(self.labels):
            lines.append(f"its tags are read as plain ones, not as entities: {self._plain[0]!r} is neither O nor B-X nor I-X")
        if lost := words - with_token:
            counted = "is outside of every entity" if "O" in self.labels else "counts as wrong"
            share = f"{lost:,} of {count(words, 'word')} {'has' if lost == 1 else 'have'} no token"
            lines.append(f"{share}; such a word is not learned from and {counted}")
        return lines

    def parse(self, row: Row) -> np.ndarray | None:
        """i32[words], indices into the label set, -1 where a word has no label."""
        tags, words = self._tags(row), self._words(row)
        if tags is None:
            return None
        if len(tags) != len(words):
            counts = f"{count(len(words), 'word')} and {count(len(tags), 'tag')}; there must be one for each word"
            raise ValueError(counts + self._odd_blanks(row))
        for number, (word, tag) in enumerate(zip(words, tags, strict=True)):
            if tag is not None and tag not in self.index_of:
                raise self._wrong(row, number, word, tag, self._why_unknown(tag))
        if self._entities:
            for number in bio.invalid_tags(tags):
                why = "follows neither B nor I of its type; correct it, or set repair to read it as B"
                raise self._wrong(row, number, words[number], tags[number], why)
        label_L = np.array([MISSING if tag is None else self.index_of[tag] for tag in tags], self.dtype)
        return label_L if (label_L != MISSING).any() else None

    def window_label(self, label: np.ndarray | None, window: Window) -> np.ndarray:
        label_T = np.full(len(window.tokens), self.missing, self.dtype)
        if label is not None:
            words_T = _words_of(window)
            label_T[words_T >= 0] = label[words_T[words_T >= 0]]
        return label_T

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats: sum over labelled words, and their number."""
        return cross_entropy(outputs, labels, self.labels, self.class_weights)

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        """The share of labelled words predicted right; for entities also precision, recall and F1, each a share of 1.

        A word that is not labelled counts as outside of every entity, in truth and in prediction.
        """
        gold, predicted = self._gold_and_predicted(outputs, examples)
        gold_N, predicted_N = (np.concatenate([np.zeros(0, self.dtype), *arrays]) for arrays in (gold, predicted))
        scores = {"token_accuracy": float((gold_N == predicted_N)[gold_N != MISSING].mean()) if gold else 0.0}
        if bio.is_bio(self.labels):
            entity_scores, _ = bio.entity_scores(
                [self._tagged(x, "O") for x in gold], [self._tagged(x, "O") for x in predicted]
            )
            scores |= {f"entity_{name}": value for name, value in entity_scores._asdict().items()}
        return scores

    def compared(self, outputs: PerExample, examples: Examples) -> tuple[Any, Any]:
        gold, predicted = self._gold_and_predicted(outputs, examples)
        known = [row != MISSING for row in gold]
        tags_of = [
            [self._tagged(row[known_L], None) for row, known_L in zip(rows, known, strict=True)] for rows in (predicted, gold)
        ]
        return tags_of[0], tags_of[1]

    def _gold_and_predicted(self, outputs: PerExample, examples: Examples) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each row with a label i32[words], its labels and the predicted ones, MISSING at words without a label."""
        assert examples.words is not None
        gold, predicted = [], []
        for group in examples.groups():
            gold_L = self.parse(examples.data[examples.row_of[group[0]]])
            if gold_L is not None:
                predicted_L = self._decode([outputs[i] for i in group], [examples.words[i] for i in group], len(gold_L))
                gold.append(gold_L)
                predicted.append(np.where(gold_L != MISSING, predicted_L, MISSING))
        return gold, predicted

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics:
        gold, predicted = self._gold_and_predicted(outputs, examples)
        rows = [
            row for group in examples.groups() if self.parse(examples.data[row := int(examples.row_of[group[0]])]) is not None
        ]
        if self.metric == "token_accuracy":
            known = [row_L != MISSING for row_L in gold]
            right = [(a == b)[known_L].sum() for a, b, known_L in zip(gold, predicted, known, strict=True)]
            counts = np.array([right, [known_L.sum() for known_L in known]], np.float64).T
            return by_row(RowStatistics(counts.reshape(-1, 2), "mean"), rows, len(examples.data))
        counts = bio.entity_counts([self._tagged(x, "O") for x in gold], [self._tagged(x, "O") for x in predicted])
        return by_row(RowStatistics(counts, self.metric.removeprefix("entity_")), rows, len(examples.data))

    def constant(self, train: Examples, test: Examples) -> PerExample:
        labels_N = np.concatenate([np.zeros(0, self.dtype), *train.labels[self.name]])
        counts_O = np.bincount(labels_N[labels_N != self.missing], minlength=self.outputs)
        # Half a word is added to each, so that a label without any is unlikely, not impossible.
        prior_O = np.log(counts_O + 0.5).astype(np.float32)
        return [np.tile(prior_O, (len(ids), 1)) for ids in test.tokens]

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        """The row's words, a tag for each (null where it has none), and entities: type, first word, word after the last."""
        words = self._words(row)
        predicted_L = self._decode(outputs, [_words_of(window) for window in windows], len(words))
        result: dict[str, Any] = {"words": words, "tags": self._tagged(predicted_L, None, self.shown_labels)}
        if bio.is_bio(self.labels):
            result["entities"] = [
                {**entity._asdict(), "type": self._shown_type(entity.type), "text": " ".join(words[entity.start : entity.end])}
                for entity in bio.entities(self._tagged(predicted_L, "O"))
            ]
        return result

    def _why_unknown(self, tag: str) -> str:
        """The reason why a tag that is not in the label set is refused."""
        labels = listed(self.labels) if self.labels else "there is none"
        if bio.is_tag(tag) or not (bio.is_bio(self.labels) or self.metric in ENTITY_METRICS):
            return f"is not in the label set ({labels})"
        plain = "if they are plain tags, leave labels empty and set metric to token_accuracy"
        return f"{NO_ENTITY} ({labels}); correct it, or, {plain}"

    def _wrong(self, row: Row, number: int, word: str, tag: str | None, why: str) -> UserError:
        """The error for the tag of one word, counted from 0; it names the word's line where each word has one."""
        return UserError(
            f"{row.where_word(number)}: task {self.name!r}: tag {quoted(tag)} of word {number + 1}, {quoted(word)}, {why}"
        )

    def _odd_blanks(self, row: Row) -> str:
        """A clause on blanks that look like a space and divide words like one; "" where there are none."""
        for name in (self.text, self.column):
            text = row.columns[name]
            if isinstance(text, str) and (blank := odd_blank(text)):
                return f" (the blank {blank} in column {name!r} divides like a space: replace it, or give a list)"
        return ""

    def _words(self, row: Row) -> list[str]:
        words = column(row, self.text, self)
        return words.split() if isinstance(words, str) else words

    def raw_label(self, row: Row) -> list[str | None] | None:
        """The tags as the file has them, None for a word without one; None where the row has none."""
        tags = column(row, self.column, self)
        if isinstance(tags, str):
            tags = None if tags.strip() in self.unlabelled else tags.split()
        return None if tags is None else [None if tag in self.unlabelled else tag for tag in tags]

    def _tags(self, row: Row) -> list[str | None] | None:
        """The tags of a row, repaired if the task says so."""
        tags = self.raw_label(row)
        return bio.repaired(tags) if tags is not None and self.repair else tags

    def _decode(self, outputs: Sequence[np.ndarray], words: Sequence[np.ndarray], length: int) -> np.ndarray:
        """i64[length], the predicted label of each word of a row, from the outputs of its windows.

        Args:
            outputs: For each window f32[len, O].
            words: For each window i32[len], as in Window.
            length: Number of words.
        """
        scores_LxO = np.zeros((length, self.outputs), np.float32)
        has_token_L = np.zeros(length, bool)
        for outputs_TxO, words_T in zip(outputs, words, strict=True):
            first_T = words_T >= 0
            scores_LxO[words_T[first_T]] = outputs_TxO[first_T]
            has_token_L[words_T[first_T]] = True
        predicted_L = np.full(length, self.labels.index("O") if "O" in self.labels else MISSING)
        # Words are decoded between those without a token: no entity continues across such a word.
        for start, end in np.flatnonzero(np.diff(has_token_L, prepend=False, append=False)).reshape(-1, 2):
            predicted_L[start:end] = bio.decode(scores_LxO[start:end], self.labels)
        return predicted_L

    def _tagged(self, labels_L: np.ndarray, missing: str | None, labels: Sequence[str] | None = None) -> list[Any]:
        names = (*(labels or self.labels), missing)  # -1 is the last
        return [names[label] for label in labels_L.tolist()]

    def _shown_type(self, type: str) -> str:
        """The name of an entity's type: that of B-type, without the B."""
        return self.shown_labels[self.index_of[f"B-{type}"]].removeprefix("B-")


def _words_of(window: Window) -> np.ndarray:
    assert window.words is not None, "the text was not read as words"
    return window.words
