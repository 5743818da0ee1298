"""Tagging: a label for each word. Entities as BIO tags, or any other label set, such as parts of speech."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np

from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.core.files import shown
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row, odd_blank
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.tasks import bio
from mtl_jax.tasks.base import PerExample, Task, column
from mtl_jax.tasks.losses import MISSING, balanced_weights, check_weights, cross_entropy

ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")
NO_ENTITY = "is neither O nor B-X nor I-X, as tags of entities are"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tagging(Task):
    """One of a set of labels for each word of a text.

    A word's label stands on its first sub-word; the others have none. A text that is longer than a row is read in several
    windows of whole words, and its words are put together again for metrics and predictions. A word without any token, such as
    a control character, is predicted as "O", or where there is no such label as nothing, which is never right; such words are
    counted when the data is read.

    A label set is taken for entities where every label is O, B-something or I-something. Then the best valid sequence is
    predicted, in which I-X follows only B-X or I-X, and metrics count entities; else the best label of each word. Among found
    labels one B-something or I-something is enough, and a tag of another form is a mistake: they are plain tags only if metric
    is token_accuracy, or if the labels are given.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source that holds a label for each word: a list, or text with spaces between the labels.
        text: The column that holds the words, the source's text: a list, or text with spaces between the words.
        labels: The label set in order; empty means every label found in the training file, sorted, and B-X for every I-X.
        unlabelled: What is written where a word has no label. Such words count neither in loss nor metrics; nor do rows without
            labels.
        repair: Whether an I-X that follows neither B-X nor I-X is read as B-X, and counted; else it is an error.
        balanced: Whether a word's loss counts n / (K n_c): n_c of n training words have its label, K labels occur there.
        class_weights: How much a word's loss counts, by its label; 1 for labels that are not named.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        metric: The metric that stands for the task: entity_f1, entity_precision, entity_recall or token_accuracy. Empty: the
            first of them for entities, else the last.
    """

    column: str = "tags"
    text: str = "text"
    labels: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ("", "_")
    repair: bool = False
    balanced: bool = False
    class_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    metric: str = ""

    level: ClassVar[str] = "token"
    label_level: ClassVar[str] = "token"
    words: ClassVar[bool] = True
    compared_as: ClassVar[str] = "softmax"
    windows: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("tokens",)

    @property
    def metric_names(self) -> tuple[str, ...]:
        entities = not self.labels or bio.is_bio(self.labels)
        return (*ENTITY_METRICS, "token_accuracy") if entities else ("token_accuracy",)

    @property
    def outputs(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def _entities(self) -> bool:
        """Whether the label set is one of entities."""
        return bio.is_bio(self.labels)

    @property
    def _plain(self) -> list[str]:
        """The labels that are not of entities."""
        return [label for label in self.labels if not bio.is_tag(label)]

    def check(self) -> None:
        if self.metric in ENTITY_METRICS and self._plain:
            label = self._plain[0]
            raise UserError(f"task {self.name!r}: metric is {self.metric}, and label {label!r} {NO_ENTITY}; correct either")
        # Which metric an empty one stands for is known with the label set.
        super(Tagging, self if self.metric else dataclasses.replace(self, metric="token_accuracy")).check()
        if len(set(self.labels)) != len(self.labels):
            raise UserError(f"task {self.name!r}: a label stands twice in its label set")
        if bio.is_bio(self.labels):
            for label in self.labels:
                if label.startswith("I-") and f"B-{label[2:]}" not in self.place_of:
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
            found = {tag for row in rows for tag in self._tags(row) or () if tag is not None}
            if self.metric in ENTITY_METRICS or (not self.metric and bio.has_entities(found)):
                found = {tag for tag in found if bio.is_tag(tag)}  # parse() refuses the others, with their places
            if bio.is_bio(tuple(found)):
                found |= {f"B-{tag[2:]}" for tag in found if tag.startswith("I-")}
            labels = tuple(sorted(found))
        metric = self.metric or ("entity_f1" if bio.is_bio(labels) else "token_accuracy")
        task = dataclasses.replace(self, labels=labels, metric=metric)
        task.check()
        return task

    def fitted(self, train: Examples) -> Self:
        if not self.balanced:
            return self
        labels_N = np.concatenate([np.zeros(0, self.dtype), *train.labels[self.name]])
        return dataclasses.replace(self, class_weights=balanced_weights(labels_N, self.labels))

    def remarks(self, parts: Sequence[Examples]) -> list[str]:
        rows = [row for part in parts for row in part.data]
        words = sum(len(self._words(row)) for row in rows)
        read = sum(int((at_L >= 0).sum()) for part in parts for at_L in part.words or ())
        broken = sum(len(bio.breaks(self.written(row) or ())) for row in rows) if self.repair else 0
        lines = [f"{count(broken, 'tag')} I-X without B-X or I-X in front read as B-X"] if broken else []
        if self._plain and bio.has_entities(self.labels):
            lines.append(f"its tags are read as plain ones, not as entities: {self._plain[0]!r} is neither O nor B-X nor I-X")
        if read < words:
            counted = "is outside of every entity" if "O" in self.labels else "counts as wrong"
            lost = f"{words - read:,} of {count(words, 'word')} {'has' if words - read == 1 else 'have'} no token"
            lines.append(f"{lost}; such a word teaches nothing and {counted}")
        return lines

    def parse(self, row: Row) -> np.ndarray | None:
        """i32[words], places in the label set, -1 where a word has no label."""
        tags, words = self._tags(row), self._words(row)
        if tags is None:
            return None
        if len(tags) != len(words):
            counts = f"{count(len(words), 'word')} and {count(len(tags), 'tag')}; there must be one for each word"
            raise ValueError(counts + self._divided(row))
        for number, (word, tag) in enumerate(zip(words, tags, strict=True)):
            if tag is not None and tag not in self.place_of:
                raise self._wrong(row, number, word, tag, self._why_unknown(tag))
        if self._entities:
            for place in bio.breaks(tags):
                why = "follows neither B nor I of its type; correct it, or set repair to read it as B"
                raise self._wrong(row, place, words[place], tags[place], why)
        label_L = np.array([MISSING if tag is None else self.place_of[tag] for tag in tags], self.dtype)
        return label_L if (label_L != MISSING).any() else None

    def place(self, label: np.ndarray | None, window: Window) -> np.ndarray:
        placed = np.full(len(window.tokens), self.missing, self.dtype)
        if label is not None:
            words = _words_of(window)
            placed[words >= 0] = label[words[words >= 0]]
        return placed

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats: sum over labelled words, and their number."""
        return cross_entropy(outputs, labels, self.labels, self.class_weights)

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        """Share of the labelled words that are right; for entities also precision, recall and F1, each a share of 1.

        A word that is not labelled counts as outside of every entity, in truth and in prediction.
        """
        assert examples.words is not None
        gold, predicted = [], []
        for group in examples.groups():
            gold_L = self.parse(examples.data[examples.row_of[group[0]]])
            if gold_L is not None:
                known_L = gold_L != MISSING
                found_L = self._decode([outputs[i] for i in group], [examples.words[i] for i in group], len(gold_L))
                gold.append(gold_L)
                # Beside the prediction that fails to be there, one that is not asked for.
                predicted.append(np.where(known_L, found_L, MISSING))
        gold_N, predicted_N = (np.concatenate([np.zeros(0, self.dtype), *arrays]) for arrays in (gold, predicted))
        scores = {"token_accuracy": float((gold_N == predicted_N)[gold_N != MISSING].mean()) if gold else 0.0}
        if bio.is_bio(self.labels):
            of_all, _ = bio.entity_scores([self._tagged(x, "O") for x in gold], [self._tagged(x, "O") for x in predicted])
            scores |= {f"entity_{name}": value for name, value in of_all._asdict().items()}
        return scores

    def constant(self, train: Examples, test: Examples) -> PerExample:
        labels_N = np.concatenate([np.zeros(0, self.dtype), *train.labels[self.name]])
        counts_O = np.bincount(labels_N[labels_N != self.missing], minlength=self.outputs)
        # Half a word more of each, so that a label that train lacks is unlikely, not impossible.
        prior_O = np.log(counts_O + 0.5).astype(np.float32)
        return [np.tile(prior_O, (len(ids), 1)) for ids in test.tokens]

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        """The row's words, a tag for each (null where there is none), and entities: type, first word, word past the last."""
        words = self._words(row)
        found_L = self._decode(outputs, [_words_of(window) for window in windows], len(words))
        result: dict[str, Any] = {"words": words, "tags": self._tagged(found_L, None)}
        if bio.is_bio(self.labels):
            result["entities"] = [
                {**entity._asdict(), "text": " ".join(words[entity.start : entity.end])}
                for entity in bio.entities(self._tagged(found_L, "O"))
            ]
        return result

    def _why_unknown(self, tag: str) -> str:
        """What is wrong with a tag that is not in the label set."""
        labels = listed(self.labels) if self.labels else "there is none"
        if bio.is_tag(tag) or not (bio.is_bio(self.labels) or self.metric in ENTITY_METRICS):
            return f"is not in the label set ({labels})"
        plain = "if they are plain tags, leave labels empty and set metric to token_accuracy"
        return f"{NO_ENTITY} ({labels}); correct it, or, {plain}"

    def _wrong(self, row: Row, place: int, word: str, tag: str | None, why: str) -> UserError:
        """The error for the tag of one word, counted from 0; it names the word's own line, where it has one."""
        return UserError(
            f"{row.where_word(place)}: task {self.name!r}: tag {shown(repr(tag))} of word {place + 1}, {shown(word)!r}, {why}"
        )

    def _divided(self, row: Row) -> str:
        """A clause on blanks other than the space, which divide words too and look like it; "" where there are none."""
        for name in (self.text, self.column):
            text = row.columns[name]
            if isinstance(text, str) and (blank := odd_blank(text)):
                return f" (the blank {blank} in column {name!r} divides like a space: replace it, or give a list)"
        return ""

    def _words(self, row: Row) -> list[str]:
        words = column(row, self.text, self)
        return words.split() if isinstance(words, str) else words

    def written(self, row: Row) -> list[str | None] | None:
        """The tags as they are written, None for those that are unlabelled; None where the row has none."""
        written = column(row, self.column, self)
        if isinstance(written, str):
            written = None if written.strip() in self.unlabelled else written.split()
        return None if written is None else [None if tag in self.unlabelled else tag for tag in written]

    def _tags(self, row: Row) -> list[str | None] | None:
        """The tags as they are read: repaired, where that is asked for."""
        written = self.written(row)
        return bio.repaired(written) if written is not None and self.repair else written

    def _decode(self, outputs: Sequence[np.ndarray], words: Sequence[np.ndarray], length: int) -> np.ndarray:
        """i64[length], the predicted label of each word of a row, from the outputs of its windows.

        Args:
            outputs: For each window f32[len, O].
            words: For each window i32[len], as in Window.
            length: Number of words.
        """
        scores_LxO = np.zeros((length, self.outputs), np.float32)
        read_L = np.zeros(length, bool)
        for outputs_TxO, words_T in zip(outputs, words, strict=True):
            first_T = words_T >= 0
            scores_LxO[words_T[first_T]] = outputs_TxO[first_T]
            read_L[words_T[first_T]] = True
        found_L = np.full(length, self.labels.index("O") if "O" in self.labels else MISSING)
        # Stretches of words between those without a token: nothing goes on across such a word.
        for start, end in np.flatnonzero(np.diff(read_L, prepend=False, append=False)).reshape(-1, 2):
            found_L[start:end] = bio.decode(scores_LxO[start:end], self.labels)
        return found_L

    def _tagged(self, labels_L: np.ndarray, missing: str | None) -> list[Any]:
        names = (*self.labels, missing)  # -1 is the last
        return [names[label] for label in labels_L.tolist()]


def _words_of(window: Window) -> np.ndarray:
    assert window.words is not None, "a text given as words"
    return window.words
