"""SIGTERM and SIGINT: a run is asked to stop, saves, and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from mtl_jax.core.errors import Interrupted


class Stop:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.flag = threading.Event()

    def requested(self, step: int) -> bool:
        """Asked once a step. On several hosts all answer alike: jax's preemption service agrees on a step."""
        if jax.process_count() == 1:
            return self.flag.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def check(self) -> None:
        """For work that leaves nothing to save: raises Interrupted if the run was asked to stop."""
        if self.flag.is_set():
            raise Interrupted("stopped between checkpoints; the same command goes on from the last one")


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """While inside, SIGTERM and SIGINT set the Stop; a second one ends the process at once.

    Outside the main thread, and on several hosts, where jax's preemption service listens to SIGTERM, nothing is installed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: Any) -> None:
        stop.flag.set()
        signal.signal(number, signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
