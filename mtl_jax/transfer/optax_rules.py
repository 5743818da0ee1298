"""Parameter rules in optax: rates, decay and schedules by leaf, and Adam's moments with an age for each leaf.

Only numbers differ between leaves, not optimizers: Adam's scaling runs once over all trainable leaves, then each leaf is
decayed and multiplied by its numbers, so hundreds of rules cost as much as one. Frozen leaves may be None, as core.trees.split
leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.core.errors import unknown
from mtl_jax.core.trees import merge, norm, split
from mtl_jax.transfer.freezing import ParamRule, decide


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm, with one multiplication for each number of the gradient.

    Its division of the gradient by the norm is a kernel of its own for every leaf, read and written once more in each step: XLA
    repeats a multiplication in the kernels of both moments, but no division.

    Args:
        largest: The norm of a longer gradient afterwards, over all leaves together.
    """

    def clip(updates: Any, params: Any = None) -> Any:
        del params
        factor = jnp.minimum(1.0, largest / norm(updates))  # a norm of 0 gives 1; nan and inf stay what they are
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(clip)


class AdamState(NamedTuple):
    """Adam's moments.

    Attributes:
        counts: i32[L], for each leaf the number of steps in its moments; leaves in the order of jax.tree.leaves.
        mu: First moments, a tree like the parameters.
        nu: Second moments.
    """

    counts: jax.Array
    mu: Any
    nu: Any


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, since: Any = None) -> optax.GradientTransformation:
    """optax.scale_by_adam with a count for each leaf, so that a leaf that starts to train later has its own bias correction.

    With one count for all leaves, a leaf whose moments start from zeros at step 1000 would be corrected as if they were old,
    and its first step would be about 3 times too long.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        since: A tree like the updates: leaves with equal values started to train in the same step, and share one bias
            correction. XLA compiles one kernel for all leaves of one shape and one correction. None: every leaf has its own.
    """

    def init(params: Any) -> AdamState:
        counts = jnp.zeros(len(jax.tree.leaves(params)), jnp.int32)
        return AdamState(counts, jax.tree.map(_zeros_like, params), jax.tree.map(_zeros_like, params))

    def update(updates: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        del params
        counts = optax.safe_increment(state.counts)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        leaves, treedef = jax.tree.flatten(mu)
        started = range(len(leaves)) if since is None else jax.tree.leaves(since)
        first = {start: n for n, start in reversed(list(enumerate(started)))}
        # The powers and quotients of all counts in one array: hundreds of scalars would each be a kernel on a GPU.
        unbias_mu_L, unbias_nu_L = 1 / (1 - b1**counts), 1 / (1 - b2**counts)
        scaled = [
            m * unbias_mu_L[first[start]] / (jnp.sqrt(v * unbias_nu_L[first[start]]) + eps)
            for m, v, start in zip(leaves, jax.tree.leaves(nu), started, strict=True)
        ]
        return jax.tree.unflatten(treedef, scaled), AdamState(counts, mu, nu)

    return optax.GradientTransformation(init, update)


def _zeros_like(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Zeros where the leaf lies: on devices every shape is a program of its own."""
    return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else jnp.zeros_like(leaf)


class RulesState(NamedTuple):
    """The state of scale_by_rules.

    Attributes:
        steps: i32[], number of steps so far, which schedules depend on.
    """

    steps: jax.Array


def scale_by_rules(
    decided: Any, schedules: Mapping[str, optax.Schedule], weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The last part of a chain: update -> -(rule.rate * schedule) * (update + decay * parameter), with numbers by leaf.

    Decay (decoupled, as AdamW's) is for parameters of two or more dimensions only: no biases, no norms.

    Args:
        decided: freezing.decide(params, rules): the rule of each parameter.
        schedules: {name: learning rate by step}; "" is for rules without a schedule.
        weight_decay: The decay for rules without one.

    Returns:
        A transformation of the trained part of core.trees.split(params, mask).

    Raises:
        UserError: A rule names an unknown schedule.
    """
    for rule in jax.tree.leaves(decided):
        if rule.schedule not in schedules:
            raise unknown(f"schedule of the rule {rule.pattern!r}:", rule.schedule, [name for name in schedules if name])

    def init(params: Any) -> RulesState:
        del params
        return RulesState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: RulesState, params: Any = None) -> tuple[Any, RulesState]:
        used = {rule.schedule for rule in jax.tree.leaves(decided) if rule.train}
        rates = {name: jnp.asarray(schedules[name](state.steps), jnp.float32) for name in sorted(used)}

        def move(rule: ParamRule, update: Any, leaf: Any) -> Any:
            if update is None:
                return None
            decay = weight_decay if rule.weight_decay is None else rule.weight_decay
            decays = isinstance(decay, jax.core.Tracer) or decay != 0
            if decays and leaf.ndim >= 2:
                update = update + decay * leaf
            return (-rule.rate * rates[rule.schedule] * update).astype(update.dtype)

        return jax.tree.map(move, decided, updates, params), RulesState(optax.safe_increment(state.steps))

    return optax.GradientTransformation(init, update)


def by_rules(
    params: Any,
    rules: Sequence[ParamRule],
    scale: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    schedules: Mapping[str, optax.Schedule] | None = None,
) -> optax.GradientTransformation:
    """Parameter rules for plain optax: a transformation of whole trees; frozen leaves have updates of 0 and no state.

        optimizer = by_rules(params, layerwise(0.9, layers=12), optax.scale_by_adam(), 2e-5, weight_decay=0.01)
        state = optimizer.init(params)
        updates, state = optimizer.update(gradients, state, params)

    Frozen parts cost no backward pass only if the loss is differentiated by the trained part, the first of
    core.trees.split(params, freezing.trainable(params, rules)); the gradients of frozen leaves may then be None.

    Args:
        params: A tree of arrays or of shapes.
        rules: Must cover it.
        scale: Makes an update of the gradient, without rate and sign.
        learning_rate: A number, or a schedule.
        weight_decay: The decay for rules without one.
        schedules: {name: schedule} that rules may name.

    Raises:
        UserError: As for freezing.decide and scale_by_rules.
    """
    decided = decide(params, rules)
    mask = jax.tree.map(lambda rule: rule.train, decided)
    base = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    inner = optax.chain(scale, scale_by_rules(decided, {**(schedules or {}), "": base}, weight_decay))

    def init(params: Any) -> Any:
        return inner.init(split(params, mask)[0])

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved, state = inner.update(split(updates, mask)[0], state, split(params, mask)[0])
        return merge(moved, jax.tree.map(jnp.zeros_like, split(params, mask)[1])), state

    return optax.GradientTransformation(init, update)


def carry(old: Any, new: Any) -> Any:
    """A new optimizer state with the moments of an old one, for leaves that trained before and still train.

    Moments, and the counts of AdamState, continue unchanged; a leaf that starts to train begins from zeros, also if it trained
    in an earlier phase but not in the last one. The steps that schedules count start again from 0.

    Args:
        old: State of the same chain of transformations over other leaves of the same parameters.
        new: Fresh state of the chain over the leaves that train next.
    """
    if isinstance(new, AdamState):
        return AdamState(_carry_counts(old, new), _carry_leaves(old.mu, new.mu), _carry_leaves(old.nu, new.nu))
    if isinstance(new, optax.TraceState):
        return optax.TraceState(_carry_leaves(old.trace, new.trace))
    if type(new) is tuple:  # a chain
        return tuple(carry(a, b) for a, b in zip(old, new, strict=True))
    return new


def same_ages(state: Any, since: Any) -> bool:
    """Whether leaves with equal values have equal counts in an optimizer state; True where it has no counts.

    Args:
        state: The state of a chain of transformations.
        since: As for scale_by_adam.
    """
    if isinstance(state, AdamState) and since is not None:
        pairs = zip(jax.tree.leaves(since), np.asarray(state.counts).tolist(), strict=True)
        return len(set(pairs)) == len(set(jax.tree.leaves(since)))
    return type(state) is not tuple or all(same_ages(part, since) for part in state)


def _carry_leaves(old: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None or b is None else a, old, new, is_leaf=_is_none)


def _carry_counts(old: AdamState, new: AdamState) -> jax.Array:
    counts = np.asarray(old.counts)  # on the host: the two may lie on different devices
    by_leaf = iter(np.moveaxis(counts, -1, 0))  # the axis of leaves is the last; axes before it are several runs
    ages = [None if leaf is None else next(by_leaf) for leaf in jax.tree.leaves(old.mu, is_leaf=_is_none)]
    trains = [leaf is not None for leaf in jax.tree.leaves(new.mu, is_leaf=_is_none)]
    zero = np.zeros(counts.shape[:-1], np.int32)
    carried = [zero if age is None else age for age, leaf_trains in zip(ages, trains, strict=True) if leaf_trains]
    return jnp.array(np.stack(carried, axis=-1), jnp.int32)


def _is_none(leaf: Any) -> bool:
    return leaf is None
