"""Time of N runs in one program over N times that of one run: heads on a frozen trunk, LoRA, full fine-tuning.

    python benchmarks/ablation.py
    python benchmarks/ablation.py --kinds heads --counts 1 16

The quickstart's trunk and its four sentiment domains, batches of 8 rows of 64 tokens (48 for heads), learning rates that differ
from run to run. One run is timed with the step of training, N runs with that of an ablation, which has an axis over runs. Both
are compiled first and timed on the same batch, one after the other (in turns, the large program would leave too little memory
for the small one); the first time is not counted, and numbers are medians. `whole` is compilation and all steps of a run (450
for heads, 100 otherwise). For heads, `wall` is the total time with data, logs and results: N runs by `ablate` over one by
`train`, both with cached features. Writes ablation-BACKEND.json and .md to --out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tabulate
import tyro

import mtl_jax
from mtl_jax import Batching, Evaluation, Experiment, Lora, Phase, adapters_only
from mtl_jax.ablation import plan, space, stacking
from mtl_jax.ablation.prepare_program import Ready, make_ready
from mtl_jax.cli import scripts
from mtl_jax.data.stream import stream
from mtl_jax.experiment import select
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import mixture_phases
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs

QUICKSTART = scripts.read(str(Path(__file__).resolve().parents[1] / "experiments" / "quickstart.py"))
DOMAINS = ("tweets", "movies", "products", "editorials")
STEPS = {"heads": 450, "lora": 100, "full": 100}
COUNTS = {"heads": (1, 4, 16, 64), "lora": (1, 4, 16, 64), "full": (1, 4, 8, 16)}


@dataclasses.dataclass(frozen=True)
class Options:
    """The measurements.

    Attributes:
        kinds: heads, lora, full, or some of them.
        counts: N; empty: 1, 4, 16, 64, or 1, 4, 8, 16 for full, whose runs need half a gigabyte each.
        repeats: Number of timed steps; for heads, whose steps are short, a hundred times as many.
        wall: Whether to train whole runs of heads, too, alone and 16 at once.
        out: Folder of the results.
        note: A line for the result files, such as what else ran on the machine.
    """

    kinds: tuple[str, ...] = tuple(STEPS)
    counts: tuple[int, ...] = ()
    repeats: int = 5
    wall: bool = True
    out: str = "benchmarks/results"
    note: str = ""


def experiment(kind: str) -> Experiment:
    """An experiment with one phase of the kind."""
    rules = {"heads": QUICKSTART.phases[0].rules, "lora": adapters_only(), "full": Phase("", 1).rules}[kind]
    domains = select(dataclasses.replace(QUICKSTART, name=kind, only=DOMAINS))
    return dataclasses.replace(
        domains,
        adapters=(Lora(name="lora", rank=8, alpha=16.0),) if kind == "lora" else (),
        phases=(Phase(kind, STEPS[kind], rules, learning_rate=1e-3 if kind == "heads" else 1e-4),),
        batch=Batching(rows=48 if kind == "heads" else 8, row_length=64),
        evaluation=Evaluation(every=10_000, baseline="none"),
    )


def prepared_runs(kind: str, count: int) -> Ready:
    """N runs with N learning rates."""
    base = experiment(kind)
    if count == 1:
        runs = [plan.Run("0000", {}, base)]
    else:
        runs = plan.runs(base, space.axes(base, [f"phases.0.learning-rate=loggrid:1e-5:1e-4:{count}"]))
    (program,) = plan.programs(runs)
    return make_ready(program, size=count)


class Timed:
    """A compiled step and its arguments, of which the state changes with every step."""

    def __init__(self, program: Any, compile_seconds: float, state: Any, rest: tuple[Any, ...], first: tuple[Any, ...] = ()):
        self.program, self.compile_seconds, self.state, self.rest, self.first = program, compile_seconds, state, rest, first

    def seconds(self, steps: int) -> float:
        """Seconds of a step: the mean over a number of steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.program(*self.first, self.state, *self.rest)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / steps


def many(made: Ready, table: Any) -> Timed:
    """The step of N runs."""
    machine, plan_of = made.machine, made.prepared.plans[0]
    runs = made.chunks[0]
    values = jax.device_put(made.values(runs), meshes.by_runs(machine.mesh))
    params = stacking.stack([made.params[run.experiment.seed] for run in runs], machine.per_run[0], machine.mesh)
    fresh = machine.begin(plan_of, values, params)
    step = meshes.place(np.zeros((), np.int32), meshes.replicated(machine.mesh))
    key = stacking.keys([run.experiment.seed for run in runs], machine.mesh)
    state = fresh._replace(step=step, params=params, key=key)
    batch = batch_of(made)
    program = machine.step(plan_of, values, state, StepInputs(batch, table))
    return Timed(program, machine.compile_seconds, state, (StepInputs(batch, table),), (values,))


def one(made: Ready, table: Any) -> Timed:
    """The step of one run."""
    prepared = made.prepared
    plan_of = prepared.plans[0]
    step = make_train_step(gradient_fn(prepared, plan_of), plan_of.optimizer, plan_of.mask, len(DOMAINS))
    state, batch = initial_state(prepared), batch_of(made)
    began = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state, StepInputs(batch, table)).compile()
    return Timed(program, time.perf_counter() - began, state, (StepInputs(batch, table),))


def batch_of(made: Ready) -> Any:
    """A training batch, on the devices."""
    prepared = made.prepared
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, mixture_phases(prepared.experiment))
    batch = next(batches)
    batches.close()
    return meshes.assemble(batch, meshes.by_rows(prepared.mesh))


def table_of(ready: Ready) -> Any:
    """A table of ones in place of cached features: the time of indexing does not depend on the values."""
    prepared = ready.prepared
    if not prepared.plans[0].cached_features:
        return None
    examples = sum(len(part.tokens) for split in prepared.corpus.splits.values() for part in split.values())
    return meshes.place(np.ones((examples, 384), np.float32), meshes.replicated(prepared.mesh))


def measured(kind: str, options: Options) -> list[dict[str, Any]]:
    """A row of the table for every N."""
    rows = []
    steps = 100 if kind == "heads" else 1
    single = prepared_runs(kind, 1)
    alone = one(single, table_of(single))
    first = [alone.seconds(steps) for _ in range(options.repeats + 1)]
    for count in options.counts or COUNTS[kind]:
        ready = prepared_runs(kind, count)
        joint = many(ready, table_of(ready))
        times = {"one": first, "many": [joint.seconds(steps) for _ in range(options.repeats + 1)]}
        step = {name: statistics.median(values[1:]) for name, values in times.items()}
        whole = {
            "one": alone.compile_seconds + STEPS[kind] * step["one"],
            "many": joint.compile_seconds + STEPS[kind] * step["many"],
        }
        rows.append(
            {
                "kind": kind,
                "runs": count,
                "compile_one_s": alone.compile_seconds,
                "compile_s": joint.compile_seconds,
                "step_one_s": step["one"],
                "step_s": step["many"],
                "step_over_one": step["many"] / step["one"],
                "step_over_n": step["many"] / (count * step["one"]),
                "whole_over_n": whole["many"] / (count * whole["one"]),
                "bytes": meshes.bytes_of(joint.program),
                "times_s": times,
            }
        )
        print(rows[-1], flush=True)
    return rows


def wall() -> dict[str, float]:
    """Seconds of 16 runs of heads by ablate, and of one by train, after a short run that fills the caches."""
    base, seconds = experiment("heads"), {}
    with tempfile.TemporaryDirectory() as folder:
        mtl_jax.train(dataclasses.replace(base, phases=(dataclasses.replace(base.phases[0], steps=2),)), f"{folder}/warm")
        for name in ("one", "many"):
            jax.clear_caches()
            began = time.perf_counter()
            if name == "one":
                mtl_jax.train(base, f"{folder}/one")
            else:
                mtl_jax.ablate(base, f"{folder}/many", ["phases.0.learning-rate=loggrid:1e-4:1e-2:16"])
            seconds[name] = time.perf_counter() - began
    return seconds


def main(options: Options) -> None:
    """Measures, prints and writes the tables."""
    rows = [row for kind in options.kinds for row in measured(kind, options)]
    walls = wall() if options.wall and "heads" in options.kinds else {}
    device = f"{jax.devices()[0].device_kind} x{jax.device_count()}, {len(os.sched_getaffinity(0))} CPU cores"
    facts = {"device": device, "jax": jax.__version__, "python": platform.python_version(), "note": options.note}
    folder, stem = Path(options.out), f"ablation-{jax.default_backend()}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps({**facts, "wall_s": walls, "found": rows}, indent=1) + "\n")
    head = [
        "what trains",
        "N",
        "compile s (one)",
        "step s (one)",
        "step over one",
        "step over N x one",
        "whole over N x one",
        "GB",
    ]
    cells = [
        [
            row["kind"],
            row["runs"],
            f"{row['compile_s']:.1f} ({row['compile_one_s']:.1f})",
            f"{row['step_s']:.4f} ({row['step_one_s']:.4f})",
            f"{row['step_over_one']:.2f}",
            f"{row['step_over_n']:.3f}",
            f"{row['whole_over_n']:.3f}",
            f"{row['bytes'] / 1e9:.2f}",
        ]
        for row in rows
    ]
    shown = tabulate.tabulate(cells, headers=head, tablefmt="pipe", disable_numparse=True)
    if walls:
        ratio = walls["many"] / walls["one"]
        shown += f"\n\nHeads, in total: one run {walls['one']:.1f} s, 16 runs {walls['many']:.1f} s, {ratio:.2f} times one."
    title = f"`python benchmarks/ablation.py` on {device}, float32, jax {jax.__version__}"
    note = f"\n\n{options.note}" if options.note else ""
    (folder / f"{stem}.md").write_text(f"{title}{note}\n\n{shown}\n", encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
