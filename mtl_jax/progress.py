"""How far a long piece of work is: one bar on a terminal."""

from __future__ import annotations

import collections
import sys
import time

import jax
import tqdm


class Progress:
    """One bar on a terminal; elsewhere a line every few seconds. Rates are those of the last seconds.

    Args:
        title: What is being counted.
        total: Units in all.
        done: Units done before.
        unit: Name of a unit.
        seconds: Time between lines where there is no terminal, and over which rates are taken.
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "step", seconds: float = 10.0):
        self._quiet = jax.process_index() != 0
        self._terminal = sys.stderr.isatty()
        self._title, self._total, self._done, self._tokens, self._unit = title, total, done, 0, unit
        self._seconds, self._last = seconds, time.monotonic()
        self._marks = collections.deque([(self._last, done, 0)])  # (time, units, tokens), the last seconds of them
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            desc=title,
            disable=self._quiet or not self._terminal,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} {bar} {postfix}",
        )

    def update(self, units: int, tokens: int = 0, losses: dict[str, float] | None = None, title: str = "") -> None:
        """Some units are done.

        Args:
            units: How many.
            tokens: Real (not padding) tokens in them, where the unit is another.
            losses: Numbers to show by name.
            title: A new title, if it changes.
        """
        self._done += units
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
            self._bar.set_postfix_str(self._text(losses or {}), refresh=False)
            self._bar.update(units)
        elif now - self._last >= self._seconds or self._done == self._total:
            self._last = now
            print(f"{self._title} {self._done}/{self._total} {self._text(losses or {})}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _text(self, losses: dict[str, float]) -> str:
        (then, done, tokens), (now, *_) = self._marks[0], self._marks[-1]
        seconds = max(now - then, 1e-9)
        rate = (self._done - done) / seconds
        left = round((self._total - self._done) / rate) if rate else 0
        parts = [f"{rate:.{1 if rate < 100 else 0}f} {self._unit}/s"]
        parts += [f"{(self._tokens - tokens) / seconds:.0f} tok/s"] if self._tokens else []
        parts += [f"ETA {left // 60}:{left % 60:02d}"] if rate else []
        return " ".join(parts + [f"{name}={loss:.3f}" for name, loss in losses.items()])
