"""The few lengths that sources of all lengths are padded to, as each one is a program."""

from __future__ import annotations

import numpy as np

SHORTEST = 8  # source tokens of the smallest bucket, and what all are multiples of


def buckets(lengths: np.ndarray, most: int, limit: int | None = None) -> list[int]:
    """At most so many lengths, ascending, to which sources are padded with the least padding in all.

    Multiples of 8, so that other data of the same kind can be given the same; the last holds the longest source.

    Args:
        lengths: i64[N], tokens of each source.
        most: How many.
        limit: The model's longest row.
    """
    rounded = np.maximum(-(-lengths // SHORTEST) * SHORTEST, SHORTEST)
    sizes, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # sources shorter than sizes[i]
    # cost[j]: places for all sources up to sizes[j], that one being a bucket; one more bucket in every round.
    cost = (below[1:] * sizes).astype(float)
    choices: list[np.ndarray] = []
    for _ in range(min(most, len(sizes)) - 1):
        with_before = cost[:, None] + np.where(
            np.arange(len(sizes))[:, None] < np.arange(len(sizes)), (below[1:] - below[1:, None]) * sizes, np.inf
        )
        choices.append(with_before.argmin(axis=0))
        cost = np.minimum(with_before.min(axis=0), cost)
    found, at = [len(sizes) - 1], len(sizes) - 1
    for choice in reversed(choices):
        if at == 0:
            break
        at = int(choice[at])
        found.append(at)
    chosen = sorted({int(sizes[at]) for at in found})
    return [min(size, limit) if limit else size for size in chosen]
