"""Large heads over the rows of their own source, beside the same over the whole batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_translation
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import Classification, Seq2Seq, Source
from mtl_jax.data.batches import Batch
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.training import mesh as meshes
from mtl_jax.training.batch_parts import in_parts, rows_in_part, rows_of_source
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.forward import encode_tokens, needed_fields
from mtl_jax.training.gradient import make_backward
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import prepare
from mtl_jax.training.step import make_gradient_fn
from mtl_jax.training.train_state import StepInputs

SMALL = Classification(name="small", source="a")
LARGE = Seq2Seq(name="large", source="b", column="text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("pairs")
    tiny_translation.write_data(found)
    return found


def experiment(folder, **changes):
    """Two decoders and a label, on two sources that take turns: 5 and 2 rows of 8, or 6 and 3."""
    sources = tuple(Source(name=name, path=f"{folder}/pairs.jsonl", format="jsonl") for name in ("one", "two"))
    tasks = (
        Seq2Seq(name="there", source="one", column="translation", target_length=24, label_smoothing=0.1, layers=1),
        Seq2Seq(name="echo", source="two", column="text", target_length=24),
        Classification(name="long", source="two", column="long"),
    )
    plain = tiny_translation.experiment(folder, sources=sources, tasks=tasks, **changes)
    shares = {"one": 0.7, "two": 0.3}
    return dataclasses.replace(plain, batch=dataclasses.replace(plain.batch, mixture="fixed", shares=shares))


def batch_of(prepared, steps=3):
    batching = prepared.experiment.batch
    batches = stream(prepared.corpus, batching, 0, single_phase(batching, 100))
    found = [jax.tree.map(jnp.asarray, next(batches)) for _ in range(steps)]
    batches.close()
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_gradient_are_those_of_the_whole_batch(folder, accumulate):
    plain = experiment(folder)
    prepared = prepare(dataclasses.replace(plain, batch=dataclasses.replace(plain.batch, accumulate=accumulate)))
    tasks, plan, params = prepared.corpus.tasks, prepared.plans[0], prepared.params
    encode, frozen = encode_tokens(prepared.trunk.module, needed_fields(tasks)), jax.tree.map(lambda _: None, params)
    own = jax.jit(gradient_fn(prepared, plan))
    whole = jax.jit(make_gradient_fn(make_backward(encode, tasks, trains_trunk=True), plan.rule))
    rows = set()
    for batch in batch_of(prepared):
        a, b = (each(params, frozen, StepInputs(batch), initial_state(prepared)) for each in (own, whole))
        for x, y in ((a.losses, b.losses), (a.counts, b.counts), (a.gradient, b.gradient)):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), x, y)
        rows.add(int((batch.source == 0).sum()))
    assert len(rows) > 1  # the shape is the same all the same


def test_it_costs_what_the_rows_cost(folder):
    """Of the decoders' work a half is left, where there are as many rows of both."""
    plain = experiment(folder)
    prepared = prepare(dataclasses.replace(plain, batch=dataclasses.replace(plain.batch, mixture="uniform", shares={})))
    tasks, plan, params = prepared.corpus.tasks, prepared.plans[0], prepared.params
    encode = encode_tokens(prepared.trunk.module, needed_fields(tasks))
    (batch,) = batch_of(prepared, 1)

    def operations(gradients, tasks):
        arguments = (params, jax.tree.map(lambda _: None, params), StepInputs(batch), initial_state(prepared))
        return jax.jit(gradients).lower(*arguments).compile().cost_analysis()["flops"]

    small = tuple(task for task in tasks if not task.large)
    trunk = operations(make_gradient_fn(make_backward(encode, small, trains_trunk=True), plan.rule), small)
    whole = operations(make_gradient_fn(make_backward(encode, tasks, trains_trunk=True), plan.rule), tasks)
    own = operations(gradient_fn(prepared, plan), tasks)
    assert (own - trunk) / (whole - trunk) < 0.6


def test_four_devices_draw_and_learn_what_one_does(folder):
    """With dropout in trunk and decoders."""

    def run(devices):
        trunk = dataclasses.replace(tiny_translation.TRUNK, dropout=0.2)
        prepared = prepare(experiment(folder, trunk=trunk, devices=devices))
        (batch,) = batch_of(prepared, 1)
        batch = meshes.assemble(jax.tree.map(np.asarray, batch), meshes.by_rows(prepared.mesh))
        frozen = jax.tree.map(lambda _: None, prepared.params)
        found = jax.jit(gradient_fn(prepared, prepared.plans[0]))(
            prepared.params, frozen, StepInputs(batch), initial_state(prepared)
        )
        return found.losses, found.gradient

    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, run(4), run(1))


@given(st.sampled_from([1, 7]).flatmap(lambda rows: st.lists(st.sampled_from([0, 1, -1]), min_size=rows, max_size=rows)))
def test_every_row_of_the_source_is_seen_in_its_order_by_large_heads_only(sources):
    source_R = np.array(sources, np.int32)
    most = {"a": sources.count(0), "b": sources.count(1)}
    number_R = jnp.arange(len(sources))
    batch = Batch(*(number_R,) * 4, jnp.asarray(source_R), {})
    encoded = Encoded(tokens=number_R, table=jnp.ones((3, 2)))
    look = rows_of_source(most, meshes.make(1, 1))
    assert look(SMALL, encoded, batch) == (encoded, batch)
    seen, rows = look(LARGE, encoded, batch)
    assert len(rows.source) == max(most["b"], 1)  # a head has no shape for no rows
    np.testing.assert_array_equal(rows.tokens[: most["b"]], number_R[source_R == 1])
    np.testing.assert_array_equal(seen.tokens, rows.tokens)
    assert seen.table is encoded.table


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=3), st.sampled_from([1, 2, 3]))
def test_most_rows_of_a_part(pieces, parts):
    """Beside counting: each host has the rows of its sources in one piece, and empty rows after them, here up to 30 in all."""
    rows = [source for counts in pieces for source, count in enumerate(counts) for _ in range(count)]
    rows += [-1] * (30 - len(rows))
    of_part = in_parts(np.array(rows, np.int32), parts)
    most = {name: rows.count(place) for place, name in enumerate("ab")}
    bound = rows_in_part(most, parts, len(pieces))
    for place, name in enumerate("ab"):
        assert int((of_part == place).sum(axis=1).max(initial=0)) <= bound[name] <= most[name]
