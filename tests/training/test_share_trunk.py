"""Which parameters the rows of a source without tasks read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import Consistency, Lora, SelfTraining, Source
from mtl_jax.core.errors import UserError
from mtl_jax.training.setup import prepare


def declared(bert, data, per, tasks=("rating", "coarse"), regulariser=None):
    """Tasks of two sources, and rows without labels."""
    experiment = tiny.experiment(bert, data)
    more = Source(name="more", rows=[{"text": "the film was good"}, {"text": "who was sad ?"}] * 4)
    return tiny.experiment(
        bert,
        data,
        sources=(more, *experiment.sources),
        tasks=tuple(task for task in experiment.tasks if task.name in tasks),
        adapters=(Lora(name="lora", rank=2, per=per),),
        regularisers=(regulariser or SelfTraining(source="more", phase="everything", tasks=("coarse",)),),
    )


@pytest.mark.parametrize("per", ["task", "source"])
def test_rows_without_tasks_read_the_adapter_of_those_that_are_applied_to_them(bert, data, per):
    prepared = prepare(declared(bert, data, per))
    sources = list(prepared.corpus.splits["train"])
    assert sources == ["more", "ratings", "questions"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), prepared.params["trunk"])
    tokens = jnp.tile(jnp.array([[2, 5, 9, 3]]), (3, 1))
    apply = prepared.trunk.module.apply
    hidden = apply({"params": params}, tokens, jnp.ones_like(tokens), source=jnp.arange(3)).hidden
    np.testing.assert_array_equal(hidden[0], hidden[2])
    assert np.abs(hidden[1] - hidden[2]).max() > 0.01


def test_one_adapter_serves_tasks_that_share_a_source(bert, data):
    """Tasks of one source have one adapter for each source, and copies of the rows where each has its own."""
    regulariser = Consistency(source="more", tasks=("coarse", "fine"))
    tasks = ("rating", "coarse", "fine")
    assert prepare(declared(bert, data, "source", tasks, regulariser)).trunk.module.owners == (2, 1, 2)
    assert prepare(declared(bert, data, "task", tasks, regulariser)).trunk.module.owners == ()


@pytest.mark.parametrize("per", ["task", "source"])
def test_tasks_of_two_sources_are_refused(bert, data, per):
    with pytest.raises(UserError, match=rf"adapter 'lora': per is {per}, and tasks of the sources questions, ratings are"):
        prepare(declared(bert, data, per, regulariser=Consistency(source="more")))
