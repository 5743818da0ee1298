"""Hooks of a run: functions of plain values, called beside the training, which they cannot change.

They are called off the hot path: the loop reads the metrics of a step when the device already works on the next one. A hook
that fails ends the run as a signal does: the state is saved, and the same command resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.core.errors import Interrupted, UserError


class Hooks(NamedTuple):
    """Functions that a run calls on host 0; those that are None cost nothing.

    A run that was killed resumes from its last checkpoint, so that the functions are called once more for the steps after it.

    Attributes:
        after_metrics: (step, metrics): after the metrics of a step were read. Metrics are floats by name, as in metrics.jsonl;
            beside them is cosines, a list of lists, where the rule computes them.
        after_evaluation: (step, scores): after an evaluation on dev. Scores are floats by name, such as "sst2/accuracy".
        at_end: (results): when the run is done, with the contents of results.json.
        close: (): when the process leaves the run, however it ends.

    Examples:
        >>> losses = []
        >>> hooks = mtl_jax.Hooks(after_metrics=lambda step, metrics: losses.append(metrics["total"]))
        >>> results = mtl_jax.train(EXPERIMENT, "runs/with_hooks", hooks=hooks)
        >>> len(losses) == results["steps"]
        True
    """

    after_metrics: Callable[[int, Mapping[str, Any]], object] | None = None
    after_evaluation: Callable[[int, Mapping[str, Any]], object] | None = None
    at_end: Callable[[Mapping[str, Any]], object] | None = None
    close: Callable[[], object] | None = None


def several(hooks: Hooks | Iterable[Hooks]) -> tuple[Hooks, ...]:
    """Hooks, or several of them, as a tuple.

    Raises:
        UserError: One of them is something else.
    """
    all_hooks = (hooks,) if isinstance(hooks, Hooks) or not isinstance(hooks, Iterable) else tuple(hooks)
    for entry in all_hooks:
        if not isinstance(entry, Hooks):
            raise UserError(f"hooks: {str(entry)[:100]!r} is not mtl_jax.Hooks; write Hooks(after_metrics=FUNCTION)")
    return all_hooks


class Callbacks:
    """The hooks of one run in one process; keeps the first error of a hook until the state is saved.

    Args:
        hooks: The hooks, in the order in which they are called.
        stop: Called when a hook raises an error: asks the loop to save its state and end.
    """

    def __init__(self, hooks: Sequence[Hooks] = (), stop: Callable[[], object] = lambda: None):
        self._hooks, self._stop = tuple(hooks), stop
        self._error: BaseException | None = None

    def call(self, name: str, *values: Any) -> None:
        """Calls a function of all hooks, in order; none after one has failed."""
        for function in filter(None, (getattr(hooks, name) for hooks in self._hooks)):
            if self._error is None and not self._succeeds(function, *values):
                self._stop()

    def check(self) -> None:
        """Raises the error of the hook that failed, with its own traceback."""
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Within the context an error of a hook takes the place of Interrupted; at the end all hooks are closed."""
        try:
            yield
        except Interrupted:
            if self._error is None:
                raise
        finally:
            for close in filter(None, (hooks.close for hooks in self._hooks)):
                self._succeeds(close)
        self.check()

    def _succeeds(self, function: Callable[..., object], *values: Any) -> bool:
        try:
            function(*values)
        except BaseException as error:  # also SystemExit: the state is saved first
            self._error = self._error or error
            return False
        return True
