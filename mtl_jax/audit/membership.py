"""Membership inference by loss: how well a model's losses tell rows that it was trained on from other rows.

Yeom et al., 2018, https://arxiv.org/abs/1709.01604; losses relative to a reference model: Watson et al., 2022,
https://arxiv.org/abs/2111.08440; rates at a low false positive rate: Carlini et al., 2022, https://arxiv.org/abs/2112.03570.

Shapes in names: M members, N others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from mtl_jax.core.errors import UserError

FEWEST = 10  # rows on each side
FALSE_POSITIVES = 0.01
FEWEST_FOR_RATE = 100  # other rows, of which one is then a false positive
CONFIDENCE = 0.95


class Membership(NamedTuple):
    """How well a score tells members from others.

    Attributes:
        auc: The probability that a member's score is above another row's, where ties count half; 0.5: not at all.
        low: The lower end of its 95 % bootstrap interval.
        high: The upper end.
        true_positives: The share of members above the score that 1 % of the others exceed; None if there are fewer than 100
            others.
        members: M.
        others: N.
    """

    auc: float
    low: float
    high: float
    true_positives: float | None
    members: int
    others: int


def membership(members_M: np.ndarray, others_N: np.ndarray, *, resamples: int = 500, seed: int = 0) -> Membership:
    """How well scores tell members from others.

    Args:
        members_M: Scores of rows that the model was trained on; higher means more likely a member, such as minus the loss.
        others_N: Scores of rows that it was not trained on.
        resamples: Bootstrap samples of each side for the interval.
        seed: Seed of these samples.

    Raises:
        UserError: There are too few rows on a side, or a score is not finite.

    Examples:
        >>> import numpy as np
        >>> from mtl_jax import audit
        >>> scores = np.linspace(0.0, 1.0, 200)
        >>> audit.membership(scores + 0.5, scores).auc
        0.875...
    """
    members_M, others_N = np.asarray(members_M, np.float64), np.asarray(others_N, np.float64)
    for name, scores in (("members", members_M), ("others", others_N)):
        if len(scores) < FEWEST:
            raise UserError(f"membership needs at least {FEWEST} {name}, and there are {len(scores)}")
        if not np.isfinite(scores).all():
            raise UserError(f"membership: a score of the {name} is not finite")
    rng = np.random.default_rng(seed)
    samples = [
        auc(
            members_M[rng.integers(len(members_M), size=len(members_M))],
            others_N[rng.integers(len(others_N), size=len(others_N))],
        )
        for _ in range(resamples)
    ]
    value = auc(members_M, others_N)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail]) if samples else (value, value)
    rate = true_positives(members_M, others_N) if len(others_N) >= FEWEST_FOR_RATE else None
    return Membership(value, float(low), float(high), rate, len(members_M), len(others_N))


def auc(members_M: np.ndarray, others_N: np.ndarray) -> float:
    """The probability that a member's score is above another row's, where ties count half."""
    ranks = rankdata(np.concatenate([members_M, others_N]))
    count = len(members_M)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(others_N)))


def true_positives(members_M: np.ndarray, others_N: np.ndarray, false_positives: float = FALSE_POSITIVES) -> float:
    """The share of members above a threshold that at most this share of the others exceeds."""
    threshold = np.sort(others_N)[::-1][int(false_positives * len(others_N))]
    return float((members_M > threshold).mean())


def within_groups(
    members_M: np.ndarray, others_N: np.ndarray, groups: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores minus the mean score of their group, members and others together, so that easy groups do not count more.

    Args:
        members_M: Scores of members.
        others_N: Scores of others.
        groups: The group of each member and of each other row, such as its label.
    """
    scores = np.concatenate([members_M, others_N])
    _, group = np.unique(np.concatenate(groups), return_inverse=True)
    centred = scores - (np.bincount(group, scores) / np.bincount(group))[group]
    return centred[: len(members_M)], centred[len(members_M) :]


def exposure(loss: float, candidates: np.ndarray) -> float:
    """log2 of the number of candidates minus log2 of the canary's rank among them: bits that the model knows about it.

    A canary that was not learned has about 1.4 on average.

    Args:
        loss: The loss of the canary.
        candidates: The losses of rows that could have been planted; the canary is one more candidate.

    References:
        Carlini et al., 2019, https://arxiv.org/abs/1802.08232, definition 4.
    """
    rank = 1 + int((np.asarray(candidates) <= loss).sum())
    return float(np.log2(len(candidates) + 1) - np.log2(rank))
