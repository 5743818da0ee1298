"""The same from Python as from the command line: public functions, their docstrings' examples, and the log of a script."""

import dataclasses
import doctest
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_seq2seq

import mtl_jax
from mtl_jax import Evaluation, Phase, UserError
from mtl_jax.core import log_lines
from mtl_jax.data.source_batches import batches_of
from mtl_jax.inference import predict as prediction

NAMES = [
    *("train", "ablate", "take", "predict", "evaluate", "load_model", "convert", "merge", "translate", "summarize"),
    *("results", "report", "register_logger", "Hooks"),
]


@pytest.fixture(scope="module")
def folder(bert, data, tmp_path_factory):
    """A directory with runs/tiny, a finished run of 3 steps, bert/ and marian/, where the examples run."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "bert").symlink_to(bert)
    tiny_seq2seq.write_marian(folder / "marian")
    mtl_jax.train(experiment(bert, data), folder / "runs" / "tiny")
    return folder


def experiment(bert, data):
    phases = (Phase("everything", steps=3),)
    return tiny.experiment(bert, data, phases=phases, evaluation=Evaluation(every=1, baseline="none"))


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_the_examples_of_public_names(inside, bert, data):
    """All examples in one process and directory, as their runs share one tiny model."""
    names = {"mtl_jax": mtl_jax, "dataclasses": dataclasses, "Path": Path, "EXPERIMENT": experiment(bert, data)}
    functions = [getattr(mtl_jax, name) for name in NAMES] + [batches_of]
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for function in functions:
        tests = finder.find(function, function.__name__, globs=names)
        assert any(test.examples for test in tests), f"{function.__name__} has no example"
        for test in tests:
            result = runner.run(test)
            assert not result.failed, test.name
