"""Processes that a test starts, signals and waits for; each is forked from a server that has imported what a run imports.

A new interpreter takes seconds to import this, and tests start dozens. A fork runs a script or a line of code as
`python SCRIPT ARGUMENTS` or `python -c CODE ARGUMENTS` would: with an environment, output, exit code and process id of its own,
in which JAX has not chosen its devices. What a package does at its import is for tests of new interpreters.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import compiling

CONSOLE = "from mtl_jax.cli.main import console; console()"
IMPORTED = (
    "mtl_jax.cli.main",
    "mtl_jax.cli.script_main",
    "mtl_jax.training.train",
    "mtl_jax.training.dry_run",
    "mtl_jax.inference.predict",
    "mtl_jax.augment",
    "mtl_jax.sharing",
    "mtl_jax.core.plotting",
    "matplotlib.figure",
    "scipy.stats",
    "sklearn.metrics",
    "tensorboardX",
    "tyro",
    "transformers.models.auto.tokenization_auto",  # not transformers alone, which imports its parts when they are named
)


class Process:
    """What tests use of subprocess.Popen."""

    def __init__(self, *arguments: object, code: str = "", devices: int = 1, apart: bool = False, **variables: str):
        """Starts a process.

        Args:
            arguments: A script, unless there is code, and what follows it.
            code: Runs in place of a script.
            devices: How many virtual devices it has.
            apart: Whether standard error is kept apart from standard output.
            variables: More variables of its environment.
        """
        self._files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(1 + apart)]  # noqa: SIM115
        request = {
            "arguments": [*map(str, arguments)],
            "code": code,
            "environment": compiling.environment(devices) | variables,
            "folder": os.getcwd(),
        }
        self.returncode: int | None = None
        self.pid = _ask(request, [self._files[0].fileno(), self._files[-1].fileno()])

    def poll(self) -> int | None:
        """The exit code, or None; of a process that a signal ended, its number below 0."""
        if self.returncode is None:
            self.returncode = _ask({"ended": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Waits for the end: standard output, and standard error where it is kept apart."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"the process did not end within {timeout} seconds: {self._written()}")
            time.sleep(0.01)
        return self._written()

    def _written(self) -> tuple[str, str]:
        texts = []
        for file in self._files:
            with file:
                file.seek(0)
                texts.append(file.read())
        return texts[0], "".join(texts[1:])


def run(*arguments: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
    """Starts a process and waits for its end, so many seconds at most."""
    process = Process(*arguments, apart=True, **options)
    output, error = process.communicate(timeout)
    return subprocess.CompletedProcess(arguments, process.returncode, output, error)


@functools.cache
def _server() -> socket.socket:
    """The server of this process of the tests; it ends when the socket is closed."""
    here, there = socket.socketpair()
    environment = compiling.environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with there:
        server = subprocess.Popen([sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()], env=environment)

    @atexit.register
    def end() -> None:
        here.close()
        server.wait()

    return here


def _ask(request: dict, files: list[int] = ()) -> int | None:
    connection = _server()
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], files)
    answer = b""
    while not answer.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            raise RuntimeError("the server of processes has ended")
        answer += part
    return json.loads(answer)


def _serve(connection: socket.socket) -> dict | None:
    """Answers requests until the tests end; in a fork, returns what it is to run."""
    while True:
        text, files = b"", []
        while not text.endswith(b"\n"):
            part, more, *_ = socket.recv_fds(connection, 1 << 16, 2)
            if not part:
                return None
            text, files = text + part, [*files, *more]
        request = json.loads(text)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif answer := os.fork():
            for file in files:
                os.close(file)
        else:
            connection.close()
            for file, standard in zip(files, (1, 2), strict=True):
                os.dup2(file, standard)
                os.close(file)
            return request
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _run(request: dict) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["code"]:
        sys.argv = ["-c", *request["arguments"]]
        sys.path[0] = ""
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = request["arguments"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    import importlib

    with contextlib.closing(socket.socket(fileno=int(sys.argv[1]))) as channel:
        for name in IMPORTED:
            importlib.import_module(name)
        asked = _serve(channel)
    if asked is not None:
        _run(asked)
