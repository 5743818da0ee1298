"""mtl-jax plan: the run's own steps through the compiler for TPUs, where that is installed; its table and errors without it."""

import dataclasses
import importlib.util
import json
import re
import sys

import pytest
import tiny

import mtl_jax
from mtl_jax import L2SP, UserError
from mtl_jax.cli import main
from mtl_jax.planning import plan_table
from mtl_jax.planning.program_cost import Collective, ProgramCost
from mtl_jax.planning.run_plan import PhaseCost, Plan
from mtl_jax.planning.topologies import CHIPS, Topology

compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra plan-tpu")


@compiler
def test_a_step_of_every_phase(bert, data, tmp_path, capsys, monkeypatch):
    """A frozen trunk whose features are cached, then all of it, with a regulariser that compares with the start."""
    experiment = tiny.experiment(bert, data, regularisers=(L2SP(),), weighting="upgrad")
    monkeypatch.setattr("mtl_jax.cli.scripts.read", lambda script, purpose: experiment)
    argv = ["mtl-jax", "plan", "x.py", "--topology", "v5e:2x2", "--json", str(tmp_path / "plan.json")]
    monkeypatch.setattr(sys, "argv", argv)
    main.console()
    printed = capsys.readouterr().out
    assert "dearest places, v5e:2x2 everything" in printed
    assert "the rounds of 1 loop depend on the data" in printed
    result = json.loads((tmp_path / "plan.json").read_text())
    assert (result["topology"], result["devices"], result["dtype"]) == ("v5e:2x2", 4, "bfloat16")
    heads, everything = result["phases"]
    assert (heads["phase"], everything["phase"]) == ("heads", "everything")
    assert heads["cycles"] < everything["cycles"]
    assert heads["flops"] < everything["flops"]
    # Parameters of float32; Adam's two moments of all of them, and of the heads alone.
    assert heads["parameters"] == everything["parameters"]
    assert 1.9 * everything["parameters"] < everything["optimizer"] < 2.2 * everything["parameters"]
    assert heads["optimizer"] < 0.5 * everything["optimizer"]
    assert everything["collectives"]["all-reduce"]["bytes"] > 0
    assert sum(everything["places"].values()) == everything["cycles"]


SMALL = Topology("v5e:2x2", CHIPS["v5e"], (None,) * 4)


def phase(**changes):
    cost = ProgramCost(
        3_000_000, {"forward Encoder": 2_000_000, "optimizer": 1_000_000}, {"all-reduce": Collective(2, 4000)}, 9, 0
    )
    values = {
        "phase": "all",
        "steps": 10,
        "parameters": 10**8,
        "optimizer": 2 * 10**8,
        "temporaries": 10**9,
        "memory": 13 * 10**8,
        "fits": True,
        "flops": 1e11,
        "seconds": 0.002,
        "communication": 1e-5,
        "cost": cost,
        "compile_seconds": 3.0,
    }
    return PhaseCost(**(values | changes))


def test_the_table():
    text = plan_table.table([Plan(SMALL, 64, 64 * 128, "bfloat16", [phase()])])
    lines = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line.count("|") == 3}
    assert lines["memory"] == "1.30 GB of 16.00 GB, fits"
    assert lines["time"] == "2.000 ms"
    assert lines["share of the chip's arithmetic"] == f"{1e11 / (0.002 * 197e12):.1%}"
    assert lines["communication"] == "all-reduce x 2: 4.00 kB"
    assert re.search(r"\| forward Encoder +\| 2\.000 M +\| 66\.7% +\|", text)
    assert "4,096,000 tokens a second" in text


def test_a_batch_in_parts():
    """More parts than now, and no operations, of which compilers count those of one part."""
    nothing = {"fits": False, "temporaries": None, "flops": None, "seconds": None, "communication": None, "cost": None}
    plan = Plan(SMALL, 64, 64 * 128, "bfloat16", [phase(**nothing, memory=40 * 10**9)], accumulate=2)
    assert "try --batch.accumulate 8, or --rows 16" in plan_table.table([plan])
    text = plan_table.table([Plan(SMALL, 64, 64 * 128, "bfloat16", [phase(flops=None)], accumulate=2)])
    assert re.search(r"operations +\| not estimated", text)
    assert "v5e:2x2 all: without operations, as the compiler counts a loop over parts of a batch once" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": 40 * 10**9}, "try --batch.accumulate 4, or --rows 16"),
        ({"memory": 900 * 10**9}, "not even one row of a batch fits on a device; --batch.row-length below 128"),
        (
            {"optimizer": 17 * 10**9, "memory": 18 * 10**9},
            "parameters and the optimizer's state alone are 17.10 GB; train fewer",
        ),
    ],
)
def test_what_would_fit(changes, message):
    nothing = {"fits": False, "temporaries": None, "flops": None, "seconds": None, "communication": None, "cost": None}
    text = plan_table.table([Plan(SMALL, 64, 64 * 128, "bfloat16", [phase(**nothing, **changes)])])
    assert f"v5e:2x2 all does not fit: {message}" in text


@pytest.mark.parametrize(
    ("topologies", "message"),
    [
        ([], "--topology: name at least one, such as v5e:2x2"),
        (["v5:2x2"], r"unknown topology 'v5' \(did you mean 'v5p'\?\); choices: v4, v5e, v5p, v6e, a100, h100, h200"),
        (["v5e"], "--topology v5e: name the kind of chip and the sides of a block, as v5e:2x2"),
        (["h100:2x2"], "--topology h100:2x2: name the kind of chip and its number, as h100:8"),
        pytest.param(["v5e:3x2"], "--topology v5e:3x2: .*; there are for example v4:2x2x1, v5e:2x2", marks=compiler),
        pytest.param(
            ["v5e:2x2"], "batch.rows is 6; it must be a multiple of the 4 devices of v5e:2x2: --rows 8", marks=compiler
        ),
    ],
)
def test_bad_input(bert, data, topologies, message):
    experiment = tiny.experiment(bert, data)
    experiment = dataclasses.replace(experiment, batch=dataclasses.replace(experiment.batch, rows=6))
    with pytest.raises(UserError, match=message):
        mtl_jax.plan(experiment, topologies)


def test_a_compiler_that_is_not_installed(bert, data, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"h100:4 needs the compiler for GPUs, .* pip install 'mtl_jax\[plan-gpu\]'"):
        mtl_jax.plan(tiny.experiment(bert, data), ["h100:4"])
