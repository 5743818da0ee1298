"""What all hosts of a run must have alike, in a form in which the first difference can be named.

What explains most comes first: another version before the numbers that it makes, a file's column before its tokens.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from mtl_jax.core import trees as left_out
from mtl_jax.core.trees import leaves_of
from mtl_jax.data import corpus as corpora
from mtl_jax.data.examples import Examples
from mtl_jax.experiment_json import tasks_to_json
from mtl_jax.pretrained.tensor_files import Location
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.hosts import Facts
from mtl_jax.training.setup import Prepared

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
        *versions().items(),
        *environment(os.environ).items(),
        *((name, [part["name"] for part in config[name]]) for name in ("tasks", "sources", "phases")),
        ("", config),
        *workdir(folder).items(),
    ]
    if prepared is None:
        return begun
    trees = [("parameter", prepared.params)]
    trees += [(f"teacher of {name}, parameter", teacher.params) for name, teacher in prepared.teachers.items()]
    trees += [(f"run of {name}, parameter", run.params) for name, run in prepared.learned.items()]
    return [
        *begun,
        *data(prepared.corpus.splits, lambda part: {"number of rows": len(part.data), "number of examples": len(part.tokens)}),
        *data(prepared.corpus.splits, lambda part: columns(row.columns for row in part.data)),
        ("trunk.config.json", prepared.trunk.raw),
        (
            "trunk.generation_config.json",
            _of_file(prepared.trunk.location and prepared.trunk.location / "generation_config.json"),
        ),
        ("tokenizer", tokenizer(prepared.trunk.tokenizer)),
        *data(prepared.corpus.splits, lambda part: {"tokens": arrays(part.tokens, part.types)}),
        *data(
            prepared.corpus.splits, lambda part: {f"labels of task {task}": arrays(each) for task, each in part.labels.items()}
        ),
        ("tasks", tasks_to_json(prepared.corpus.tasks)),
        *((f"{kind} {path}", _of_array(leaf)) for kind, tree in trees for path, leaf in leaves_of(tree).items()),
    ]


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, and a digest of our code, which changes between releases."""
    code = hashlib.sha256()
    folder = Path(str(importlib.resources.files("mtl_jax")))
    for file in sorted(folder.rglob("*.py")):
        code.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    of_this_host = ("platform", "devices")  # a kernel's release, free cores
    found = {f"version of {name}": each for name, each in workdirs.versions().items() if name not in of_this_host}
    return found | {"code of mtl_jax": _shown(code)}


def environment(variables: Any) -> dict[str, Any]:
    """Flags that change numbers or programs, and this host's devices.

    Args:
        variables: The environment variables.
    """
    flags = {name: str(jax.config.values[name]) for name in FLAGS if name in jax.config.values}
    found = {name: " ".join(sorted(filter(_of_all_hosts, variables.get(name, "").split()))) for name in VARIABLES}
    devices = jax.local_devices()
    return flags | found | {"devices of a host": f"{len(devices)} x {devices[0].platform} {devices[0].device_kind}"}


def workdir(folder: Path) -> dict[str, str]:
    """What decides where a run resumes."""
    found = {f"{name} in the workdir": _of_file(folder / name) for name in ("config.json", "data.json", "results.json")}
    steps = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())
    return found | {"checkpoints in the workdir": ", ".join(map(str, steps)) or "none"}


def data(splits: Mapping[str, Mapping[str, Examples]], about: Callable[[Examples], dict[str, Any]]) -> list[tuple[str, Any]]:
    """Facts of every source in every split.

    Args:
        splits: {split: {source: Examples}}.
        about: {name: value} of one of them.
    """
    return [
        (f"{field} of source {name}, split {split},", value)
        for split, parts in splits.items()
        for name, part in parts.items()
        for field, value in about(part).items()
    ]


def columns(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """For each column a digest of its values, row by row."""
    digests: dict[str, Any] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            digests.setdefault(name, hashlib.sha256()).update(f"{number} {value!r}\n".encode("utf-8", "surrogatepass"))
    return {f"column {name}": _shown(digest) for name, digest in digests.items()}


def arrays(*values: Any) -> str:
    """A digest of token ids or labels in their order; None counts too."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{None if value is None else len(value)} {getattr(value, 'shape', '')}\n".encode())
        if value is not None and len(value):
            corpora.update_digest(digest, value)
    return _shown(digest)


def tokenizer(found: Any) -> str:
    """A digest of a tokenizer's vocabulary and special tokens. What it makes of the texts shows in their tokens."""
    about = [sorted(found.get_vocab().items()), sorted(map(str, found.all_special_tokens))]
    return _shown(hashlib.sha256(json.dumps(about).encode()))


def _of_file(path: Location | None) -> str:
    return _shown(hashlib.sha256(path.read_bytes())) if path is not None and path.is_file() else "absent"


def _of_array(leaf: Any) -> str:
    return f"sha256 {left_out.sha256(leaf)[:16]}"


def _of_all_hosts(flag: str) -> bool:
    return _OF_ONE_HOST.isdisjoint(flag.partition("=")[0].split("_"))


def _shown(digest: Any) -> str:
    return f"sha256 {digest.hexdigest()[:16]}"
