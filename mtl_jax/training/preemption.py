"""Stopping on SIGTERM and SIGINT: the signal sets a flag, and the run saves its state and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from mtl_jax.core.errors import Interrupted


class Stop:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self.flag = threading.Event()

    def requested(self, step: int) -> bool:
        """Whether to stop before this step. All hosts get the same answer: jax's preemption service agrees on a step.

        Args:
            step: Steps done; every host calls this once a step.
        """
        if jax.process_count() == 1:
            return self.flag.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def request(self) -> None:
        """Asks the run to save its state and end, as a signal does; on several hosts, through the service that they share."""
        if jax.process_count() == 1:
            self.flag.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def check(self) -> None:
        """For work that has nothing to save.

        Raises:
            Interrupted: The process was asked to stop.
        """
        if self.flag.is_set():
            raise Interrupted("stopped between checkpoints; the same command resumes from the last one")


@contextlib.contextmanager
def stop_on_signals(raise_at_end: bool = False) -> Iterator[Stop]:
    """Within the context SIGTERM and SIGINT set the Stop; a second one ends the process at once.

    Outside the main thread, and on several hosts, where jax's preemption service listens to SIGTERM, no handler is installed.

    Args:
        raise_at_end: Whether a signal that came, although the work was done all the same, is an error at the end of the
            context: a script of many runs then ends before its next one.

    Raises:
        Interrupted: As raise_at_end says.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def set_flag(number: int, frame: Any) -> None:
        stop.flag.set()
        signal.signal(number, signal.SIG_DFL)

    for number in previous:
        signal.signal(number, set_flag)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if raise_at_end and stop.flag.is_set():
        raise Interrupted("stopped by a signal when this work was done; the same command resumes after it")
