"""The facts of a host that must be the same on all hosts of a run, so that an error can name the first difference.

The facts that explain most come first: a version before the numbers that depend on it, a column of a file before its tokens.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from mtl_jax.core import digests
from mtl_jax.core.trees import leaves_of
from mtl_jax.data import corpus as corpora
from mtl_jax.data.examples import Examples
from mtl_jax.pretrained.tensor_files import Location
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.experiment_json import tasks_to_json
from mtl_jax.training.hosts import Facts
from mtl_jax.training.prepared import Prepared

# Flags of jax that change numbers or programs. Other flags, such as the folders of caches and logs, may differ.
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
_LOCAL_WORDS = {"dump", "dir", "path", "file", "cache", "log", "count"}  # in names of XLA's flags that may differ


def facts(config: Any, folder: Path, prepared: Prepared | None) -> Facts:
    """The facts of this host.

    Args:
        config: The configuration.
        folder: The workdir.
        prepared: The run with its initial parameters; None where the workdir's run is finished.
    """
    of_environment = [
        *versions().items(),
        *environment(os.environ).items(),
        *((name, [part["name"] for part in config[name]]) for name in ("tasks", "sources", "phases")),
        ("", config),
        *workdir_facts(folder).items(),
    ]
    if prepared is None:
        return of_environment
    splits, trunk = prepared.corpus.splits, prepared.trunk
    models = [("parameter", prepared.params)]
    models += [(f"teacher of {name}, parameter", teacher.params) for name, teacher in prepared.teachers.items()]
    models += [(f"run of {name}, parameter", run.params) for name, run in prepared.anchor_runs.items()]
    generation_config = trunk.location and trunk.location / "generation_config.json"
    return [
        *of_environment,
        *source_facts(splits, lambda part: {"number of rows": len(part.data), "number of examples": len(part.tokens)}),
        *source_facts(splits, lambda part: column_digests(row.columns for row in part.data)),
        ("trunk.config.json", trunk.raw),
        ("trunk.generation_config.json", _file_digest(generation_config)),
        ("tokenizer", tokenizer_digest(trunk.tokenizer)),
        *source_facts(splits, lambda part: {"tokens": array_digest(part.tokens, part.types)}),
        *source_facts(
            splits, lambda part: {f"labels of task {task}": array_digest(labels) for task, labels in part.labels.items()}
        ),
        ("tasks", tasks_to_json(prepared.corpus.tasks)),
        *(
            (f"{kind} {path}", f"sha256 {digests.of_array(leaf)[:16]}")
            for kind, tree in models
            for path, leaf in leaves_of(tree).items()
        ),
    ]


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, and a digest of our code, which changes between releases."""
    code = hashlib.sha256()
    folder = Path(str(importlib.resources.files("mtl_jax")))
    for file in sorted(folder.rglob("*.py")):
        code.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    may_differ = ("platform", "devices")  # a kernel's release, free cores
    packages = {f"version of {name}": text for name, text in workdirs.versions().items() if name not in may_differ}
    return packages | {"code of mtl_jax": _shortened(code)}


def environment(variables: Mapping[str, str]) -> dict[str, Any]:
    """Flags that change numbers or programs, and this host's devices.

    Args:
        variables: The environment variables.
    """
    jax_flags = {name: str(jax.config.values[name]) for name in FLAGS if name in jax.config.values}
    flags = {name: " ".join(sorted(filter(_must_be_same, variables.get(name, "").split()))) for name in VARIABLES}
    devices = jax.local_devices()
    return jax_flags | flags | {"devices of a host": f"{len(devices)} x {devices[0].platform} {devices[0].device_kind}"}


def workdir_facts(folder: Path) -> dict[str, str]:
    """The files of a workdir that decide where a run resumes."""
    digests = {f"{name} in the workdir": _file_digest(folder / name) for name in ("config.json", "data.json", "results.json")}
    steps = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())
    return digests | {"checkpoints in the workdir": ", ".join(map(str, steps)) or "none"}


def source_facts(
    splits: Mapping[str, Mapping[str, Examples]], describe: Callable[[Examples], dict[str, Any]]
) -> list[tuple[str, Any]]:
    """Facts of every source in every split.

    Args:
        splits: {split: {source: Examples}}.
        describe: Examples -> {name: value}.
    """
    return [
        (f"{field} of source {name}, split {split},", value)
        for split, parts in splits.items()
        for name, part in parts.items()
        for field, value in describe(part).items()
    ]


def column_digests(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """For each column a digest of its values, row by row."""
    digests: dict[str, Any] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            digests.setdefault(name, hashlib.sha256()).update(f"{number} {value!r}\n".encode("utf-8", "surrogatepass"))
    return {f"column {name}": _shortened(digest) for name, digest in digests.items()}


def array_digest(*values: Any) -> str:
    """A digest of token ids or labels in their order; None counts, too."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{None if value is None else len(value)} {getattr(value, 'shape', '')}\n".encode())
        if value is not None and len(value):
            corpora.update_digest(digest, value)
    return _shortened(digest)


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary and special tokens. Its other parts show in the tokens of the texts."""
    about = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
    return f"sha256 {digests.of_json(about)[:16]}"


def _file_digest(path: Location | None) -> str:
    return f"sha256 {digests.of_file(path)[:16]}" if path is not None and path.is_file() else "absent"


def _must_be_same(flag: str) -> bool:
    return _LOCAL_WORDS.isdisjoint(flag.partition("=")[0].split("_"))


def _shortened(digest: Any) -> str:
    return f"sha256 {digest.hexdigest()[:16]}"
