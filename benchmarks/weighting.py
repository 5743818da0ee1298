"""Time of a step under each weighting rule over that of plain training, on a MiniLM-size encoder; and TorchJD's.

    python benchmarks/weighting.py
    python benchmarks/weighting.py --peers            # also TorchJD, from the peers extra
    python benchmarks/weighting.py --cases 8x1024 --rules equal upgrad --dtype bfloat16

A case is TASKSxTOKENS: a number of tasks, each with its own rows of 64 tokens, and the number of tokens per task. All rules
have the same batch and the same parameters, forward, backward and AdamW; the repeats go through all rules in turn, and the time
is the median. TorchJD is used as its documentation shows for a shared trunk, mtl_backward from the features of all rows: one
backward pass per task. Writes a table and a JSON file for each case to --out.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate
import tyro

from mtl_jax import Classification, weighting
from mtl_jax.core.errors import count
from mtl_jax.data.batches import Batch
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.models.layers import Head
from mtl_jax.training import gram_gradient, task_gradients
from mtl_jax.training.forward import encode_tokens
from mtl_jax.training.gradient import make_backward
from mtl_jax.training.phase_plan import needs_task_gradients
from mtl_jax.training.step import make_gradient_fn, make_train_step
from mtl_jax.training.train_state import StepInputs, TrainState
from mtl_jax.weighting import Rule

SIZES = EncoderConfig(30522, 384, 6, 12, 1536, 512, dropout=0.0, attention_dropout=0.0)  # MiniLM-L6
LENGTH = 64
LABELS = ("0", "1", "2", "3")
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
# {rule: its name in TorchJD}
TORCHJD = {"mgda": "MGDA", "upgrad": "UPGrad", "dualproj": "DualProj", "pcgrad": "PCGrad", "aligned": "AlignedMTL"}
TORCHJD |= {"config": "ConFIG", "imtl_g": "IMTLG", "graddrop": "GradDrop"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The measurements.

    Attributes:
        cases: TASKSxTOKENS.
        rules: Names of rules; equal is always measured first. Empty: all rules with defaults.
        repeats: Number of timed steps of each rule.
        peers: Measure TorchJD, too.
        peer_repeats: Number of timed steps of each of its aggregators.
        dtype: Compute dtype.
        out: Folder of the results.
        note: A line for the result files, such as what else ran on the machine.
    """

    cases: tuple[str, ...] = ("2x1024", "8x1024", "32x256")
    rules: tuple[str, ...] = ()
    repeats: int = 5
    peers: bool = False
    peer_repeats: int = 2
    dtype: str = "float32"
    out: str = "benchmarks/results"
    note: str = ""


def main(options: Options) -> None:
    """Measures every case, prints and writes the tables."""
    rules = options.rules or tuple(name for name in weighting.RULES if not weighting.required_options(name))
    rules = ("equal", *[name for name in rules if name != "equal"])
    device = f"{jax.devices()[0].device_kind} x{jax.device_count()}, {os.cpu_count()} CPU cores"
    facts = {"device": device, "dtype": options.dtype, "jax": jax.__version__, "python": platform.python_version()}
    for case in options.cases:
        K, tokens = (int(part) for part in case.split("x"))
        measured = measure(K, tokens, rules, options)
        if options.peers:
            measured += measure_torchjd(K, tokens, options)
        write(case, facts | {"repeats": options.repeats, "note": options.note, "rows": measured}, Path(options.out))


def write(case: str, result: dict[str, Any], folder: Path) -> None:
    """Writes weighting-BACKEND-CASE.json, and the table as .md."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"weighting-{jax.default_backend()}-{case}"
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    steps = count(result["repeats"], "interleaved step")
    title = f"{result['device']}, {result['dtype']}, jax {result['jax']}, medians of {steps}"
    note = f"\n\n{result['note']}" if result["note"] else ""
    (folder / f"{stem}.md").write_text(f"{title}{note}\n\n{table(result['rows'])}\n", encoding="utf-8")


def table(measured: list[dict[str, Any]]) -> str:
    """A markdown table of all rows."""
    head = ["tasks x tokens", "rule", "step s", "over equal", "GFLOP", "over equal", "compile s"]
    rows = []
    for row in measured:
        flops = [f"{row['flops'] / 1e9:.1f}", f"{row['flops_over_equal']:.3f}"] if "flops" in row else ["", ""]
        compile_s = f"{row['compile_s']:.1f}" if "compile_s" in row else ""
        rows.append([row["case"], row["rule"], f"{row['step_s']:.3f}", f"{row['over_equal']:.3f}", *flops, compile_s])
    return tabulate.tabulate(rows, headers=head, tablefmt="pipe", disable_numparse=True)


def measure(K: int, tokens: int, rules: tuple[str, ...], options: Options) -> list[dict[str, Any]]:
    """A row of the table for every rule."""
    case = make_case(Encoder(SIZES, jnp.dtype(options.dtype)), K, tokens, LENGTH)
    params = case.params()
    opt_state = OPTIMIZER.init(params)
    if K < 3:  # of two values none is left
        rules = tuple(name for name in rules if name != "trimmed_mean")
    programs: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in rules:
        rule = weighting.make(name)
        # One optimizer state for all rules, which would not fit into memory with one each.
        state, step, batch = case.state(rule, params)._replace(opt_state=opt_state), case.step(rule), case.batch
        began = time.perf_counter()
        program = jax.jit(step).lower(state, StepInputs(batch)).compile()
        facts[name] = {"compile_s": time.perf_counter() - began}
        facts[name]["flops"] = (program.cost_analysis() or {}).get("flops", float("nan"))
        if needs_task_gradients(rule) and jax.default_backend() == "cpu":
            # XLA counts the body of a loop once, but on CPU a loop makes the Gram matrix, chunk by chunk.
            size = sum(leaf.size for leaf in jax.tree.leaves(params["trunk"]))
            apart = SIZES.vocab_size * SIZES.hidden_size if rule.transform is None else 0  # of the table, see token_gradients
            facts[name]["flops"] += 2 * K**2 * (size - apart)
        programs[name] = lambda program=program, state=state, batch=batch: jax.block_until_ready(
            program(state, StepInputs(batch))[1]
        )
        programs[name]()
    times: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(options.repeats):
        for name, run in programs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in times.items()}
    measured = [
        {
            "case": f"{K} x {tokens}",
            "rule": name,
            "step_s": median[name],
            "over_equal": median[name] / median["equal"],
            "times_s": times[name],
            "flops_over_equal": facts[name]["flops"] / facts["equal"]["flops"],
            **facts[name],
        }
        for name in rules
    ]
    print(table(measured), flush=True)
    return measured


class Case(NamedTuple):
    """A training of tasks with rows of their own.

    Attributes:
        encoder: The trunk.
        tasks: The tasks.
        batch: A batch, blocks by task.
        optimizer: The optimizer; optax's own, which is what PyTorch's step has, unless another one is given.
    """

    encoder: Encoder
    tasks: tuple[Classification, ...]
    batch: Batch
    optimizer: optax.GradientTransformation = OPTIMIZER

    def params(self) -> Any:
        """New parameters."""
        trunk = jax.jit(self.encoder.init)(jax.random.key(0), self.batch.tokens[:1])["params"]
        width = self.encoder.config.hidden_size
        head = jax.jit(Head(len(LABELS), 0).init)(jax.random.key(1), jnp.zeros((1, 1, width)))["params"]
        return {"trunk": trunk, "heads": {task.name: head for task in self.tasks}}

    def state(self, rule: Rule, params: Any = None) -> TrainState:
        """The state before the first step."""
        params = self.params() if params is None else params
        rule_state = gram_gradient.init_rule(rule, [task.name for task in self.tasks], params["trunk"])
        key = jax.random.key_data(jax.random.key(2))
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), rule_state, key)

    def step(self, rule: Rule) -> Callable[..., Any]:
        """The train step, as training makes it for a rule."""
        mask = jax.tree.map(lambda leaf: True, jax.eval_shape(self.params))
        encode = encode_tokens(self.encoder)
        if not needs_task_gradients(rule):
            backward = make_backward(encode, self.tasks, trains_trunk=True)
        else:
            rows = len(self.batch.tokens) // len(self.tasks)
            layout = task_gradients.layout(self.tasks, {task.source: rows for task in self.tasks}, fixed=True)
            over = gram_gradient.check(jax.eval_shape(self.params), mask, "trunk")
            backward = gram_gradient.make_backward(encode, self.tasks, rule, layout, over, only_looks_up=True)
        return make_train_step(make_gradient_fn(backward, rule), self.optimizer, mask)


def make_case(encoder: Encoder, K: int, tokens: int, length: int) -> Case:
    """The training of K tasks, each with rows of so many tokens."""
    tasks = tuple(Classification(name=f"task{k:02d}", source=f"source{k:02d}", labels=LABELS) for k in range(K))
    return Case(encoder, tasks, make_batch(K, tokens // length, length))


def make_batch(K: int, rows: int, length: int = LENGTH) -> Batch:
    """Full rows of one example each, blocks by task; random ids and labels."""
    rng = np.random.default_rng(0)
    R = K * rows
    task_R = np.repeat(np.arange(K), rows)
    label_Rx1 = rng.integers(0, len(LABELS), (R, 1)).astype(np.int32)
    return Batch(
        tokens=jnp.asarray(rng.integers(1000, SIZES.vocab_size, (R, length)), jnp.int32),
        segments=jnp.ones((R, length), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (R, length)),
        index=jnp.arange(R, dtype=jnp.int32)[:, None],
        source=jnp.asarray(task_R, jnp.int32),
        labels={f"task{k:02d}": jnp.where(task_R[:, None] == k, label_Rx1, -1) for k in range(K)},
    )


def measure_torchjd(K: int, tokens: int, options: Options) -> list[dict[str, Any]]:
    """The same step in PyTorch: transformers' BERT of the same size, sum of losses, then TorchJD's aggregators."""
    import torch
    import torchjd.aggregation
    from torchjd.autojac import jac_to_grad, mtl_backward
    from transformers import BertConfig, BertModel

    rows = tokens // LENGTH
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = BertConfig(
        hidden_size=SIZES.hidden_size,
        num_hidden_layers=SIZES.num_layers,
        num_attention_heads=SIZES.num_heads,
        intermediate_size=SIZES.intermediate_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    trunk = BertModel(config, add_pooling_layer=False).to(device)
    heads = torch.nn.ModuleList(torch.nn.Linear(SIZES.hidden_size, len(LABELS)) for _ in range(K)).to(device)
    optimizer = torch.optim.AdamW([*trunk.parameters(), *heads.parameters()], lr=1e-4)
    batch = make_batch(K, rows)
    ids_RxT = torch.tensor(np.asarray(batch.tokens), dtype=torch.long, device=device)
    rng = np.random.default_rng(0)
    label_R = torch.tensor(rng.integers(0, len(LABELS), K * rows), device=device)

    def step(aggregator: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            pooled_RxH = trunk(ids_RxT).last_hidden_state.mean(dim=1)
            blocks = zip(heads, pooled_RxH.split(rows), label_R.split(rows), strict=True)
            losses = [torch.nn.functional.cross_entropy(head(pooled), labels) for head, pooled, labels in blocks]
        if aggregator is None:
            sum(losses).backward()
        else:
            # One backward pass at a time: all at once would need K times the memory of the activations' gradients.
            mtl_backward(losses, features=pooled_RxH, parallel_chunk_size=1)
            jac_to_grad(trunk.parameters(), aggregator)
        torch.nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    names = {"equal": None} | {ours: getattr(torchjd.aggregation, theirs)() for ours, theirs in TORCHJD.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    step(None)
    for _ in range(options.peer_repeats):
        for name, aggregator in names.items():
            began = time.perf_counter()
            step(aggregator)
            times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in times.items()}
    version = f"torch {torch.__version__}, torchjd {importlib.metadata.version('torchjd')}"
    measured = [
        {
            "case": f"{K} x {tokens}",
            "rule": f"TorchJD {TORCHJD[name]}" if name != "equal" else f"PyTorch, sum ({version})",
            "step_s": median[name],
            "over_equal": median[name] / median["equal"],
            "times_s": times[name],
        }
        for name in names
    ]
    print(table(measured), flush=True)
    return measured


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
