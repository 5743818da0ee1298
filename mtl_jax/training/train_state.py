"""A step takes a train state and its inputs, and gives a new state and metrics."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import trunks
from mtl_jax.core import trees
from mtl_jax.data.batches import Batch
from mtl_jax.models import traced
from mtl_jax.tasks import Task
from mtl_jax.trunks import Trunk


class TrainState(NamedTuple):
    """Everything that a step changes: one pytree, saved whole, restored whole.

    Attributes:
        step: i32[], steps done.
        params: {"trunk": ..., "heads": {task: ...}}, float32.
        opt_state: The optimizer's state over the trainable leaves of the current phase.
        rule_state: The weighting rule's state.
        key: u32[2], key data of the run; the key of a step is folded from it and the step.
        average: averaging.Average of the trainable leaves over the steps of the current phase; None: there is none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rule_state: Any
    key: jax.Array
    average: Any = None

    def step_key(self) -> jax.Array:
        """The PRNG key of the next step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)

    def measured(self) -> Any:
        """The parameters that are evaluated: the average of those that train, where there is one."""
        return self.params if self.average is None else trees.merge(self.average.mean, self.params)


class StepInputs(NamedTuple):
    """Everything that a step reads and does not change.

    Attributes:
        batch: The rows.
        features: f32[N, H], the features of all examples where the trunk is frozen and they are known; else None.
        references: {name: tree}, the parameters and numbers that the regularisers of the phase compare with; None: there are
            none.
        held_out: Batches [N, R, ...] of the held-out rows of the rule's tasks; None: the rule needs none.
    """

    batch: Batch
    features: jax.Array | None = None
    references: Any = None
    held_out: Batch | None = None


class StepMetrics(NamedTuple):
    """The metrics of a step; the host reads them one step late.

    Attributes:
        losses: {task or regulariser: f32[]}, of a task the mean over the labelled examples (or tokens) of the step; 0 where
            there are none.
        counts: {task: f32[]}, the number of those examples or tokens.
        weights: {task or regulariser: f32[]}.
        total: f32[], the sum of weight times loss.
        gradient_norm: f32[], of the trainable part, before clipping.
        seen: i32[N, 3], of each source the rows, examples and tokens of the batch, over all hosts.
        gram: f32[K, K], inner products of the task gradients in sorted order; NaN where the rule did not compare them in this
            step, None if it never does.
        residual: f32[], the relative residual of the problem that the rule solves for its weights (weighting.solve); NaN where
            it solved none in this step, None if it never does.
        made: i32[N, A + 1], of each source how many examples each augmentation changed, and last of how many one should have
            and could not; None where no source has augmentations that draw in every pass.
    """

    losses: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    total: jax.Array
    gradient_norm: jax.Array
    seen: jax.Array
    gram: jax.Array | None = None
    residual: jax.Array | None = None
    made: jax.Array | None = None


def create(params: Any, opt_state: Any, rule_state: Any, seed: int, average: Any = None) -> TrainState:
    """The state before the first step."""
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, rule_state, key, average)


def init_params(trunk: Trunk, tasks: tuple[Task, ...], seed: int) -> Any:
    """{"trunk": ..., "heads": {task: ...}}: the loaded or random trunk, random heads, decoders of the trunk's checkpoint.

    The numbers of a head depend on the seed and the task's name alone, not on the other tasks.
    """
    key = jax.random.key(seed)
    params = {"trunk": trunks.init_params(trunk, key)}
    width = trunks.width(trunk)
    heads = {}
    for task in tasks:
        name_key = jax.random.fold_in(key, zlib.crc32(task.name.encode()))
        if task.decodes and trunk.head is not None:
            heads[task.name] = task.from_head(
                jax.tree.map(jnp.array, trunk.head), name_key
            )  # a copy: the step donates its buffers
            continue
        of_module = type(task).init is Task.init
        init = _module_init(task.head_module(), width) if of_module else jax.jit(lambda key, task=task: task.init(key, width))
        fresh = init(name_key)
        heads[task.name] = task.start_from(params["trunk"], fresh)
        if trunk.classifier is not None:
            heads[task.name] = task.from_classifier(trunk.classifier, heads[task.name])
    return params | {"heads": heads}


@traced.remembered
def _module_init(module: nn.Module, width: int) -> Callable[[jax.Array], Any]:
    """Task.init of a head, as a program of its own, which takes a second to compile: once for all heads of one shape."""
    return jax.jit(lambda key: module.init(key, jnp.zeros((1, 1, width)))["params"])


@contextlib.contextmanager
def made_by_cpu() -> Iterator[None]:
    """Within the context, arrays are made on the CPU, where jax has it beside other devices."""
    try:
        by_cpu: contextlib.AbstractContextManager[Any] = jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # jax was told to look for accelerators only
        by_cpu = contextlib.nullcontext()
    with by_cpu:
        yield


def on_host(tree: Any) -> Any:
    """A tree of arrays as host arrays: a device that has no other reference to them keeps nothing of them."""
    return jax.tree.map(np.asarray, tree)
