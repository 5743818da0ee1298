"""Time and memory of a step when only a part trains: all, the top two layers, LoRA, heads on a frozen trunk or its features.

    python benchmarks/transfer.py
    python benchmarks/transfer.py --trunks minilm --ways full lora

Trunks of the sizes of MiniLM-L6 and BERT-base, random parameters; one classification task; full rows of 64 tokens. Every way
has the same batch and AdamW, and the step is that of training in such a phase: forward, backward and update. The repeats go
through all ways in turn, and the time is the median. Memory is what XLA plans for the step: its arguments (parameters,
optimizer state, batch) and temporary buffers, the new state in place of the old. Writes transfer-BACKEND.json and .md to --out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate
import tyro

from mtl_jax import Classification, Lora, ParamRule, adapters_only, weighting
from mtl_jax.core import trees
from mtl_jax.core.errors import count, unknown
from mtl_jax.data.batches import Batch
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.models.layers import Head
from mtl_jax.training.forward import cached_features, encode_tokens
from mtl_jax.training.gradient import make_backward
from mtl_jax.training.step import make_gradient_fn, make_train_step
from mtl_jax.training.train_state import StepInputs, create
from mtl_jax.transfer import freezing, top_layers
from mtl_jax.transfer.adapters import adapt

TRUNKS = {
    "minilm": EncoderConfig(30522, 384, 6, 12, 1536, 512, dropout=0.0, attention_dropout=0.0),
    "bert-base": EncoderConfig(30522, 768, 12, 12, 3072, 512, dropout=0.0, attention_dropout=0.0),
}
LENGTH = 64
TASK = Classification(name="task", source="source", labels=("0", "1", "2", "3"))
HEADS_ONLY = (ParamRule("heads/.*"), ParamRule("trunk/.*", train=False))
LORA = Lora(name="lora", rank=8, alpha=16.0)
WAYS = ("full", "top two layers", "lora", "frozen trunk", "cached features")


@dataclasses.dataclass(frozen=True)
class Options:
    """The measurements.

    Attributes:
        trunks: minilm, bert-base.
        ways: The ways; the others are compared with the first, full.
        rows: Rows of a batch.
        repeats: Number of timed steps of each way; for cached features, whose steps are short, a hundred times as many.
        dtype: Compute dtype.
        out: Folder of the results.
        note: A line for the result files, such as what else ran on the machine.
    """

    trunks: tuple[str, ...] = tuple(TRUNKS)
    ways: tuple[str, ...] = WAYS
    rows: int = 16
    repeats: int = 5
    dtype: str = "float32"
    out: str = "benchmarks/results"
    note: str = ""


class Way:
    """A compiled step and its state."""

    def __init__(self, name: str, sizes: EncoderConfig, batch: Batch, dtype: str):
        encoder = Encoder(sizes, jnp.dtype(dtype))
        module: Any = adapt(encoder, [LORA]) if name == "lora" else encoder
        trunk = jax.jit(module.init)(jax.random.key(0), batch.tokens[:1])["params"]
        head = jax.jit(Head(len(TASK.labels), 0).init)(jax.random.key(1), jnp.zeros((1, 1, sizes.hidden_size)))["params"]
        params = {"trunk": trunk, "heads": {TASK.name: head}}
        rules = {
            "full": (ParamRule(".*"),),
            "top two layers": top_layers(2, sizes.num_layers),
            "lora": adapters_only(),
            "frozen trunk": HEADS_ONLY,
            "cached features": HEADS_ONLY,
        }[name]
        mask = freezing.trainable(params, rules)
        trained, _ = trees.split(params, mask)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
        state = create(params, optimizer.init(trained), (), 2)
        cached = name == "cached features"
        features = jnp.zeros((len(batch.tokens), sizes.hidden_size)) if cached else None
        encode = cached_features if cached else encode_tokens(module)
        backward = make_backward(encode, (TASK,), trains_trunk=any(jax.tree.leaves(mask["trunk"])))
        gradients = make_gradient_fn(backward, weighting.make("equal"))
        step = jax.jit(make_train_step(gradients, optimizer, mask), donate_argnums=0)
        self.program = step.lower(state, StepInputs(batch, features)).compile()
        self.state, self.inputs = jax.block_until_ready(state), StepInputs(batch, features)
        memory = self.program.memory_analysis()
        self.facts = {
            "trained": sum(leaf.size for leaf in jax.tree.leaves(trained)),
            "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
            "memory_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
            "flops": (self.program.cost_analysis() or {}).get("flops", float("nan")),
        }

    def seconds(self, steps: int) -> float:
        """Seconds of a step: the mean over a number of steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.program(self.state, self.inputs)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / steps


def main(options: Options) -> None:
    """Measures every trunk, prints and writes the tables."""
    for names, known in ((options.trunks, tuple(TRUNKS)), (options.ways, WAYS)):
        for name in names:
            if name not in known:
                raise unknown("--trunks or --ways", name, known)
    device = f"{jax.devices()[0].device_kind} x{jax.device_count()}, {len(os.sched_getaffinity(0))} CPU cores"
    measured = [row for trunk in options.trunks for row in measure(trunk, options)]
    facts = {"device": device, "dtype": options.dtype, "jax": jax.__version__, "python": platform.python_version()}
    result = {**facts, "rows": options.rows, "repeats": options.repeats, "note": options.note, "found": measured}
    folder, stem = Path(options.out), f"transfer-{jax.default_backend()}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = (
        f"`python benchmarks/transfer.py` on {device}, {options.dtype}, jax {jax.__version__}: batches of {options.rows} rows "
    )
    title += f"of {LENGTH} tokens, medians of {count(options.repeats, 'interleaved step')}"
    note = f"\n\n{options.note}" if options.note else ""
    (folder / f"{stem}.md").write_text(f"{title}{note}\n\n{table(measured)}\n", encoding="utf-8")
    print(table(measured))


def measure(trunk: str, options: Options) -> list[dict[str, Any]]:
    """A row of the table for every way."""
    rng = np.random.default_rng(0)
    sizes, R = TRUNKS[trunk], options.rows
    batch = Batch(
        tokens=jnp.asarray(rng.integers(1000, sizes.vocab_size, (R, LENGTH)), jnp.int32),
        segments=jnp.ones((R, LENGTH), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (R, LENGTH)),
        index=jnp.arange(R, dtype=jnp.int32)[:, None],
        source=jnp.zeros(R, jnp.int32),
        labels={TASK.name: jnp.asarray(rng.integers(0, len(TASK.labels), (R, 1)), jnp.int32)},
    )
    ways = {name: Way(name, sizes, batch, options.dtype) for name in options.ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.seconds(1)
    for _ in range(options.repeats):
        for name, way in ways.items():
            times[name].append(way.seconds(100 if name == "cached features" else 1))
    median = {name: statistics.median(values) for name, values in times.items()}
    first = options.ways[0]
    return [
        {
            "trunk": trunk,
            "way": name,
            "step_s": median[name],
            "over_full": median[name] / median[first],
            "rows_per_s": R / median[name],
            "optimizer_over_full": way.facts["optimizer_bytes"] / ways[first].facts["optimizer_bytes"],
            "times_s": times[name],
            **way.facts,
        }
        for name, way in ways.items()
    ]


def table(measured: list[dict[str, Any]]) -> str:
    """A markdown table of all rows."""
    head = ["trunk", "what trains", "parameters", "step s", "over full", "rows/s", "memory MB", "optimizer MB", "over full"]
    rows = []
    for row in measured:
        sizes = [f"{row['memory_bytes'] / 1e6:.0f}", f"{row['optimizer_bytes'] / 1e6:.2f}", f"{row['optimizer_over_full']:.2%}"]
        times = [f"{row['step_s']:.4f}", f"{row['over_full']:.4f}", f"{row['rows_per_s']:,.0f}"]
        rows.append([row["trunk"], row["way"], f"{row['trained']:,}", *times, *sizes])
    return tabulate.tabulate(rows, headers=head, tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
