"""How to train with a chosen source: jointly or sequentially, and the flags for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mtl_jax.core.errors import UserError, count

JOINT, SEQUENTIAL = "joint", "sequential"


class Advice(NamedTuple):
    """How to use a source for a target.

    Attributes:
        target: The task that is to be helped.
        source: The task that helps it most, by the estimates.
        way: "joint" or "sequential", by joint_or_sequential.
        flags: For each training in order, the flags of the experiment's script.
        starts: The flags of joint trainings with several sources, by weights of losses and by shares of rows: starting_points.
    """

    target: str
    source: str
    way: str
    flags: tuple[str, ...]
    starts: tuple[str, ...] = ()


def joint_or_sequential(target_rows: int, source_rows: int) -> str:
    """Whether to train source and target together or one after the other: "joint" or "sequential".

    The size rule of Weller et al.: joint training is better if the target has fewer training rows than the source; otherwise
    train on the source first. It was found on pairs of GLUE tasks with encoders; it is a rule of thumb, not an estimate.

    Args:
        target_rows: The target's training rows, at least 1.
        source_rows: The source's training rows, at least 1.

    Raises:
        UserError: A number of rows is below 1.

    References:
        Weller, Seppi and Gardner, 2022, When to Use Multi-Task Learning vs Intermediate Fine-Tuning for Pre-Trained Encoder
        Transfer Learning, https://arxiv.org/abs/2205.08124

    Examples:
        >>> mtl_jax.affinity.joint_or_sequential(target_rows=512, source_rows=60_000)
        'joint'
    """
    for name, rows in (("target", target_rows), ("source", source_rows)):
        if rows < 1:
            raise UserError(f"the {name} has {count(rows, 'row')}; it needs at least 1")
    return JOINT if target_rows < source_rows else SEQUENTIAL


def advise(target: str, source: str, target_rows: int, source_rows: int) -> Advice:
    """The advice on a target and its chosen source.

    Joint training is one run of both tasks. Sequential training is a run of the source, and then one of the target that starts
    from its trunk.

    Args:
        target: The target's name.
        source: The source's name.
        target_rows: As for joint_or_sequential.
        source_rows: As for joint_or_sequential.

    Raises:
        UserError: As joint_or_sequential.
    """
    way = joint_or_sequential(target_rows, source_rows)
    if way == JOINT:
        return Advice(target, source, way, (f"--only {target} {source} --workdir runs/{target}_with_{source}",))
    first = f"--only {source} --workdir runs/{source}"
    then = f"--init-from.path runs/{source} --init-from.subtree trunk"
    return Advice(target, source, way, (first, f"--only {target} {then} --workdir runs/{target}_after_{source}"))


def source_weights(places: Mapping[str, float]) -> dict[str, float]:
    """{source: 1 minus its mean place} for the sources in the first half: weights of their losses; the target's is 1.

    A heuristic of ours as a starting point: a source that is first by every estimator weighs as much as the target.

    Args:
        places: {source: its mean place, from 0, first, to 1, last}: mean_places().

    Examples:
        >>> mtl_jax.affinity.source_weights({"mr": 0.0, "cr": 0.3, "rte": 0.9})
        {'mr': 1.0, 'cr': 0.7}
    """
    return {source: round(1 - place, 2) for source, place in places.items() if place < 0.5}


def starting_points(target: str, places: Mapping[str, float], source_of: Mapping[str, str]) -> tuple[str, ...]:
    """The flags of joint trainings of a target with the sources of source_weights(); none if there are fewer than two.

    The first uses these weights of losses, the second shares of rows in the same proportion. If several tasks label the rows
    of one source, the largest of their weights is its share.

    Args:
        target: The target's name.
        places: As for source_weights().
        source_of: {task: the name of its source}.
    """
    weights = {target: 1.0, **source_weights(places)}
    if len(weights) < 3:
        return ()
    shares: dict[str, float] = {}
    for task, weight in weights.items():
        shares[source_of[task]] = max(weight, shares.get(source_of[task], 0.0))
    only = f"--only {' '.join(weights)}"
    by_weights = " ".join(f"{task} {weight:g}" for task, weight in weights.items())
    by_shares = " ".join(f"{source} {weight:g}" for source, weight in shares.items())
    return (
        f"{only} --weighting fixed --weights {by_weights} --workdir runs/{target}_by_weights",
        f"{only} --batch.mixture fixed --batch.shares {by_shares} --workdir runs/{target}_by_shares",
    )
