"""The table of ways to share a trunk, and the ways themselves."""

import importlib
import sys
from pathlib import Path

import pytest

from mtl_jax.sharing import Hard, base

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("dissimilar")
    sys.path.remove(str(EXPERIMENTS))


def test_the_table_names_the_task_that_loses_most(script):
    alone = {"0": {"a": 50.0, "b": 80.0}, "1": {"a": 52.0, "b": 80.0}}
    hard = {"0": {"a": 40.0, "b": 82.0}, "1": {"a": 42.0, "b": 84.0}}
    scores = {
        "alone": alone,
        "mmoe": {"1": {"a": 53.0, "b": 70.0}},
        "hard": hard,
        "pal": {"0": {"a": 1.0}},
        "cgc": {"2": alone["0"]},
    }

    def rows(*seeds):
        lines = script.table(scores, ["a", "b"], seeds).splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    header, _, *lines = rows(0, 1)
    assert header == ["sharing", "a", "b", "mean", "least to alone"]
    assert lines == [
        ["alone", "51.0 ± 1.4", "80.0 ± 0.0", "65.5", "+0.0 a"],
        ["hard", "41.0 ± 1.4", "83.0 ± 1.4", "62.0", "-10.0 a"],
    ]
    assert [line[0] for line in rows(1)[2:]] == ["alone", "hard", "mmoe"]
    assert rows(1)[4] == ["mmoe", "53.0", "70.0", "61.5", "-10.0 b"]


def test_every_way_has_fields_that_are_accepted(script):
    assert isinstance(script.WAYS["hard"][0], Hard)
    for part, adapters, _ in script.WAYS.values():
        base.check(part, [adapter.name for adapter in adapters])
        for adapter in adapters:
            adapter.check()
