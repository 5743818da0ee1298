"""What all hosts of a run must have alike, in a form in which the first difference can be named.

What explains most comes first: another version before the numbers that it makes, a file's column before its tokens.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from mtl_jax.data import corpus as corpora
from mtl_jax.experiment import tasks_to_json
from mtl_jax.training import left_out
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.hosts import Facts
from mtl_jax.training.prepare import Prepared

# Flags of jax that change numbers or programs. Others say where caches and logs are: these may differ.
FLAGS = (
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_threefry_gpu_kernel_lowering",
    "jax_random_seed_offset",
    "jax_legacy_prng_key",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_allow_f16_reductions",
    "jax_high_dynamic_range_gumbel",
    "jax_softmax_custom_jvp",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_enable_checks",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_compiler_enable_remat_pass",
    "jax_use_shardy_partitioner",
    "jax_ragged_dot_use_ragged_dot_instruction",
    "jax_enable_pgle",
    "jax_cpu_collectives_implementation",
)
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_OF_ONE_HOST = {"dump", "dir", "path", "file", "cache", "log", "count"}  # words in names of XLA's flags that may differ


def of(config: Any, folder: Path, prepared: Prepared | None) -> Facts:
    """The facts of one host.

    Args:
        config: The configuration.
        folder: The workdir.
        prepared: The run with the parameters that it begins with; None where the workdir's is done.
    """
    begun = [
        ("versions", versions()),
        ("environment", environment(os.environ)),
        ("", {name: [part["name"] for part in config[name]] for name in ("tasks", "sources", "phases")}),
        ("", config),
        (f"in {folder.name}/", workdir(folder)),
    ]
    if prepared is None:
        return begun
    splits = prepared.corpus.splits
    params: dict[str, Any] = {
        "params": prepared.params,
        **{f"teacher of {name}": teacher.params for name, teacher in prepared.teachers.items()},
        **{f"run of {name}": run.params for name, run in prepared.learned.items()},
    }
    return [
        *begun,
        *_by_source(splits, lambda part: {"rows": len(part.data), "examples": len(part.tokens)}),
        *_by_source(splits, lambda part: {"columns": columns(row.columns for row in part.data)}),
        ("trunk", {"config.json": prepared.trunk.raw, "tokenizer": tokenizer(prepared.trunk.tokenizer)}),
        *_by_source(splits, lambda part: {"tokens": arrays(part.tokens, part.types)}),
        *_by_source(splits, lambda part: {"labels": {task: arrays(labels) for task, labels in part.labels.items()}}),
        ("tasks", tasks_to_json(prepared.corpus.tasks)),
        *((name, {path: left_out.sha256(leaf) for path, leaf in left_out.flat(tree).items()}) for name, tree in params.items()),
    ]


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, and a digest of our code, which changes between releases."""
    code = hashlib.sha256()
    folder = Path(str(importlib.resources.files("mtl_jax")))
    for file in sorted(folder.rglob("*.py")):
        code.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    of_this_host = ("platform", "devices")  # a kernel's release, free cores
    found = {name: version for name, version in workdirs.versions().items() if name not in of_this_host}
    return found | {"mtl_jax's code": _shown(code)}


def environment(variables: Any) -> dict[str, Any]:
    """Flags that change numbers or programs, and this host's devices.

    Args:
        variables: The environment variables.
    """
    flags = {name: str(jax.config.values[name]) for name in FLAGS if name in jax.config.values}
    found = {name: " ".join(sorted(filter(_of_all_hosts, variables.get(name, "").split()))) for name in VARIABLES}
    devices = jax.local_devices()
    return flags | found | {"devices of a host": f"{len(devices)} x {devices[0].platform} {devices[0].device_kind}"}


def workdir(folder: Path) -> dict[str, Any]:
    """What decides where a run goes on."""
    checkpoints = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())
    names = ("config.json", "data.json", "results.json", "init_from.json")
    files = {name: _shown(hashlib.sha256((folder / name).read_bytes())) for name in names if (folder / name).is_file()}
    return {"files": {name: files.get(name, "absent") for name in names}, "checkpoints": checkpoints}


def columns(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """For each column a digest of its values, row by row."""
    digests: dict[str, Any] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            digests.setdefault(name, hashlib.sha256()).update(f"{number} {value!r}\n".encode("utf-8", "surrogatepass"))
    return {name: _shown(digest) for name, digest in digests.items()}


def arrays(*values: Any) -> str:
    """A digest of token ids or labels in their order; None counts too."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(b"\0" if value is None or not len(value) else b"\1")
        if value is not None and len(value):
            corpora.update_digest(digest, value)
    return _shown(digest)


def tokenizer(found: Any) -> str:
    """A digest of a tokenizer's vocabulary and special tokens. What it makes of the texts shows in their tokens."""
    about = [sorted(found.get_vocab().items()), sorted(map(str, found.all_special_tokens))]
    return _shown(hashlib.sha256(json.dumps(about).encode()))


def _by_source(splits: Any, about: Any) -> list[tuple[str, Any]]:
    """One entry for each source and split, in the run's order."""
    return [(f"data.{name}.{split}", about(part)) for split, parts in splits.items() for name, part in parts.items()]


def _of_all_hosts(flag: str) -> bool:
    return _OF_ONE_HOST.isdisjoint(flag.partition("=")[0].split("_"))


def _shown(digest: Any) -> str:
    return f"sha256 {digest.hexdigest()[:16]}"
