"""Counts of a run: rows, examples, tokens and time so far, and the steps, evaluations and checkpoints that are left."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtl_jax.data.corpus import Corpus
from mtl_jax.experiment import Experiment

UNCHANGED = "unchanged"


@dataclasses.dataclass
class Counts:
    """Saved in each checkpoint's record, so that a resumed run continues the counts.

    Attributes:
        phase: The number of the phase.
        places: Places for tokens in the batches so far.
        seen: {source: [rows, examples, tokens]} so far, over all hosts.
        seconds: Time spent.
        criterion: The name of the dev criterion.
        best: Its best value.
        evaluations_since_best: Evaluations since then.
        made: {source: {augmentation: examples that it changed so far; "unchanged": those that one should have and could not}}.
    """

    phase: int = 0
    places: int = 0
    seen: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    criterion: str = ""
    best: float | None = None
    evaluations_since_best: int = 0
    made: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    def add(self, seen_Nx3: np.ndarray, places: int, made: np.ndarray | None = None) -> None:
        """Counts a batch.

        Args:
            seen_Nx3: StepMetrics.seen, sources in the order of `seen`.
            places: Its places for tokens.
            made: StepMetrics.made.
        """
        self.places += places
        for source, made_A in zip(self.seen, () if made is None else made.tolist(), strict=False):
            totals = self.made.get(source, {})
            for name, examples in zip(totals, made_A, strict=False):
                totals[name] += examples
        for total, of_batch in zip(self.seen.values(), seen_Nx3.tolist(), strict=True):
            total[:] = [a + b for a, b in zip(total, of_batch, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens seen so far, without padding."""
        return sum(tokens for _, _, tokens in self.seen.values())

    def facts(self, examples: Mapping[str, int]) -> dict[str, Any]:
        """For results.json and the records of steps: counts of each source, and the share of places that were padding.

        Args:
            examples: {source: the number of its training examples}.
        """
        return {
            "training_tokens": self.tokens,
            "padding": round(1 - self.tokens / max(self.places, 1), 4),
            "seen": {
                source: {"rows": rows, "examples": seen, "tokens": tokens, "passes": round(seen / examples[source], 4)}
                for source, (rows, seen, tokens) in self.seen.items()
            },
            **({"augmented": {source: dict(numbers) for source, numbers in self.made.items()}} if self.made else {}),
        }


def start(corpus: Corpus, criterion: str = "") -> Counts:
    """The counts before the first step.

    Args:
        corpus: The data.
        criterion: The name of the dev criterion.
    """
    made = {source: dict.fromkeys([*redraw.names, UNCHANGED], 0) for source, redraw in corpus.redraws.items()}
    return Counts(criterion=criterion, seen={name: [0, 0, 0] for name in corpus.splits["train"]}, made=made)


def steps_by_phase(experiment: Experiment, start: int = 0, stop: int | None = None, runs: int = 1) -> dict[str, int]:
    """{name of a phase: steps that runs take in it}, for the estimate of the time that is left.

    Args:
        experiment: As for evaluations_and_checkpoints; so are start, stop and runs.
    """
    steps_of: dict[str, int] = {}
    phase_end = 0
    for phase in experiment.phases:
        phase_start, phase_end = phase_end, phase_end + phase.steps
        steps = max(0, min(phase_end, phase_end if stop is None else stop) - max(phase_start, start))
        steps_of[phase.name] = steps_of.get(phase.name, 0) + steps * runs
    return steps_of


def evaluations_and_checkpoints(
    experiment: Experiment, start: int = 0, stop: int | None = None, runs: int = 1
) -> dict[str, int]:
    """{"evaluation" and "checkpoint": how often runs do it}, for the estimate of the time that is left.

    Args:
        experiment: The experiment of the runs.
        start: Steps done.
        stop: Up to this step; None: to the end.
        runs: How many runs there are.
    """
    ends = list(itertools.accumulate(phase.steps for phase in experiment.phases))
    stop, every, saving = ends[-1] if stop is None else stop, experiment.evaluation.every, experiment.checkpoints.every
    evaluations = {step for step in (*range(every, stop + 1, every), *ends) if start < step <= stop}
    saved = range(saving * (start // saving + 1), stop + 1, saving)
    checkpoints = sum(step not in evaluations for step in saved)  # the checkpoint after an evaluation is a part of it
    return {"evaluation": len(evaluations) * runs, "checkpoint": checkpoints * runs}
