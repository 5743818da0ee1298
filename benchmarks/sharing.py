"""Cost of a training step by the way tasks share the trunk: operations by XLA's count, parameters, and seconds where asked.

    python benchmarks/sharing.py
    python benchmarks/sharing.py --repeats 5

MiniLM, 8 tasks that classify texts, 8 rows of 64 tokens in a batch, whole trunk training under equal weights; the tasks on 8
sources of their own, and all on one source. The ways are those of experiments/dissimilar.py. Operations are those of the
program that XLA is given, of one step; seconds are the median of REPEATS steps on the devices here.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tabulate
import tyro

from mtl_jax import Batching, Classification, Experiment, Phase, Source, trunks
from mtl_jax.core import trees
from mtl_jax.core.versions import installed
from mtl_jax.data.stream import stream
from mtl_jax.experiment import data_seed_of
from mtl_jax.training import mesh as meshes
from mtl_jax.training import phase_state, setup
from mtl_jax.training.build_step import jitted_step
from mtl_jax.training.train_state import StepInputs
from mtl_jax.transfer.adapters import ADAPTERS, is_own

TASKS, ROWS, ROW_LENGTH, TEXTS = 8, 8, 64, 64
WORDS = ("the", "film", "was", "a", "story", "of", "people", "who", "went", "to", "see", "how", "it", "could", "be")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        ways: Ways of experiments/dissimilar.py; empty: all that do not freeze the trunk.
        repeats: Steps that are timed; 0: none.
        out: Folder of the results.
    """

    ways: tuple[str, ...] = ()
    repeats: int = 0
    out: Path = Path(__file__).parent / "results"


def main(options: Options) -> None:
    """Measures the ways, and writes sharing.json and sharing.md."""
    dissimilar = _script("dissimilar")
    ways = options.ways or [way for way, (_, _, is_frozen) in dissimilar.WAYS.items() if not is_frozen]
    results: dict[str, Any] = {"device": str(jax.devices()[0].device_kind), "jax": installed("jax"), "ways": {}}
    for way in ways:
        part, adapters, _ = dissimilar.WAYS[way]
        entry: dict[str, Any] = {}
        for sources in (TASKS, 1):
            planned = dataclasses.replace(_experiment(sources), sharing=part, adapters=adapters)
            entry[f"{sources} sources" if sources > 1 else "1 source"] = _measure(planned, options.repeats)
        results["ways"][way] = entry
        print(way, entry, flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "sharing.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "sharing.md").write_text(_table(results) + "\n", encoding="utf-8")


def _script(name: str) -> Any:
    """A script of experiments/ as a module."""
    folder = str(Path(__file__).parent.parent / "experiments")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _experiment(sources: int) -> Experiment:
    """Eight tasks on so many sources, whose rows fill a batch alike."""
    rng = np.random.default_rng(0)

    def rows() -> list[dict[str, str]]:
        texts = [" ".join(rng.choice(WORDS, 3 * ROW_LENGTH)) for _ in range(TEXTS)]
        return [{"text": text, **{f"label_{n}": "ab"[k % 2] for n in range(TASKS)}} for k, text in enumerate(texts)]

    return Experiment(
        name="sharing",
        trunk=_script("dissimilar").experiment(_script("dissimilar").Comparison()).trunk,
        sources=tuple(Source(name=f"source_{n}", rows=rows()) for n in range(sources)),
        tasks=tuple(
            Classification(name=f"task_{n}", source=f"source_{n % sources}", column=f"label_{n}") for n in range(TASKS)
        ),
        phases=(Phase("everything", steps=10),),
        batch=Batching(rows=ROWS, row_length=ROW_LENGTH, mixture="uniform"),
        devices=1,
    )


def _measure(experiment: Experiment, repeats: int) -> dict[str, Any]:
    """Operations of a step, parameters that the sharing adds, and those of a single task; seconds of a step."""
    prepared = setup.prepare(experiment, abstract=not repeats)
    batches = stream(prepared.corpus, experiment.batch, data_seed_of(experiment), setup.mixture_phases(experiment))
    plan = prepared.plans[0]
    inputs = StepInputs(meshes.place(next(batches), meshes.by_rows(prepared.mesh)))
    batches.close()
    step = jitted_step(prepared, plan)
    lowered = step.lower(phase_state.template(prepared, 0, 0), inputs)
    added = trees.flat(prepared.params["trunk"].get(ADAPTERS, {}))
    own = sum(leaf.size for path, leaf in added.items() if is_own(path)) / TASKS
    result = {
        "flops": float(lowered.cost_analysis()["flops"]),
        "added": sum(leaf.size for leaf in added.values()),
        "own": own,
        "copies": trunks.copies(prepared.trunk),
    }
    if repeats:
        compiled, state, seconds = lowered.compile(), phase_state.initial_state(prepared), []
        for _ in range(repeats + 1):
            started = time.monotonic()
            state, metrics = compiled(state, inputs)
            jax.block_until_ready(metrics)
            seconds.append(time.monotonic() - started)
        result["seconds"] = statistics.median(seconds[1:])
    return result


def _table(results: dict[str, Any]) -> str:
    """Markdown: operations and seconds relative to hard sharing, and parameters."""
    hard = results["ways"]["hard"]
    kinds = (f"{TASKS} sources", "1 source")
    timed = "seconds" in hard[kinds[0]]
    lines = []
    for way, entry in results["ways"].items():
        line = [way, *(f"{entry[kind]['flops'] / hard[kind]['flops']:.2f}" for kind in kinds)]
        if timed:
            line += [f"{entry[kind]['seconds'] / hard[kind]['seconds']:.2f}" for kind in kinds]
        lines.append([*line, f"{entry[kinds[0]]['added']:,}", f"{entry[kinds[0]]['own']:,.0f}"])
    head = ["sharing", *(f"operations, {kind}" for kind in kinds), *((f"time, {kind}" for kind in kinds) if timed else ())]
    table = tabulate.tabulate(lines, [*head, "parameters added", "a task's own"], "github", disable_numparse=True)
    giga = ", ".join(f"{hard[kind]['flops'] / 1e9:.1f} G ({kind})" for kind in kinds)
    return f"{table}\n\nRelative to hard sharing, {giga} operations a step; {results['device']}, jax {results['jax']}."


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
