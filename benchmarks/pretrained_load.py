"""Load time and peak memory of a checkpoint of BERT-base's size, in each file format, and of a decoder of Llama 3.2 1B's.

    python benchmarks/pretrained_load.py

Writes random checkpoints (109 million parameters, 438 MB in float32; 1.24 billion, 2.5 GB in bfloat16) into a temporary
directory, and opens each form in a new process for each repetition. Peak memory is the process's largest resident set minus
that before the checkpoint is opened, with jax started and mtl_jax imported; "of the parameters" divides it by their size in
float32. Results go to benchmarks/results/pretrained_load.json and .md. Writing the .bin forms and the decoder needs torch;
without torch they are left out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tabulate import tabulate

REPETITIONS = 3
BERT_BASE = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}

LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}

# Runs in a new process; prints seconds, and bytes of resident memory before and at the peak.
MEASURE = """
import json, resource, sys, time
import jax
from mtl_jax import pretrained
jax.block_until_ready(jax.numpy.zeros(1))
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) * 1024
before, start = resident(), time.perf_counter()
checkpoint = pretrained.load(sys.argv[1])
jax.block_until_ready(checkpoint.params)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))
print(json.dumps({"seconds": seconds, "before": before, "peak": peak, "parameters": size}))
"""


def write(folder: Path) -> dict[str, Path]:
    """Writes the checkpoint in every form: {form: directory}."""
    import jax

    from mtl_jax import pretrained
    from mtl_jax.pretrained import families
    from mtl_jax.pretrained.checkpoint import Checkpoint
    from mtl_jax.pretrained.tensor_files import open_safetensors

    family = families.of(BERT_BASE, "here")
    config = family.config(BERT_BASE, "here")
    model = family.build(config, None, np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 1), np.int32)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    checkpoint = Checkpoint(model, params, config, BERT_BASE, None, folder)
    forms = {name: folder / name for name in ("safetensors", "safetensors, 5 shards")}
    pretrained.save(forms["safetensors"], checkpoint)
    pretrained.save(forms["safetensors, 5 shards"], checkpoint, shard_size=100_000_000)
    if importlib.util.find_spec("torch"):
        import torch

        tensors = open_safetensors(forms["safetensors"] / "model.safetensors")
        state = {name: torch.from_numpy(np.array(tensor.read())) for name, tensor in tensors.items()}
        halves = {name: tensor.half() for name, tensor in state.items()}
        for form, content, old in (
            (".bin", state, False),
            (".bin, format of 2020", state, True),
            (".bin, float16", halves, False),
        ):
            forms[form] = folder / form
            forms[form].mkdir()
            (forms[form] / "config.json").write_text(json.dumps(BERT_BASE))
            torch.save(content, forms[form] / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        forms["Llama 1B, safetensors, bfloat16"] = folder / "Llama 1B, safetensors, bfloat16"
        _write_llama(forms["Llama 1B, safetensors, bfloat16"])
    return forms


def _write_llama(folder: Path) -> None:
    import torch
    import transformers

    torch.set_default_dtype(torch.bfloat16)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_1B)).save_pretrained(folder)


def measure(folder: Path) -> dict[str, float]:
    """One load in a new process. Its files were just read or written, so they come from the page cache."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "seconds": measured["seconds"],
        "file_mb": size / 1e6,
        "parameters_mb": measured["parameters"] / 1e6,
        "peak_mb": (measured["peak"] - measured["before"]) / 1e6,
    }


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as root:
        subprocess.run([sys.executable, __file__, "write", root], check=True)
        for folder in sorted(Path(root).iterdir()):
            runs = [measure(folder) for _ in range(REPETITIONS)]
            row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            rows.append({"form": folder.name, **row, "of_parameters": row["peak_mb"] / row["parameters_mb"]})
            print(rows[-1], flush=True)
    host = f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "pretrained_load.json").write_text(json.dumps({"host": host, "rows": rows}, indent=2) + "\n")
    names = ["form", "median load, s", "file, MB", "parameters, MB", "peak memory over before, MB", "of the parameters"]
    table = tabulate([list(row.values()) for row in rows], names, "github", floatfmt=("", ".2f", ".0f", ".0f", ".0f", ".2f"))
    text = (
        f"`python benchmarks/pretrained_load.py` on {host}; median of {REPETITIONS} fresh processes, files in the page cache.\n"
    )
    (results / "pretrained_load.md").write_text(f"{text}\n{table}\n")
    print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(Path(sys.argv[2]))
    else:
        main()
