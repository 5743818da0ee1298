"""The progress of a long piece of work, with its rate and the time that is left: one bar on a terminal."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Mapping

import jax
import tqdm

BURST = 0.05  # seconds; the units of one batch are reported one by one, but were done together


class Progress:
    """One bar on a terminal; elsewhere a line every few seconds. Rates are those of the last seconds.

    The clock of the rates starts with the first update, since a program is compiled before it, and stops for other work, which
    the caller reports by beside().

    Args:
        title: Name of the work.
        total: Number of units.
        done: Units that were done before.
        unit: Name of a unit.
        seconds: Time between lines where there is no terminal, and over which rates are measured.
        coming: {other work, such as "evaluation": how often it is still to come}. It counts in the time that is left after
            the first call of beside() for it.
        stretches: {title: units that are still to come}, where units of one title take longer than those of another, as steps
            of phases do. Until a unit of each title is done, more time is left than the bar shows (">"). None: all units take
            equally long.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        unit: str = "step",
        seconds: float = 10.0,
        coming: Mapping[str, int] | None = None,
        stretches: Mapping[str, int] | None = None,
    ):
        self._quiet = jax.process_index() != 0
        self._terminal = sys.stderr.isatty()
        self._title, self._total, self._done, self._tokens, self._unit = title, total, done, 0, unit
        self._seconds, self._last = seconds, time.monotonic()
        self._clock, self._at = 0.0, self._last  # seconds spent on units, and the time up to which they are counted
        self._marks: collections.deque[tuple[float, int, int]] = collections.deque()  # (clock, units, tokens), the last seconds
        self._coming, self._left = dict(coming or {}), dict(stretches or {title: total - done})
        self._pace: dict[str, float] = {}  # {title: seconds a unit, at the last measurement}
        self._took: dict[str, tuple[float, int]] = {}  # {other work: (seconds, times)}
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            desc=title,
            disable=self._quiet or not self._terminal,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} {bar} {postfix}",
        )

    def update(self, units: int, tokens: int = 0, losses: dict[str, float] | None = None, title: str = "") -> None:
        """Counts units that are done.

        Args:
            units: Their number.
            tokens: Real (not padding) tokens in them, if the unit is not a token.
            losses: Losses to show, by name.
            title: A new title, if it changes.
        """
        if title and title != self._title:
            self._title = title
            self._marks.clear()
        self._done += units
        self._tokens += tokens
        self._left[self._title] = self._left.get(self._title, 0) - units
        current = time.monotonic()
        self._clock, self._at = self._clock + current - self._at, current
        self._mark()
        if self._quiet:
            return
        if self._terminal:
            self._bar.set_description_str(self._title, refresh=False)
            self._bar.set_postfix_str(self._text(losses or {}), refresh=False)
            self._bar.update(units)
        elif current - self._last >= self._seconds or self._done == self._total:
            self._last = current
            print(f"{self._title} {self._done}/{self._total} {self._text(losses or {})}".rstrip(), file=sys.stderr, flush=True)

    def beside(self, work: str, times: int = 1) -> None:
        """Attributes the time since the last call to other work, so that it does not count in the rate.

        Args:
            work: Its name, such as "evaluation".
            times: How often it was done.
        """
        current = time.monotonic()
        seconds, count = self._took.get(work, (0.0, 0))
        self._took[work] = seconds + current - self._at, count + times
        self._coming[work] = max(self._coming.get(work, 0) - times, 0)
        self._at = current
        if not self._marks:
            self._mark()

    def skip(self, stretches: Mapping[str, int], coming: Mapping[str, int] | None = None) -> None:
        """Counts units that were done before or are not needed; they do not count in any rate.

        Args:
            stretches: {title: number of units}.
            coming: {other work: how often it would have come with them}.
        """
        units = sum(stretches.values())
        self._done += units
        self._marks.clear()
        for title, number in stretches.items():
            self._left[title] = self._left.get(title, 0) - number
        for work, times in (coming or {}).items():
            self._coming[work] = max(self._coming.get(work, 0) - times, 0)
        self._bar.update(units)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _mark(self) -> None:
        if self._marks and self._clock - self._marks[-1][0] < BURST:
            self._marks[-1] = (self._marks[-1][0], self._done, self._tokens)
        else:
            self._marks.append((self._clock, self._done, self._tokens))
        while len(self._marks) > 3 and self._clock - self._marks[1][0] > self._seconds:
            self._marks.popleft()
        rate, _ = self._rates()
        if rate:
            self._pace[self._title] = 1 / rate

    def _rates(self) -> tuple[float, float]:
        """Units and tokens a second; 0 where they are not known. The last mark is left out, as it may still grow."""
        if len(self._marks) < 3:
            return 0.0, 0.0
        (start, first_done, first_tokens), (end, last_done, last_tokens) = self._marks[0], self._marks[-2]
        return (last_done - first_done) / (end - start), (last_tokens - first_tokens) / (end - start)

    def _time_left(self) -> str:
        """The estimate of the time that is left."""
        other = sum(self._coming[work] * seconds / times for work, (seconds, times) in self._took.items())
        left = round(other + sum(units * self._pace.get(title, 0.0) for title, units in self._left.items()))
        unknown = any(units > 0 and title not in self._pace for title, units in self._left.items())
        return f"{'>' if unknown else ''}{left // 60}:{left % 60:02d}"

    def _text(self, losses: dict[str, float]) -> str:
        rate, tokens = self._rates()
        parts = [f"{rate:.{1 if rate < 100 else 0}f} {self._unit}/s"] if rate else []
        parts += [f"{tokens:.0f} tok/s"] if tokens else []
        parts += [f"ETA {self._time_left()}"] if rate else []
        return " ".join(parts + [f"{name}={loss:.3f}" for name, loss in losses.items()])
