"""What a run has behind it, as the host counts it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtl_jax.experiment import Experiment


@dataclasses.dataclass
class Counts:
    """Saved in each checkpoint's record, so that a resumed run counts on.

    Attributes:
        phase: The number of the phase.
        places: Places for tokens in the batches so far.
        seen: {source: [rows, examples, tokens]} so far, over all hosts.
        seconds: Time spent.
        criterion: What `best` is of.
        best: The best dev number.
        evaluations_since_best: Evaluations since then.
    """

    phase: int = 0
    places: int = 0
    seen: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    criterion: str = ""
    best: float | None = None
    evaluations_since_best: int = 0

    def add(self, seen_Nx3: np.ndarray, places: int) -> None:
        """Counts a batch.

        Args:
            seen_Nx3: StepMetrics.seen, sources in the order of `seen`.
            places: Its places for tokens.
        """
        self.places += places
        for before, now in zip(self.seen.values(), seen_Nx3.tolist(), strict=True):
            before[:] = [a + b for a, b in zip(before, now, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens seen so far, without padding."""
        return sum(tokens for _, _, tokens in self.seen.values())

    def facts(self, examples: Mapping[str, int]) -> dict[str, Any]:
        """For results.json and the records of steps: what was seen of each source, and the share of places that were padding.

        Args:
            examples: {source: examples there}.
        """
        return {
            "training_tokens": self.tokens,
            "padding": round(1 - self.tokens / max(self.places, 1), 4),
            "seen": {
                source: {"rows": rows, "examples": seen, "tokens": tokens, "passes": round(seen / examples[source], 4)}
                for source, (rows, seen, tokens) in self.seen.items()
            },
        }


def steps_by_phase(experiment: Experiment, start: int = 0, stop: int | None = None, runs: int = 1) -> dict[str, int]:
    """{name of a phase: steps that runs take in it}, for the estimate of the time that is left; arguments as for other_work."""
    found: dict[str, int] = {}
    end = 0
    for phase in experiment.phases:
        begin, end = end, end + phase.steps
        steps = max(0, min(end, end if stop is None else stop) - max(begin, start))
        found[phase.name] = found.get(phase.name, 0) + steps * runs
    return found


def other_work(experiment: Experiment, start: int = 0, stop: int | None = None, runs: int = 1) -> dict[str, int]:
    """How often runs do something else than steps, for the estimate of the time that is left.

    Args:
        experiment: Theirs.
        start: Steps done.
        stop: Up to this step; None: to the end.
        runs: How many runs do it.
    """
    ends = list(itertools.accumulate(phase.steps for phase in experiment.phases))
    stop, every, saving = ends[-1] if stop is None else stop, experiment.evaluation.every, experiment.checkpoints.every
    evaluations = {at for at in (*range(every, stop + 1, every), *ends) if start < at <= stop}
    saved = range(saving * (start // saving + 1), stop + 1, saving)
    alone = sum(at not in evaluations for at in saved)  # the checkpoint after an evaluation is a part of it
    return {"evaluation": len(evaluations) * runs, "checkpoint": alone * runs}
