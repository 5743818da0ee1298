"""What a run says while it runs: metrics.jsonl, TensorBoard events, one progress line."""

from __future__ import annotations

import collections
import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import jax
import tqdm


class Logger:
    """Writes records to metrics.jsonl and TensorBoard on host 0; elsewhere does nothing.

    Args:
        workdir: Where to write.
        step: Steps done so far: records after it, left by a process that was killed, are removed.
    """

    def __init__(self, workdir: Path, step: int):
        self._file: TextIO | None = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if _step(line) <= step]
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)  # whole lines, at once
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Appends one record: {"kind": ..., "step": ..., **values}; numbers also go to TensorBoard under kind/."""
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Puts everything on disk that was written so far."""
        if self._file is not None:
            self._file.flush()
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order."""
    return [json.loads(line) for line in _lines(workdir / "metrics.jsonl")]


def _lines(path: Path) -> list[str]:
    """Whole lines only: a process that was killed may have left half a one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _step(line: str) -> int:
    return json.loads(line)["step"]


class Progress:
    """One bar on a terminal; elsewhere a line every few seconds. Rates are those of the last seconds.

    Args:
        title: What is being counted.
        total: Steps in all.
        done: Steps done before.
        seconds: Time between lines where there is no terminal, and over which rates are taken.
    """

    def __init__(self, title: str, total: int, done: int = 0, seconds: float = 10.0):
        self._quiet = jax.process_index() != 0
        self._terminal = sys.stderr.isatty()
        self._title, self._total, self._done, self._tokens, self._seconds = title, total, done, 0, seconds
        self._last = time.monotonic()
        self._marks = collections.deque([(self._last, done, 0)])  # (time, steps, tokens), the last seconds of them
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            desc=title,
            disable=self._quiet or not self._terminal,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} {bar} {postfix}",
        )

    def update(self, tokens: int, losses: dict[str, float], title: str = "") -> None:
        """One step is done: counts its real tokens and shows the losses.

        Args:
            tokens: Real (not padding) tokens of this step.
            losses: Numbers to show by name.
            title: A new title, if it changes.
        """
        self._done += 1
        self._tokens += tokens
        self._title = title or self._title
        now = time.monotonic()
        self._marks.append((now, self._done, self._tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] > self._seconds:
            self._marks.popleft()
        if self._quiet:
            return
        if self._terminal:
            self._bar.set_description_str(self._title, refresh=False)
            self._bar.set_postfix_str(self._text(losses), refresh=False)
            self._bar.update()
        elif now - self._last >= self._seconds or self._done == self._total:
            self._last = now
            print(f"{self._title} {self._done}/{self._total} {self._text(losses)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _text(self, losses: dict[str, float]) -> str:
        (then, done, tokens), (now, *_) = self._marks[0], self._marks[-1]
        seconds = max(now - then, 1e-9)
        rate = (self._done - done) / seconds
        left = round((self._total - self._done) / max(rate, 1e-9))
        parts = [f"{rate:.1f} step/s", f"{(self._tokens - tokens) / seconds:.0f} tok/s", f"ETA {left // 60}:{left % 60:02d}"]
        return " ".join(parts + [f"{name}={loss:.3f}" for name, loss in losses.items()])
