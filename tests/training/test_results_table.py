"""What the table says of runs beside their baselines."""

import pytest

from mtl_jax.training import results


def run(metric: float, baseline: float, seed: int = 0) -> dict:
    task = {"metric": "mcc", "test": {"mcc": metric}, "baselines": {"constant": {"mcc": baseline}}}
    facts = {"best_step": 1, "steps": 1, "best_criterion": metric, "seconds": 1.0, "versions": {"devices": "1 x cpu"}}
    return {"experiment": "e", "seed": seed, "weighting": "equal", "tasks": {"a": task}, **facts}


@pytest.mark.parametrize(
    ("metrics", "baseline", "verdict"),
    [
        ([0.5], 0.4, "Beats every baseline on every task."),
        ([0.5], 0.5, "a: ties with majority / mean (0.5000 against 0.5000)"),
        ([0.49999], 0.50001, "a: ties with majority / mean (0.5000 against 0.5000)"),
        ([0.4], 0.5, "a: did not beat majority / mean (0.4000 against 0.5000)"),
        ([0.0], 0.0, "a: ties with majority / mean (0.0000 against 0.0000)"),
        ([-0.1], -0.1, "a: ties with majority / mean (-0.1000 against -0.1000)"),
        ([-0.1], -0.2, "Beats every baseline on every task."),
        ([-0.2], -0.1, "a: did not beat majority / mean (-0.2000 against -0.1000)"),
        ([0.49, 0.53], 0.5, "a: ties with majority / mean (0.5100 ± 0.0283 against 0.5000 ± 0.0000)"),
        ([0.47, 0.51], 0.5, "a: ties with majority / mean (0.4900 ± 0.0283 against 0.5000 ± 0.0000)"),
        ([0.53, 0.55], 0.5, "Beats every baseline on every task."),
        ([0.43, 0.45], 0.5, "a: did not beat majority / mean (0.4400 ± 0.0141 against 0.5000 ± 0.0000)"),
    ],
)
def test_a_tie_is_no_defeat(metrics, baseline, verdict):
    lines = results.table([run(metric, baseline, seed) for seed, metric in enumerate(metrics)]).splitlines()
    assert lines[4] == verdict
