"""How tests compile: nearly all of a test's time goes there, and most of that to optimising programs that run once.

Without LLVM's optimisation and XLA's newer emitters of fused loops a train step compiles in a third of the time.

This module must not import jax, which reads the flags once.
"""

import os

CHEAPLY = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"  # parts for threads cost more to make and to link than one part
    " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"  # a third of what is left of a train step
)
# Options of jax.jit, for what is tested for its precision, which the last bits decide: with MTL_JAX_TESTS_COMPILE=users these
# tests compile as users do, in three times the time.
PRECISELY = (
    {
        "xla_backend_optimization_level": 3,
        "xla_cpu_use_fusion_emitters": True,
        "xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT",
    }
    if os.environ.get("MTL_JAX_TESTS_COMPILE") == "users"
    else {}
)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for so many virtual devices."""
    return f"--xla_force_host_platform_device_count={devices} {CHEAPLY}"


def environment(devices: int = 1) -> dict[str, str]:
    """Variables of a process that a test starts; with 8 devices it finds what the tests' own processes have compiled."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices)}
