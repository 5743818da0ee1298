"""Cost of a training step on a TPU, by the TPU's own compiler: cycles, share of the chip's arithmetic, memory.

    python benchmarks/accelerator.py rules       # every weighting rule beside equal, 8 tasks of 1,024 tokens
    python benchmarks/accelerator.py trunks      # plain training of trunks of MiniLM's and BERT-base's size
    python benchmarks/accelerator.py ablations   # N trainings of MiniLM's size in one program, 8 rows of 128 tokens each

It needs the plan-tpu extra and no TPU; nothing is trained. The numbers are the compiler's estimates for one chip, and with them
what our kernels take by their operations or bytes; there is none for sorting and scattering. A compilation takes a minute or
two of a core, and a result that is in the file in --out is not made again, so that the command can be stopped and started.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tabulate
import tyro
import weighting as on_a_device

from mtl_jax import Optimizer, ParamRule, weighting
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.models.kernels import with_kernels
from mtl_jax.planning import program_cost
from mtl_jax.planning.run_plan import PRODUCT
from mtl_jax.planning.topologies import topology
from mtl_jax.training import mesh as meshes
from mtl_jax.training.phase_plan import needs_task_gradients
from mtl_jax.training.train_state import StepInputs
from mtl_jax.transfer import freezing, optimizer

MINILM = on_a_device.SIZES
BERT_BASE = EncoderConfig(30522, 768, 12, 12, 3072, 512, dropout=0.0, attention_dropout=0.0)
# {name: sizes of the trunk, tokens a row, tokens of a batch}
TRUNKS = {
    "MiniLM, rows of 128": (MINILM, 128, 8192),
    "MiniLM, rows of 512": (MINILM, 512, 8192),
    "MiniLM with dropout, rows of 128": (dataclasses.replace(MINILM, dropout=0.1, attention_dropout=0.1), 128, 8192),
    "BERT-base, rows of 128": (BERT_BASE, 128, 8192),
    "BERT-base, rows of 512": (BERT_BASE, 512, 8192),
}
TASKS, TOKENS, ROW = 8, 1024, 64
RUNS = {"1 run": 1, "8 runs": 8}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled.

    Attributes:
        table: Which table.
        topology: The kind of chip; one of its chips is planned for.
        names: Rules or trunks; empty: all.
        again: Compile what has a result already, too.
        out: Folder of the results.
    """

    table: tyro.conf.Positional[Literal["rules", "trunks", "ablations"]]
    topology: str = "v5e:2x2"
    names: tuple[str, ...] = ()
    again: bool = False
    out: str = "benchmarks/results"


def main(options: Options) -> None:
    """Compiles every case of a table that has no result, and writes the table after each."""
    path = Path(options.out) / f"accelerator-{options.table}.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    result |= {"topology": options.topology, "jax": jax.__version__}
    names = {"rules": _rules(), "trunks": list(TRUNKS), "ablations": list(RUNS)}[options.table]
    for place, name in enumerate(names):
        if (options.names and place and name not in options.names) or (name in result["rows"] and not options.again):
            continue
        if options.table == "trunks":
            result["rows"][name] = cost(options.topology, *TRUNKS[name])
        elif options.table == "ablations":
            result["rows"][name] = cost(options.topology, MINILM, 128, TOKENS, runs=RUNS[name])
        else:
            result["rows"][name] = cost(options.topology, MINILM, ROW, TOKENS, name, TASKS)
        print(name, result["rows"][name], flush=True)
        write(path, result, options)


def _rules() -> list[str]:
    """The rules that need no options, equal first."""
    return ["equal", *(name for name in weighting.RULES if name != "equal" and not weighting.required_options(name))]


def cost(
    name: str, sizes: EncoderConfig, row: int, tokens: int, rule: str = "equal", tasks: int = 1, runs: int = 1
) -> dict[str, Any]:
    """What the compiler says of a step: cycles, share of the arithmetic, bytes.

    Args:
        name: A topology.
        sizes: Of the trunk, in bfloat16.
        row: Tokens of a row.
        tokens: Tokens of a task.
        rule: A weighting rule.
        tasks: The number of tasks, each with rows of its own.
        runs: Trainings in one program, of the same batch.
    """
    chosen = topology(name)
    mesh = jax.make_mesh((1,), (meshes.DATA,), axis_types=(jax.sharding.AxisType.Auto,), devices=chosen.devices[:1])
    encoder = with_kernels(Encoder(sizes, jnp.bfloat16), "auto", mesh)
    case = on_a_device.make_case(encoder, tasks, tokens, row)
    case = case._replace(optimizer=training_optimizer(jax.eval_shape(case.params)))
    made = weighting.make(rule)
    state, step = jax.eval_shape(lambda: case.state(made)), case.step(made)
    if runs > 1:
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((runs, *leaf.shape), leaf.dtype), state)
        step = jax.vmap(step, in_axes=(0, None))

    def shapes(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    inputs = shapes(StepInputs(case.batch), meshes.by_rows(mesh))
    program = jax.jit(step, donate_argnums=0, out_shardings=meshes.replicated(mesh))
    began = time.perf_counter()
    compiled = program.lower(shapes(state, meshes.replicated(mesh)), inputs).compile()
    seconds = time.perf_counter() - began
    estimate = program_cost.read(compiled.as_text())
    chip = chosen.chip
    assert estimate.cycles is not None
    assert chip.clock is not None
    kernels = estimate.fused_cycles(PRODUCT * chip.flops / chip.clock, chip.memory_bandwidth / chip.clock)
    flops = compiled.cost_analysis()["flops"]
    return {
        "cycles": estimate.cycles + kernels,
        "kernels": kernels,
        "gflop": flops / 1e9,
        "share": flops / (estimate.cycles + kernels) / (chip.flops / chip.clock),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "compile_s": seconds,
        "task_gradients": needs_task_gradients(made),
        "places": dict(list(estimate.places.items())[:10]),
    }


def training_optimizer(params: Any) -> optax.GradientTransformation:
    """What training makes of Optimizer() for parameters that train from the first phase on."""
    decided = freezing.decide(params, (ParamRule(".*"),))
    return optimizer.build(Optimizer(), decided, 1e-4, 1000, jax.tree.map(lambda _: 0, params))


def write(path: Path, result: dict[str, Any], options: Options) -> None:
    """Writes the JSON file, and the table beside it as .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows, first = [], next(iter(result["rows"].values()))
    for name, row in result["rows"].items():
        rows.append(
            [
                name,
                "yes" if row["task_gradients"] else "",
                f"{row['cycles'] / 1e6:.1f}",
                f"{row['kernels'] / 1e6:.1f}",
                f"{row['cycles'] / first['cycles']:.2f}",
                f"{row['gflop']:.0f}",
                f"{row['share']:.0%}",
                f"{row['temporaries'] / 1e6:,.0f}",
                f"{row['temporaries'] / first['temporaries']:.2f}",
            ]
        )
    beside = "over 1 run" if options.table == "ablations" else "over equal"
    head = ["", "task gradients", "million cycles", "of them kernels", beside, "GFLOP", "of the chip", "temporaries MB", beside]
    kept = {"rules": range(len(head)), "trunks": [0, 2, 3, 5, 6, 7], "ablations": [0, *range(2, 9)]}[options.table]
    body = tabulate.tabulate(
        [[row[place] for place in kept] for row in rows],
        headers=[head[place] for place in kept],
        tablefmt="pipe",
        disable_numparse=True,
    )
    case = {
        "rules": f"{TASKS} tasks of {TOKENS} tokens in rows of {ROW}, trunk of MiniLM's size",
        "trunks": "one task of 8,192 tokens",
        "ablations": f"one task of {TOKENS} tokens in rows of 128, trunk of MiniLM's size",
    }[options.table]
    title = f"Estimates of the compiler for one chip of {result['topology']}, bfloat16, jax {result['jax']}; a step, {case}."
    path.with_suffix(".md").write_text(f"{title}\n\n{body}\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(tyro.cli(Options, description=__doc__))
