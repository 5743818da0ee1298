"""Batches without a run are those of a run: also of tasks whose texts begin and end as the trunk says."""

import dataclasses

import numpy as np
import pytest
import tiny
import tiny_decoder

from mtl_jax import Batching, CausalLM, Classification, Experiment, MaskedLM, Phase, Pretrained, Seq2Seq, Source, trunks
from mtl_jax.core.errors import UserError
from mtl_jax.data.source_batches import batches_of
from mtl_jax.data.stream import stream
from mtl_jax.training.setup import mixture_phases, prepare

PAIRS, TEXTS, LABELLED = (Source(name, rows=tiny_decoder.rows(seed=seed)) for seed, name in enumerate(("p", "t", "l")))
CHATS = Source("chats", rows=tiny_decoder.conversations(), text="messages")
LABEL = Classification(name="label", source="l", column="label")
CASES = {
    "seq2seq": ((PAIRS, LABELLED), (Seq2Seq(name="answer", source="p", column="answer", target_length=6, layers=1), LABEL)),
    "causal_lm": (
        (PAIRS, CHATS, LABELLED),
        (
            CausalLM(name="answer", source="p", column="answer", target_length=3, prompt="{text}"),
            CausalLM(name="chat", source="chats", messages="messages", target_length=4),
            LABEL,
        ),
    ),
    "no_text": ((LABELLED,), (LABEL,)),
}


@pytest.fixture(params=CASES)
def experiment(request, tmp_path):
    sources, tasks = CASES[request.param]
    write = tiny_decoder.write_llama if request.param == "causal_lm" else tiny.write_bert
    write(tmp_path / "model")
    batch = Batching(rows=4, row_length=20, examples_per_row=4, target_length=12)
    return Experiment("e", Pretrained(str(tmp_path / "model")), sources, tasks, (Phase("all", 3),), batch=batch, devices=1)


def test_they_are_those_of_a_run(experiment):
    prepared = prepare(experiment, abstract=True)
    of_run = stream(prepared.corpus, experiment.batch, experiment.seed, mixture_phases(experiment))
    trunk = trunks.build(experiment.trunk, (), np.float32, decodes=True)
    alone = batches_of(experiment.sources, experiment.tasks, trunk=trunks.facts(trunk), batching=experiment.batch, steps=3)
    for _ in range(6):
        batch, expected = next(alone), next(of_run)
        assert batch.labels.keys() == expected.labels.keys()
        for name, labels in expected.labels.items():
            np.testing.assert_array_equal(batch.labels[name], labels, name)
        for field in ("tokens", "segments", "positions", "index", "source", "types"):
            np.testing.assert_array_equal(getattr(batch, field), getattr(expected, field), field)
    alone.close()
    of_run.close()


def test_without_a_trunk_a_task_that_writes_texts_is_refused(experiment):
    options = {"tokenizer": experiment.trunk.path, "batching": experiment.batch}
    if len(experiment.tasks) == 1:
        next(batches_of(experiment.sources, experiment.tasks, **options))
        return
    with pytest.raises(UserError, match=r"task 'answer' writes texts.*give trunk=mtl_jax\.trunks\.facts"):
        batches_of([Source("p", "no-such-file.csv")], experiment.tasks, **options)


def test_a_task_that_is_on_a_trunk_already_needs_its_tokenizer_alone(experiment):
    trunk = trunks.build(experiment.trunk, (), np.float32, decodes=True)
    tasks = [task.on(trunks.facts(trunk)) for task in experiment.tasks]
    options = {"batching": experiment.batch}
    one = next(batches_of(experiment.sources, tasks, tokenizer=trunk.tokenizer, **options))
    two = next(batches_of(experiment.sources, experiment.tasks, trunk=trunks.facts(trunk), **options))
    np.testing.assert_array_equal(one.tokens, two.tokens)


def test_a_masked_lm_takes_the_token_table_of_the_trunk(tmp_path):
    """As in a run: where it has fewer rows than the tokenizer has tokens."""
    tiny.write_bert(tmp_path / "bert")
    trunk = trunks.facts(trunks.build(Pretrained(str(tmp_path / "bert")), (), np.float32))
    trunk.tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    task = MaskedLM(name="words", source="t", rate=0.9)
    with pytest.raises(UserError, match="but the token table of the trunk has 24 rows"):
        batches_of(TEXTS, task, trunk=trunk)


def test_either_a_tokenizer_or_a_trunk(tmp_path):
    tiny.write_bert(tmp_path / "bert")
    trunk = trunks.facts(trunks.build(Pretrained(str(tmp_path / "bert")), (), np.float32))
    with pytest.raises(UserError, match="either tokenizer or trunk must be given, and neither is"):
        batches_of(TEXTS, dataclasses.replace(LABEL, source="t"))
    with pytest.raises(UserError, match="either tokenizer or trunk must be given, and both are"):
        batches_of(TEXTS, dataclasses.replace(LABEL, source="t"), tokenizer=trunk.tokenizer, trunk=trunk)
