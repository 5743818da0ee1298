"""The error line of a loss that is not finite: the parameter that has it from the start, the step to resume from."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny

from mtl_jax import Embedding
from mtl_jax.data.corpus import Corpus
from mtl_jax.training import results, step_checks
from mtl_jax.training.checkpoint_store import Damaged
from mtl_jax.training.setup import prepare
from mtl_jax.transfer.loading import InitFrom

FINITE = {"trunk": {"kernel": np.ones(3, np.float32)}, "heads": {"a": {"bias": np.zeros(2, np.float32)}}}
SPOILT = {"trunk": {"kernel": np.array([1, np.inf, 1], np.float32)}, "heads": {"a": {"bias": np.zeros(2, np.float32)}}}
BAD_HEAD = {"trunk": FINITE["trunk"], "heads": {"a": {"bias": np.array([np.nan, 0], np.float32)}}}
EXPERIMENT = tiny.experiment("models/bert", "data")
RATE = "try a lower learning rate"


class Kept:
    """Checkpoints as Store gives them: {step: parameters; None: damaged}."""

    folder = Path("run/checkpoints")

    def __init__(self, kept):
        self.kept = kept

    def steps(self):
        return sorted(self.kept)

    def restore_params(self, step):
        if self.kept[step] is None:
            raise Damaged("is damaged")
        return self.kept[step]


def said(step, start=FINITE, kept=None, experiment=EXPERIMENT):
    return step_checks.explain_non_finite(step, experiment, start, Kept(kept or {}))


def test_a_parameter_that_is_not_finite_from_the_start_is_named_with_its_place():
    text = said(1, SPOILT)
    assert text.startswith("The parameter trunk/kernel has numbers that are not finite before the first step")
    assert text.endswith("trunk.path models/bert")
    begun = dataclasses.replace(EXPERIMENT, init_from=InitFrom(path="runs/other"))
    assert said(1, SPOILT, experiment=begun).endswith("init_from.path runs/other")
    assert said(1, BAD_HEAD).startswith("The parameter heads/a/bias")
    assert said(1, BAD_HEAD).endswith("its initialisation")
    assert said(1, SPOILT, experiment=dataclasses.replace(EXPERIMENT, trunk=Embedding())).endswith("its initialisation")
    assert RATE not in text


def test_the_first_step_is_not_the_rates_fault():
    text = said(1)
    assert "the learning rate is not the cause: look for labels" in text
    assert "intact" not in text


@pytest.mark.parametrize(
    ("kept", "parts", "absent"),
    [
        ({}, ["There is no checkpoint to resume from", RATE], "intact"),
        ({4: FINITE, 6: FINITE}, ["The checkpoint of step 6 is intact in run/checkpoints", RATE], "delete"),
        ({4: FINITE, 6: None}, ["The checkpoint of step 4 is intact", RATE], "step 6"),
        (
            {4: FINITE, 5: BAD_HEAD, 6: SPOILT},
            ["The parameter trunk/kernel is not finite in the checkpoint of step 6", "steps 5, 6 to resume from step 4"],
            "intact",
        ),
        ({6: SPOILT}, ["trunk/kernel is not finite in the checkpoint of step 6", RATE], "intact"),
        ({6: None}, ["There is no checkpoint to resume from", RATE], "intact"),
    ],
)
def test_a_checkpoint_is_called_intact_where_it_is(kept, parts, absent):
    text = said(9, kept=kept)
    assert all(part in text for part in parts), text
    assert absent not in text
    assert "\n" not in text


def test_features_that_are_not_finite_leave_the_probe_out_and_say_so(shallow, data, caplog):
    """In place of an error of the library that fits it."""
    prepared = prepare(tiny.experiment(shallow, data))
    corpus: Corpus = prepared.corpus
    features_NxH = np.random.default_rng(0).normal(size=(corpus.size, 4)).astype(np.float32)
    train = corpus.splits["train"]["ratings"]
    features_NxH[train.first_id : train.first_id + 2] = np.nan
    found = results.compute_baselines(corpus, prepared.experiment.sources, "probe", features_NxH)
    assert set(found["rating"]) == {"constant"}
    assert set(found["coarse"]) == {"constant", "probe"}
    assert "task rating: no linear probe, the trunk's features of 2 train examples are not finite" in caplog.text
