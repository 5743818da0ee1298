"""What training gives on packed rows beside what it gives on rows of one example."""

import dataclasses

import jax
import numpy as np

from mtl_jax import Batching
from mtl_jax.core import trees
from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.training import evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import encode_tokens, needed_fields
from mtl_jax.training.gradient import StepGradients, make_backward
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.step import make_gradient_fn
from mtl_jax.training.train_state import StepInputs

PACKED = Batching(rows=16, row_length=24, examples_per_row=6)
UNPACKED = dataclasses.replace(PACKED, rows=48, packed=False)


def whole(prepared: Prepared, batching: Batching, split: str = "train") -> Batch:
    """All examples of a split in one batch, with their labels."""
    (batch,) = eval_batches(list(prepared.corpus.splits[split].values()), batching, prepared.corpus.tasks)
    return batch


def measured(prepared: Prepared, batch: Batch) -> StepGradients:
    """Losses and gradient of a batch, as a training step finds them."""
    tasks, plan = prepared.corpus.tasks, prepared.plans[0]
    state = initial_state(prepared)
    trained, frozen = trees.split(state.params, plan.mask)
    backward = make_backward(encode_tokens(prepared.trunk.module, needed_fields(tasks)), tasks, trains_trunk=True)
    return jax.jit(make_gradient_fn(backward, plan.rule))(trained, frozen, StepInputs(batch), state)


def predictions(prepared: Prepared, batching: Batching, split: str = "train") -> evaluation.Predictions:
    """Every task's outputs on a split."""
    tasks, mesh = prepared.corpus.tasks, meshes.make(batching.rows, 1)
    apply = evaluation.make_outputs(encode_tokens(prepared.trunk.module, needed_fields(tasks)), tasks, mesh)
    params = initial_state(prepared).params
    return evaluation.predict(apply, params, tasks, list(prepared.corpus.splits[split].values()), batching, mesh)


def assert_packing_changes_nothing(prepared: Prepared) -> None:
    """Losses, counts, gradient and predictions to 1e-5."""
    packed, unpacked = whole(prepared, PACKED), whole(prepared, UNPACKED)
    assert (packed.index >= 0).sum() == (unpacked.index >= 0).sum()
    assert ((packed.index >= 0).sum(axis=1) > 1).any()
    a, b = measured(prepared, packed), measured(prepared, unpacked)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((a.losses, a.gradient)))  # NaN is close to NaN
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)  # noqa: E731
    jax.tree.map(close, (a.losses, a.counts, a.gradient), (b.losses, b.counts, b.gradient))
    a, b = predictions(prepared, PACKED), predictions(prepared, UNPACKED)
    for task in prepared.corpus.tasks:
        for x, y in zip(a.outputs[task.name], b.outputs[task.name], strict=True):
            close(x, y)
    jax.tree.map(close, a.losses, b.losses)
