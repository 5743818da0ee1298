"""A host that dies ends the others with one line and code 75, in place of the runtime's pages of log and an abort.

A host that is killed says nothing. jax's coordination service, on host 0, misses its heartbeats, and the C++ client of every
other host then logs a stack trace and aborts; a death of host 0 itself is noticed at once. No Python is asked. So this module
stands at both ends of the abort: what the C++ code writes to standard error passes through a filter, which keeps back lines
about a lost host, and a handler of SIGABRT prints one line for them and ends the process. Python's own standard error does not
pass through the filter.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from typing import Any

from jax._src.distributed import global_state  # jax has no public access to it

HEARTBEAT = 30  # seconds without a sign of a host after which it is lost; jax's own limit is 100
EXIT_AGAIN = 75  # as after a signal: the same command, started again, resumes
HOLD = 10.0  # seconds for which lines about a lost host are kept back; without an abort they are printed then
_DRAIN = 0.3  # seconds in which the filter reads what was written before the abort
_LEAD = 2.0  # seconds by which host 0 ends after the others: they lose the service with it, and would name the wrong host

# Where a text about a lost host begins. Lines of the C++ code begin with a letter, the date and the time.
_BEGINS = re.compile(
    rb"^[WEF]\d{4} .*(coordination_service|preemption_sync_manager|Terminating process because the JAX distributed service)",
    re.MULTILINE,
)
_LOST = re.compile(rb"unhealthy \(stopped sending heartbeats\):\s*((?:\d+[\s,]*)+)")
_SERVICE_LOST = re.compile(rb"distributed service detected fatal errors|Polled an error from coordination service")

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def lost(text: bytes) -> str:
    """Names the hosts that a text of the coordination service says are lost: "host 1, 3"; "" where it is about something else.

    Args:
        text: What the C++ code wrote. Where it loses the service itself, it is host 0.
    """
    named = _LOST.search(text)
    if named:
        return f"host {', '.join(re.findall(r'[0-9]+', named[1].decode()))}"
    return "host 0" if _SERVICE_LOST.search(text) else ""


class Filter:
    """Passes bytes on, but for those after the beginning of a text about a lost host, which are kept for a while.

    Args:
        target: The file descriptor that gets them.
    """

    def __init__(self, target: int):
        self.target, self.kept, self.since = target, b"", 0.0

    def feed(self, data: bytes, now: float) -> None:
        """Takes what was written; `now` is in seconds."""
        if not self.kept:
            begins = _BEGINS.search(data)
            if begins is None:
                _write(self.target, data)
                return
            _write(self.target, data[: begins.start()])
            data, self.since = data[begins.start() :], now
        self.kept += data

    def expire(self, now: float) -> None:
        """Passes on what was kept for too long: no abort followed."""
        if self.kept and now - self.since > HOLD:
            _write(self.target, self.kept)
            self.kept = b""


class _Watch:
    """The filter of this process's standard error, and its handler of SIGABRT, which must live as long as the process."""

    def __init__(self) -> None:
        saved = os.dup(2)
        os.set_inheritable(saved, False)
        self.filter = Filter(saved)
        self.source, target = os.pipe()
        os.dup2(target, 2)
        os.close(target)
        if sys.stderr is not None:
            sys.stderr.flush()
            sys.stderr = os.fdopen(os.dup(saved), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._expire, daemon=True).start()
        self.handler = _HANDLER(self._aborted)
        self.libc: Any = ctypes.CDLL(None)
        self.libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self.libc.signal(signal.SIGABRT, ctypes.cast(self.handler, ctypes.c_void_p))

    def _read(self) -> None:
        while data := os.read(self.source, 1 << 16):
            self.filter.feed(data, time.monotonic())

    def _expire(self) -> None:
        while True:
            time.sleep(HOLD / 5)
            self.filter.expire(time.monotonic())

    def _aborted(self, number: int) -> None:
        time.sleep(_DRAIN)
        hosts = lost(self.filter.kept)
        if not hosts:
            _write(self.filter.target, self.filter.kept)
            self.libc.signal(signal.SIGABRT, None)  # the default: the abort goes on
            return
        line = f"error: {hosts} has ended without a word; start the same command again on every host, and the run resumes\n"
        _write(self.filter.target, line.encode())
        if global_state.process_id == 0:
            time.sleep(_LEAD)
        os._exit(EXIT_AGAIN)


_watches: list[_Watch] = []


def watch() -> None:
    """From now on a lost host ends this process with one line and code 75. A second call does nothing."""
    if not _watches:
        _watches.append(_Watch())


def _write(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]
