"""From a chosen source to a training: joint or sequential, and the flags that train it."""

from __future__ import annotations

from typing import NamedTuple

from mtl_jax.core.errors import UserError, count

JOINT, SEQUENTIAL = "joint", "sequential"


class Advice(NamedTuple):
    """How to use a source for a target.

    Attributes:
        target: The task that should profit.
        source: The task that helps it most, by the estimates.
        way: "joint" or "sequential", by joint_or_sequential.
        flags: For each training in order, the flags of the experiment's script.
    """

    target: str
    source: str
    way: str
    flags: tuple[str, ...]


def joint_or_sequential(target_rows: int, source_rows: int) -> str:
    """Whether to train source and target together or one after the other: "joint" or "sequential".

    The size rule of Weller et al.: joint training is better where the target has fewer training rows than the source, and else
    training on the source first. It was found on pairs of GLUE tasks with encoders; it is a rule of thumb, not an estimate.

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
