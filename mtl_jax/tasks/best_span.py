"""The best span of a question's context, which may be divided into several windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Best(NamedTuple):
    """The best span over all windows.

    Attributes:
        window: In which window it lies.
        start: Its first token, counted in the window.
        end: Its last token.
        score: Sum of its start and end logit.
        null: The score of "no answer": the smallest, over the windows, of the same sum at a window's first token.
    """

    window: int
    start: int
    end: int
    score: float
    null: float


def best_span(logits: Sequence[np.ndarray], context: Sequence[np.ndarray], max_answer: int) -> Best | None:
    """The span with the highest sum of start and end logit, over every pair start <= end < start + max_answer in the context.

    A window that does not hold the answer is sure of that, one that does is not: so the smallest null score speaks for the
    question (Devlin et al., 2019, and SQuAD 2.0's baselines).

    Args:
        logits: For each window f32[len, 2], start and end.
        context: For each window bool[len]: which tokens an answer may touch; they stand side by side.
        max_answer: Most tokens of an answer, at least 1.

    Returns:
        The best; of equal ones the first. None where no window has a context token.
    """
    null = min((float(window[0].sum()) for window in logits), default=np.inf)
    best: Best | None = None
    for number, (window, inside) in enumerate(zip(logits, context, strict=True)):
        start_N = np.where(inside, window[:, 0], -np.inf)
        end_N = np.where(inside, window[:, 1], -np.inf)
        # For each start the ends that it may have: [N, max_answer], nothing past the window.
        end_N = np.concatenate([end_N, np.full(max_answer - 1, -np.inf, end_N.dtype)])
        ends_NxA = np.lib.stride_tricks.sliding_window_view(end_N, max_answer)
        total_N = start_N + ends_NxA.max(axis=1)
        at = int(total_N.argmax())
        score = float(total_N[at])
        if score > (-np.inf if best is None else best.score):
            best = Best(number, at, at + int(ends_NxA[at].argmax()), score, null)
    return best
