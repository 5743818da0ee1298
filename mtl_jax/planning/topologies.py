"""Topologies: the devices that a run is planned for, and the published properties of their chips.

A topology is a name such as v5e:16x16, a kind of chip and a number of chips. Its devices exist only for compilers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mtl_jax.core.errors import UserError, listed, unknown

# jax's compiler for TPUs looks for a machine around it, and says on standard error that it finds none.
_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may compile, too
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Chip(NamedTuple):
    """A kind of chip, as its maker describes it.

    Attributes:
        platform: tpu or cuda.
        memory: Bytes of its memory.
        bandwidth: Bytes a second to the chips around it, all links together.
        example: The name of a small topology.
        flops: Operations a second in bfloat16, at most.
        flops_per_cycle: Operations in one cycle; None if the compiler estimates no cycles.
        memory_bandwidth: Bytes a second to its own memory, for TPUs.
        target: For the compiler: the properties of a GPU in the form that it reads; for a TPU the name of the configuration in
            which the cores of a chip are one device, if that is not the default.
    """

    platform: str
    memory: float
    bandwidth: float
    example: str
    flops: float
    flops_per_cycle: int | None = None
    target: str = ""
    memory_bandwidth: float = math.inf

    @property
    def clock(self) -> float | None:
        """Cycles a second."""
        return None if self.flops_per_cycle is None else self.flops / self.flops_per_cycle


def _card(name: str, **properties: float | str) -> str:
    """The properties of a card: those of all cards, and its own."""
    common = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = "".join(f"  {key}: {value}\n" for key, value in (common | properties).items())
    return f'gpu_device_info {{\n{lines}}}\nplatform_name: "CUDA"\ndevice_description_str: "{name}"\n'


_HOPPER: dict[str, float | str] = {
    "cuda_compute_capability": "{ major: 9 }",
    "core_count": 132,
    "fpus_per_core": 128,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
}
_AMPERE: dict[str, float | str] = {
    "cuda_compute_capability": "{ major: 8 }",
    "core_count": 108,
    "fpus_per_core": 64,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
    "l2_cache_size": 41943040,
    "clock_rate_ghz": 1.41,
}
_A100 = _card("NVIDIA A100-SXM4-80GB", **_AMPERE, memory_bandwidth=2039000000000, device_memory_size=85050523648)
_H100 = _card("NVIDIA H100 80GB HBM3", **_HOPPER, memory_bandwidth=3352320000000, device_memory_size=84978434048)
_H200 = _card("NVIDIA H200", **_HOPPER, memory_bandwidth=4800000000000, device_memory_size=150121545728)

# From the pages of Google Cloud on each version, and NVIDIA's data sheets. The cycles of TPUs follow from the size and number
# of the units that multiply matrices.
CHIPS = {
    "v4": Chip("tpu", 32e9, 300e9, "v4:2x2x1", 275e12, 8 * 128 * 128 * 2, "megacore", 1228e9),
    "v5e": Chip("tpu", 16e9, 200e9, "v5e:2x2", 197e12, 4 * 128 * 128 * 2, memory_bandwidth=819e9),
    "v5p": Chip("tpu", 95e9, 600e9, "v5p:2x2x1", 459e12, 8 * 128 * 128 * 2, memory_bandwidth=2765e9),
    "v6e": Chip("tpu", 32e9, 448e9, "v6e:2x2", 918e12, 4 * 256 * 256 * 2, memory_bandwidth=1640e9),
    "a100": Chip("cuda", 80e9, 600e9, "a100:8", 312e12, target=_A100),
    "h100": Chip("cuda", 80e9, 900e9, "h100:8", 989e12, target=_H100),
    "h200": Chip("cuda", 141e9, 900e9, "h200:8", 989e12, target=_H200),
}
_CARDS_OF_A_HOST = 8


class Topology(NamedTuple):
    """Devices of one kind.

    Attributes:
        name: Its name, as v5e:16x16.
        chip: The kind of chip.
        devices: Devices for compilers, one a chip.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]


@functools.cache
def topology(name: str) -> Topology:
    """The topology of a name.

    Args:
        name: A kind of TPU and the sides of a block of chips, such as v5e:2x2, v5e:16x16 or v5p:2x2x1; or a kind of GPU and a
            number, such as h100:8.

    Raises:
        UserError: The kind or the block does not exist, or the package with its compiler is not installed.

    >>> topology("v5e:16x16").chip.memory  # doctest: +SKIP
    16000000000.0
    """
    kind, _, size = name.partition(":")
    if kind not in CHIPS:
        raise unknown("topology", kind, CHIPS)
    chip = CHIPS[kind]
    sides = size.split("x")
    if not all(side.isdigit() and int(side) for side in sides) or (chip.platform == "cuda" and len(sides) > 1):
        form = "its number" if chip.platform == "cuda" else "the sides of a block"
        raise UserError(f"--topology {name}: name the kind of chip and {form}, as {chip.example}")
    chips = math.prod(int(side) for side in sides)
    return Topology(name, chip, _tpus(name, chip) if chip.platform == "tpu" else _cards(name, chip, chips))


def _tpus(name: str, chip: Chip) -> tuple[Any, ...]:
    _need("libtpu", name, "TPUs", "plan-tpu")
    for variable, value in _NO_MACHINE.items():
        os.environ.setdefault(variable, value)
    return _described(name, "tpu", topology_name=name, chip_config_name=chip.target or "default")


def _cards(name: str, chip: Chip, cards: int) -> tuple[Any, ...]:
    _need("jax_cuda13_plugin", name, "GPUs", "plan-gpu")
    nvidia = _need("nvidia.cu13", name, "GPUs", "plan-gpu")
    tools = Path(next(iter(nvidia.submodule_search_locations or [])))
    os.environ.setdefault("CUDA_HOME", str(tools))  # the assembler and libraries of device code
    if str(tools / "bin") not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((str(tools / "bin"), os.environ["PATH"]))
    hosts, rest = divmod(cards, _CARDS_OF_A_HOST)
    if hosts and rest:
        raise UserError(f"--topology {name}: above {_CARDS_OF_A_HOST}, name a multiple of it: hosts have {_CARDS_OF_A_HOST}")
    form = f"1x{hosts}x{_CARDS_OF_A_HOST}" if hosts else f"1x1x{cards}"
    return _described(name, "cuda", target_config=chip.target, topology=form)


def _need(package: str, name: str, devices: str, extra: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the package that it would be in
        spec = None
    if spec is None:
        raise UserError(
            f"--topology {name} needs the compiler for {devices}, which is not installed; pip install 'mtl_jax[{extra}]'"
        )
    return spec


def _described(name: str, platform: str, **options: str) -> tuple[Any, ...]:
    """The devices of a topology, as their compiler describes them.

    Raises:
        UserError: The compiler knows no such topology.
    """
    from jax.experimental import topologies

    try:
        with _quiet():
            return tuple(topologies.get_topology_desc(platform=platform, **({"topology_name": ""} | options)).devices)
    except jax.errors.JaxRuntimeError as error:
        examples = listed([kind.example for kind in CHIPS.values()])
        raise UserError(f"--topology {name}: {str(error).splitlines()[0]}; there are for example {examples}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within this context, output of compiled libraries to standard error is dropped."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
