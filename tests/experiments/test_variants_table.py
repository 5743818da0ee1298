"""The table of LoRA's variants: the rate is chosen on dev, the difference is by seed, and what is not finished is left out."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mtl_jax.core.errors import UserError

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SCORES = {  # {variant: {rate: (dev, test) by seed}}
    "lora": {0.001: [(0.5, 0.9), (0.5, 0.9), (0.5, 0.9)], 0.01: [(0.7, 0.6), (0.8, 0.7), (0.6, 0.5)]},
    "dora": {0.001: [(0.9, 0.63), (0.9, 0.71), (0.9, 0.53)], 0.01: [(0.1, 0.1), (0.1, 0.1), (0.1, 0.1)]},
    "vera": {0.001: [(0.9, 0.9), (0.9, 0.9)]},  # a seed is missing
}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("lora_variants")
    sys.path.remove(str(EXPERIMENTS))


def write(folder, rates):
    runs = []
    for rate, seeds in rates.items():
        for seed, (dev, test) in enumerate(seeds):
            name = f"{len(runs):04}"
            runs.append({"run": name, "values": {"optimizer.learning_rate": rate, "seed": seed}, "status": "done"})
            (folder / "runs" / name).mkdir(parents=True)
            results = {"tasks": {"trec": {"dev": {"accuracy": dev}, "test": {"accuracy": test}}}}
            (folder / "runs" / name / "results.json").write_text(json.dumps(results))
    (folder / "ablation.json").write_text(json.dumps({"runs": runs}))


def test_rows(script, tmp_path):
    for variant, rates in SCORES.items():
        write(tmp_path / "trec" / variant, rates)
    comparison = script.Comparison(tasks=("trec",), rates=(0.001, 0.01), seeds=3, only_table=True, workdir=str(tmp_path))
    rows = [[cell.strip() for cell in line.split("|")[2:6]] for line in script.compare(comparison).splitlines()[2:]]
    half = stats.t.ppf(0.975, 2) * np.std([3, 1, 3], ddof=1) / 3**0.5
    assert rows == [
        ["lora", "0.01 (edge)", "60.0 ± 10.0", ""],
        ["dora", "0.001 (edge)", "62.3 ± 9.0", f"+2.3 [{7 / 3 - half:+.1f}, {7 / 3 + half:+.1f}]"],
    ]


def test_experiments(script):
    """One grid suits all: the head has the rate, and LoRA+ 16 times as much for B as for A."""
    comparison = script.Comparison()
    rules = {variant: script.rules(variant) for variant in script.ADAPTERS}
    assert [rule.rate for rule in rules["lora_plus"]] == [4.0, 0.25, 1.0, 1.0]
    assert [rule.rate for rule in rules["vera"]] == [8.0, 1.0, 1.0]
    declared = script.experiment("trec", "pissa", comparison)
    assert declared.adapters == (script.ADAPTERS["pissa"],)
    with pytest.raises(UserError, match=r"unknown variants 'dorra' \(did you mean 'dora'\?\)"):
        script.compare(script.Comparison(variants=("dorra",)))
