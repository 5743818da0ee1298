"""Extractive answers: the span of a context that answers a question, as in SQuAD; exact match and F1.

Shapes in names: R rows, T tokens a row, S windows a row.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.coverage import NOTED
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.tasks import metrics
from mtl_jax.tasks.base import Task
from mtl_jax.tasks.reading import column
from mtl_jax.tasks.row_statistics import RowStatistics, by_row, shares


class Gold(NamedTuple):
    """The gold answer for training: its first character in the context, and its text, "" if there is no answer."""

    start: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span(Task):
    """The answer to each row's question, a span of its context, or none.

    The source has the question in `Source.text` and the context in `Source.pair`. A long context is divided into overlapping
    windows. A window without the whole answer is labelled "no answer", and the best span of all windows is predicted. Training
    uses the first gold answer, evaluation all of them.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source with the gold answers. None means that they are not known, an empty list that there is
            no answer.
        context: The column with the context.
        stride: Tokens that consecutive windows of a long context share.
        max_answer: Most tokens of a predicted answer.
        no_answer_threshold: "No answer" is predicted where its score exceeds the best span's by more than this; inf: never.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        metric: The main metric: f1 or exact.

    Examples:
        >>> task = mtl_jax.Span(name="answer", source="questions")
    """

    column: str = "answers"
    context: str = "context"
    stride: int = 64
    max_answer: int = 30
    no_answer_threshold: float = 0.0
    metric: str = "f1"

    metric_names: ClassVar[tuple[str, ...]] = ("f1", "exact")
    level: ClassVar[str] = "token"
    label_level: ClassVar[str] = "example"
    outputs: ClassVar[int] = 2
    # Tokens of the window: the answer's first and last, both 0 for no answer; the context's first, and the one after its last.
    label_shape: ClassVar[tuple[int, ...]] = (4,)

    def check(self) -> None:
        super().check()
        if self.max_answer < 1:
            raise UserError(f"task {self.name!r}: max_answer is {self.max_answer}; it must be at least 1")
        if self.stride < 0:
            raise UserError(f"task {self.name!r}: stride is {self.stride}; it must not be negative")
        if math.isnan(self.no_answer_threshold):
            raise UserError(f"task {self.name!r}: no_answer_threshold is not a number")

    def check_source(self, source: Source) -> None:
        if self.context != source.pair:
            raise UserError(
                f"task {self.name!r}: context is {self.context!r}, but the second text of source {source.name!r} (pair) is "
                f"{source.pair!r}"
            )

    def parse(self, row: Row) -> Gold | None:
        context, gold = column(row, self.context, self), column(row, self.column, self)
        if gold is None:
            return None
        if not isinstance(gold, list) or not all(isinstance(answer, dict) for answer in gold):
            raise ValueError(f"column {self.column!r} has {quoted(gold)}; a list of answers with text and start is needed")
        for answer in gold:
            text, start = answer["text"], answer["start"]
            if not text.strip():
                raise ValueError("an answer is empty")
            if start < 0 or context[start : start + len(text)] != text:
                raise ValueError(f"the answer {quoted(text)} is not at character {start} of its context")
        if not gold:
            return Gold(0, "")
        text = gold[0]["text"]
        return Gold(gold[0]["start"] + len(text) - len(text.lstrip()), text.strip())

    def remarks(self, parts: Sequence[Examples]) -> list[str]:
        answers = lost = inside_tokens = 0
        for part in parts:
            labels, row_of = part.labels[self.name], part.row_of
            for group in part.groups():
                row = part.data[row_of[group[0]]]
                if not column(row, self.column, self):
                    continue
                answers += 1
                whole = group.start + np.flatnonzero(labels[group.start : group.stop, 1] > 0)
                lost += not len(whole)
                inside_tokens += bool(len(whole)) and self._cuts_tokens(
                    row, labels[whole[0]], part.window(whole[0], group.start)
                )
        lines = [f"{count(lost, 'answer is', 'answers are')} in no window as a whole: learned as no answer"] if lost else []
        if inside_tokens and inside_tokens >= NOTED * answers:
            share = f"{inside_tokens} of {answers} answers ({100 * inside_tokens / answers:.1f} %)"
            lines.append(f"{share} begin or end inside a token: predictions are whole tokens")
        return lines

    def _cuts_tokens(self, row: Row, label_4: np.ndarray, window: Window) -> bool:
        """Whether the answer begins or ends inside a token of its window."""
        gold, context = self.parse(row), column(row, self.context, self)
        assert gold is not None
        assert window.offsets is not None
        first, last = int(window.offsets[label_4[0], 0]), int(window.offsets[label_4[1], 1])
        return not _without_token(context[first : gold.start] + context[gold.start + len(gold.text) : last])

    def window_label(self, label: Gold | None, window: Window) -> np.ndarray:
        assert window.offsets is not None
        if label is None:
            return np.full(4, self.missing, self.dtype)
        inside = np.flatnonzero(window.offsets[:, 0] >= 0)
        if not len(inside):
            return np.zeros(4, self.dtype)
        start, end = _tokens(label, window.offsets)
        return np.array([start, end, inside[0], inside[-1] + 1], self.dtype)

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Mean of the cross-entropies of start and end, in nats: sum over labelled windows, and their number.

        The softmax is over the context tokens and the first token of the label's window.

        Args:
            outputs: f32[R, T, 2].
            labels: i32[R, S, 4].
            batch: Its segments and positions tell the tokens of each window.
        """
        known_RxS = labels[..., 0] != self.missing
        member_RxSxT = batch.segments[:, None, :] == jnp.arange(1, labels.shape[1] + 1)[None, :, None]
        position_Rx1xT = batch.positions[:, None, :]
        context_RxSxT = (position_Rx1xT >= labels[..., 2:3]) & (position_Rx1xT < labels[..., 3:4])
        allowed_RxSxT = member_RxSxT & known_RxS[..., None] & (context_RxSxT | (position_Rx1xT == 0))

        def cross_entropy(logits_RxT: jax.Array, index_RxS: jax.Array) -> jax.Array:
            logits_Rx1xT = logits_RxT.astype(jnp.float32)[:, None, :]
            target_RxSxT = member_RxSxT & (position_Rx1xT == index_RxS[..., None])
            # Finite, so that a slot without a window gives no NaN; exp of it is 0.
            total_RxS = jax.nn.logsumexp(jnp.where(allowed_RxSxT, logits_Rx1xT, -1e30), axis=-1)
            return total_RxS - jnp.where(target_RxSxT, logits_Rx1xT, 0.0).sum(axis=-1)

        start_RxS, end_RxS = (cross_entropy(outputs[..., i], labels[..., i]) for i in (0, 1))
        total = jnp.where(known_RxS, (start_RxS + end_RxS) / 2, 0.0).sum()
        return total, known_RxS.sum().astype(jnp.float32)

    def metrics(self, outputs: Sequence[np.ndarray] | np.ndarray, examples: Examples) -> dict[str, float]:
        """Exact match and F1, the best over the gold answers, mean over the rows whose answers are known; shares of 1."""
        return metrics.answer_scores(*self.compared(outputs, examples))

    def row_statistics(self, outputs: Sequence[np.ndarray] | np.ndarray, examples: Examples) -> RowStatistics:
        score = metrics.f1 if self.metric == "f1" else metrics.exact
        values = [score(answer, gold) for answer, gold in zip(*self.compared(outputs, examples), strict=True)]
        rows = [int(examples.row_of[group[0]]) for group in examples.groups()]
        known = [row for row in rows if column(examples.data[row], self.column, self) is not None]
        return by_row(RowStatistics(shares(values), "mean"), known, len(examples.data))

    def compared(self, outputs: Sequence[np.ndarray] | np.ndarray, examples: Examples) -> tuple[list[str], list[list[str]]]:
        assert examples.offsets is not None
        predicted, gold = [], []
        for windows in examples.groups():
            row = examples.data[examples.row_of[windows[0]]]
            known = column(row, self.column, self)
            if known is not None:
                logits, offsets = [outputs[i] for i in windows], [examples.offsets[i] for i in windows]
                predicted.append(self._answer(logits, offsets, row)["answer"])
                gold.append([answer["text"] for answer in known])
        return predicted, gold

    def constant(self, train: Examples, test: Examples) -> Sequence[np.ndarray]:
        """No answer for every row."""
        return [np.concatenate([np.full((1, 2), 1e4), np.zeros((len(ids) - 1, 2))]).astype(np.float32) for ids in test.tokens]

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        """The answer as in the context, "" for none; its characters start to end; its score, and that of no answer."""
        offsets = [window.offsets for window in windows if window.offsets is not None]
        return self._answer(outputs, offsets, row)

    def _answer(self, logits: Sequence[np.ndarray], offsets: Sequence[np.ndarray], row: Row) -> dict[str, Any]:
        best = best_span(logits, [window[:, 0] >= 0 for window in offsets], self.max_answer)
        if best is None:
            return {"answer": "", "start": None, "end": None, "score": None, "no_answer_score": None}
        scores = {"score": round(best.score, 6), "no_answer_score": round(best.null, 6)}
        if best.null - best.score > self.no_answer_threshold:
            return {"answer": "", "start": None, "end": None, **scores}
        start, end = int(offsets[best.window][best.start, 0]), int(offsets[best.window][best.end, 1])
        text = column(row, self.context, self)[start:end]
        start += len(text) - len(text.lstrip())  # some tokenizers count the space before a word to the word
        return {"answer": text.strip(), "start": start, "end": start + len(text.strip()), **scores}


def _tokens(gold: Gold, offsets_Nx2: np.ndarray) -> tuple[int, int]:
    """The first and last token that the answer touches; (0, 0) where the window does not contain the whole answer."""
    end = gold.start + len(gold.text)
    touched = np.flatnonzero((offsets_Nx2[:, 0] >= 0) & (offsets_Nx2[:, 0] < end) & (offsets_Nx2[:, 1] > gold.start))
    if not len(touched):
        return 0, 0
    before = gold.text[: max(0, int(offsets_Nx2[touched[0], 0]) - gold.start)]
    after = gold.text[max(0, int(offsets_Nx2[touched[-1], 1]) - gold.start) :]
    return (int(touched[0]), int(touched[-1])) if _without_token(before + after) else (0, 0)


def _without_token(text: str) -> bool:
    """Whether it consists of spaces, control characters and marks, which tokenizers drop."""
    return all(unicodedata.category(character)[0] in "ZCM" for character in text)


class BestSpan(NamedTuple):
    """The best span over all windows.

    Attributes:
        window: The number of its window.
        start: Its first token, counted in the window.
        end: Its last token.
        score: Sum of its start and end logit.
        null: The score of "no answer": the same sum at a window's first token, the smallest over the windows.
    """

    window: int
    start: int
    end: int
    score: float
    null: float


def best_span(logits: Sequence[np.ndarray], context: Sequence[np.ndarray], max_answer: int) -> BestSpan | None:
    """The span with the highest sum of start and end logit, over every pair start <= end < start + max_answer in the context.

    The smallest null score counts for the question, because a window without the answer has a high one (Devlin et al., 2019,
    and SQuAD 2.0's baselines).

    Args:
        logits: For each window f32[len, 2], start and end.
        context: For each window bool[len]: the tokens that an answer may touch, which are adjacent.
        max_answer: Most tokens of an answer, at least 1.

    Returns:
        The best; of equal ones the first. None where no window has a context token.
    """
    null = min((float(window[0].sum()) for window in logits), default=np.inf)
    best: BestSpan | None = None
    for number, (window, inside) in enumerate(zip(logits, context, strict=True)):
        start_N = np.where(inside, window[:, 0], -np.inf)
        end_N = np.where(inside, window[:, 1], -np.inf)
        # The ends that each start may have, [N, max_answer]; none past the window.
        end_N = np.concatenate([end_N, np.full(max_answer - 1, -np.inf, end_N.dtype)])
        ends_NxA = np.lib.stride_tricks.sliding_window_view(end_N, max_answer)
        total_N = start_N + ends_NxA.max(axis=1)
        start = int(total_N.argmax())
        score = float(total_N[start])
        if score > (-np.inf if best is None else best.score):
            best = BestSpan(number, start, start + int(ends_NxA[start].argmax()), score, null)
    return best
