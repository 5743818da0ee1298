"""Gradients of a task whose labels are texts, whole and part by part, beside one backward pass for each task."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_translation

from mtl_jax.data.stream import single_phase, stream
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.forward import apply_heads, encode_tokens, label_counts, mean_losses, needed_fields
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import prepare
from mtl_jax.training.train_state import StepInputs


@pytest.mark.long
def test_parts_of_a_batch_and_task_gradients_count_target_tokens(tmp_path):
    """The decoder reads and predicts by the trunk's table: that is a part of its task's gradient, and so in the Gram matrix.

    The two halves of the batch have different numbers of target tokens, and some rows have none.
    """
    tiny_translation.write_data(tmp_path)
    experiment = tiny_translation.experiment(tmp_path, weighting="pcgrad")
    prepared = prepare(dataclasses.replace(experiment, batch=dataclasses.replace(experiment.batch, accumulate=2)))
    tasks, params, encode = (
        prepared.corpus.tasks,
        prepared.params,
        encode_tokens(prepared.trunk.module, needed_fields(prepared.corpus.tasks)),
    )
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, single_phase(prepared.experiment.batch, 100))
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()
    tokens_of_half = (batch.labels["translation"][..., 0] >= 0).reshape(2, -1).sum(axis=1)
    assert tokens_of_half[0] != tokens_of_half[1]

    @jax.jit
    def jacobian(params):
        def losses(params):
            outputs = apply_heads(tasks, params["heads"], encode(params["trunk"], batch, None, None), batch, None)
            return mean_losses(tasks, outputs, batch, label_counts(tasks, batch))

        return jax.jacrev(losses)(params)

    rows = jacobian(params)
    flat = {task: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(row["trunk"])]) for task, row in rows.items()}
    assert np.abs(rows["translation"]["trunk"]["embeddings"]["word"]["embedding"]).sum(axis=1).min() > 0  # every token's
    found = jax.jit(gradient_fn(prepared, prepared.plans[0]))(
        params, jax.tree.map(lambda _: None, params), StepInputs(batch), initial_state(prepared)
    )
    gram = np.array([[flat[a] @ flat[b] for b in sorted(flat)] for a in sorted(flat)])
    np.testing.assert_allclose(found.gram, gram, rtol=1e-3, atol=1e-4 * np.abs(gram).max())
    weights = {task: float(found.weights[task]) for task in rows}

    def summed(part, weights):
        return jax.tree.map(
            lambda *leaves: sum(weights[task] * leaf for task, leaf in zip(rows, leaves, strict=True)),
            *(row[part] for row in rows.values()),
        )

    expected = {"trunk": summed("trunk", weights), "heads": summed("heads", dict.fromkeys(rows, 1.0))}  # heads: plain losses
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * (1e-3 + np.abs(b).max())), found.gradient, expected)
