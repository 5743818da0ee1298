"""How tests compile: nearly all of a test's time goes there, and two fifths of it to optimising programs that run once.

This module must not import jax, which reads the flags once.
"""

import os


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for so many virtual devices."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"


def environment(devices: int = 1) -> dict[str, str]:
    """Variables of a process that a test starts."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices)}
