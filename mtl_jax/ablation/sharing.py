"""An ablation over several hosts: each process takes a chunk of runs that no other has, and trains it alone.

The processes share the workdir and nothing else: they do not talk, and their devices form no mesh, so a host that dies costs
its chunk and no more. A lock says who has a chunk. It ends with its process, and another process, or the same command started
again, resumes from the chunk's newest checkpoint.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mtl_jax.ablation import ablation_dir as folders
from mtl_jax.ablation.plan import Program, Run
from mtl_jax.core import locks
from mtl_jax.core.errors import UserError

PATIENCE = 120.0  # seconds to wait for a process that writes the record
PAUSE = 2.0  # seconds between two looks at what the other processes have done

T = TypeVar("T")


class Sharing(NamedTuple):
    """Which of the processes that share an ablation this one is.

    Attributes:
        process: Its number, from 0. It decides what it begins with, so that the processes begin with different programs.
        processes: Their number; 1: this process has the ablation alone.
    """

    process: int = 0
    processes: int = 1

    @property
    def alone(self) -> bool:
        """Whether no other process shares the ablation."""
        return self.processes == 1

    @contextlib.contextmanager
    def recording(self, folder: Path) -> Iterator[None]:
        """Within this context no other process writes the record. A process that is alone holds the workdir all the time.

        Raises:
            locks.Busy: A process that does not share the ablation trains in its workdir.
        """
        if self.alone:
            yield
        else:
            with locks.workdir(folder, PATIENCE):
                yield

    @contextlib.contextmanager
    def taking(self, folder: Path, number: int, place: int) -> Iterator[bool]:
        """Takes a chunk of a program while the block runs; False: another process has it.

        Args:
            folder: The ablation's workdir.
            number: The program.
            place: The chunk's place in it.
        """
        with contextlib.ExitStack() as stack:
            taken = True
            if not self.alone:
                try:
                    stack.enter_context(locks.workdir(folders.of_program(folder, number) / "taken" / str(place)))
                except locks.Busy:
                    taken = False
            yield taken

    def in_order(self, items: Sequence[T]) -> list[T]:
        """The items in the order in which this process looks at them."""
        start = self.process * len(items) // self.processes
        return [*items[start:], *items[:start]]

    def at_once(self, planned: Sequence[Program], program: Program, at_once: int) -> int:
        """Most runs of a chunk: so few that every process has a chunk.

        Args:
            planned: All programs.
            program: The program.
            at_once: The user's limit; 0: none.
        """
        if self.alone:
            return at_once
        share = math.ceil(len(program.runs) / math.ceil(self.processes / len(planned)))
        return min(at_once or share, share)


def check(index: int, count: int) -> Sharing:
    """The Sharing of a process.

    Raises:
        UserError: The index is not one of `count` processes.
    """
    if not 0 <= index < count:
        raise UserError(f"share is ({index}, {count}); give the number of this process, from 0, and how many there are")
    return Sharing(index, count)


class Ledger:
    """The record of an ablation, ablation.json, which the processes that share it write in turn.

    Args:
        sharing: Which of the processes this one is.
        folder: The ablation's workdir.
        planned: All programs.
        record: The contents of ablation.json without the runs.

    Attributes:
        status: {run: "done" or "diverged ..."}; other runs are waiting.
    """

    def __init__(self, sharing: Sharing, folder: Path, planned: Sequence[Program], record: dict[str, Any]):
        self.sharing, self.folder, self.planned, self.record = sharing, folder, planned, record
        self.status = folders.ended(record)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Within this context the record has what the other processes wrote, and none of them writes."""
        with self.sharing.recording(self.folder):
            if not self.sharing.alone and (self.folder / folders.RECORD).exists():
                written = folders.read(self.folder)
                for entry, entry_written in zip(self.record["programs"], written["programs"], strict=True):
                    entry.update(entry_written)
                self.status.update(folders.ended(written))
            yield

    def write(self) -> dict[str, Any]:
        """Writes the record, and returns it."""
        return folders.write(self.folder, self.record, self.planned, self.status)

    def entry(self, program: Program) -> dict[str, Any]:
        """The entry of a program in the record, to be changed within opened()."""
        return self.record["programs"][program.number]

    def ended(self, runs: Sequence[Run]) -> bool:
        """Whether all of these runs are done or have diverged."""
        return all(run.name in self.status for run in runs)

    def agrees(self, program: Program, size: int) -> bool:
        """Whether the chunks of a program have this size, which is that of the first process to ask."""
        with self.opened():
            entry = self.entry(program)
            if "size" not in entry:
                entry["size"] = size
                folders.begin(self.folder, self.planned)
                self.write()
            return entry["size"] == size

    def has_work(self, program: Program) -> bool:
        """Whether a chunk of a program is neither done nor with another process, as far as is known before it is compiled."""
        entry = self.entry(program)
        if self.sharing.alone or "chunks" not in entry:
            return True
        for place in set(range(entry["chunks"])) - set(entry.get("ended", ())):
            with self.sharing.taking(self.folder, program.number, place) as taken:
                if taken:
                    return True
        return False

    def end(self, program: Program, place: int, status: dict[str, str], seconds: float, compiling: float) -> None:
        """Records that a chunk has ended.

        Args:
            program: Its program.
            place: The chunk's place in it.
            status: {run: status} of its runs.
            seconds: How long it took.
            compiling: Seconds of compiling that are not in the record yet.
        """
        with self.opened():
            self.status.update(status)
            entry = self.entry(program)
            entry["seconds"] = round(entry.get("seconds", 0.0) + seconds, 1)
            entry["compile_seconds"] = round(entry.get("compile_seconds", 0.0) + compiling, 1)
            if not self.sharing.alone:
                entry["ended"] = sorted({*entry.get("ended", ()), place})
            self.write()
