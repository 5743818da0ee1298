"""What a run may hold on to: losses beside those of the tasks, each with a weight of its own.

The objective is what the weighting rule makes of the tasks' losses, plus the sum of weight times loss over the regularisers.
Rules see the tasks only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence, Set

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import NOT_A_PATTERN, UserError, listed, unknown
from mtl_jax.core.files import shown
from mtl_jax.transfer.penalties import Mixout
from mtl_jax.weighting import schedules

FIELD = "regularisers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regulariser(Configuration):
    """What all of them have.

    Attributes:
        name: Its name in logs and metrics, beside those of tasks.
        weight: A number, or a schedule of the run's step as text, as in Experiment.weights. Where it is 0 all through a phase,
            the phase is that of a run without the regulariser, bit by bit.
        phase: It counts from this phase on, and what it holds on to is what is there when that begins; empty: the first.
    """

    name: str
    weight: float | str = 1.0
    phase: str = ""

    def check(self) -> None:
        """Raises UserError where a field makes no sense."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2SP(Regulariser):
    """Parameters are drawn to their start, new ones to 0 (Li et al., 2018): transfer.l2sp over what trains.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        alpha: How strongly parameters are drawn to their start.
        beta: How strongly new ones are drawn to 0; they have no start that is worth keeping.
        shared: A regular expression: the parameters that have a start.
        new: A regular expression: the new ones.
    """

    name: str = "l2sp"
    alpha: float = 0.1
    beta: float = 0.01
    shared: str = "trunk/.*"
    new: str = "heads/.*"

    def check(self) -> None:
        _not_negative(self, "alpha", "beta")
        _expressions(self, "shared", "new")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EWC(Regulariser):
    """Parameters are held where they matter for a source's tasks (Kirkpatrick et al., 2017): transfer.ewc over what trains.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers; the paper's lambda.
        phase: As in all regularisers: begin it after the phases that train the source, or let init_from or `run` bring them.
        source: The source whose tasks are not to be forgotten, of this run or of `run`.
        run: The workdir of a finished run with that source: its best checkpoint is the anchor, and its heads and training rows
            give the Fisher information. Empty: the source is one of this run.
        batches: Batches of training rows, batch.rows rows with one example each, from which the Fisher information is computed.
        labels: model: labels drawn from what the model says, as in the definition of the Fisher information. data: those of
            the rows (the empirical one); for spans, masked LM and seq2seq tasks it must be this.
        parameters: A regular expression: what is held.
    """

    name: str = "ewc"
    source: str = ""
    run: str = ""
    batches: int = 32
    labels: str = "model"
    parameters: str = "trunk/.*"

    def check(self) -> None:
        _expressions(self, "parameters")
        if not self.source:
            raise UserError(f"{FIELD}: {self.name} needs a source: the one whose tasks are not to be forgotten")
        if self.batches < 1:
            raise UserError(f"{FIELD}: batches of {self.name} is {self.batches}; it must be at least 1")
        if self.labels not in ("model", "data"):
            raise unknown(f"labels of {self.name}:", self.labels, ("model", "data"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Regulariser):
    """A teacher is imitated: transfer.distill over the outputs of tasks, or transfer.distill_hidden over vectors of tokens.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        teacher: The workdir of a finished run, of which the best checkpoint is taken; for hidden also a checkpoint's directory
            or hub id, and for one tagging task the directory of a token classifier with the task's labels in order. Its
            vocabulary must be that of this run's trunk.
        of: logits: the outputs of tasks that both have, under the same name: the sum over tasks of the mean over the task's
            examples (labelled or not; for taggers, labelled words). hidden: the last vectors of all tokens, the mean over them.
        tasks: For logits: these tasks; empty: all that both have.
        temperature: For logits: T.
        distance: For hidden: mse or cosine. Where the widths differ, a projection to the teacher's is learned,
            heads/NAME/projection.
    """

    name: str = "distillation"
    teacher: str = ""
    of: str = "logits"
    tasks: tuple[str, ...] = ()
    temperature: float = 1.0
    distance: str = "mse"

    def check(self) -> None:
        if not self.teacher:
            raise UserError(f"{FIELD}: {self.name} needs a teacher: the workdir of a finished run")
        if self.of not in ("logits", "hidden"):
            raise unknown(f"of of {self.name}:", self.of, ("logits", "hidden"))
        if self.distance not in ("mse", "cosine"):
            raise unknown(f"distance of {self.name}:", self.distance, ("mse", "cosine"))
        if not 0 < self.temperature < math.inf:
            raise UserError(f"{FIELD}: temperature of {self.name} is {self.temperature}; it must be a number above 0")
        if self.tasks and self.of == "hidden":
            raise UserError(f"{FIELD}: tasks of {self.name} are for logits, but it is of hidden")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RDrop(Regulariser):
    """Every row goes through the model twice, with different dropout, and the outputs are drawn together (Liang et al., 2021).

    The tasks' losses are then means over both passes. (The paper adds them up, so its alpha is twice this weight.) The loss is
    the sum over tasks of the mean of transfer.r_drop over the task's examples; for taggers, labelled words.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        tasks: These tasks; empty: all whose outputs can be compared and whose own weight is not 0 throughout.
    """

    name: str = "r_drop"
    tasks: tuple[str, ...] = ()


# What an experiment may hold: a new kind is added here.
AnyRegulariser = L2SP | EWC | Distillation | RDrop


def without_tasks(regularisers: Sequence[AnyRegulariser], dropped: Set[str]) -> tuple[AnyRegulariser, ...]:
    """The regularisers without the tasks that are left out of a run.

    Args:
        regularisers: The experiment's regularisers; one of weight 0 goes with the last of its tasks.
        dropped: The tasks that are left out.

    Raises:
        UserError: One has none of its tasks left: no tasks would mean all.
    """
    found: list[AnyRegulariser] = []
    for each in regularisers:
        if not isinstance(each, Distillation | RDrop) or dropped.isdisjoint(each.tasks):
            found.append(each)
            continue
        kept = tuple(task for task in each.tasks if task not in dropped)
        if kept:
            found.append(dataclasses.replace(each, tasks=kept))
        elif each.weight not in (0, "0"):
            raise UserError(
                f"{FIELD}: {each.name} is of {listed(each.tasks)}, which only leaves out; name it there, or set the weight "
                f"of {each.name} to 0"
            )
    return tuple(found)


def check(
    regularisers: Sequence[AnyRegulariser], mixout: Mixout, tasks: Sequence[str], phases: Sequence[str], steps: int
) -> None:
    """Finds what is wrong with them before anything is read.

    Args:
        regularisers: The experiment's regularisers.
        mixout: Its mixout.
        tasks: The names of its tasks.
        phases: The names of its phases.
        steps: Steps of the run.

    Raises:
        UserError: One line that names the field.
    """
    seen = set(tasks)
    for each in regularisers:
        if not re.fullmatch("[A-Za-z0-9_-]+", each.name):
            raise UserError(f"{FIELD}: name {each.name!r}: use letters, digits, '_' and '-' only")
        if each.name in seen:
            what = "a task" if each.name in tasks else "another one"
            raise UserError(f"{FIELD}: {each.name!r} is also the name of {what}; names must differ")
        seen.add(each.name)
        if each.phase and each.phase not in phases:
            raise unknown(f"phase of {each.name}:", each.phase, phases)
        schedules.check_steps({each.name: each.weight}, range(steps), FIELD)
        each.check()
        for name in getattr(each, "tasks", ()):
            if name not in tasks:
                raise unknown(f"task of {each.name}:", name, tasks)
    if not 0 <= mixout.p < 1:
        raise UserError(f"mixout.p is {mixout.p}; it must be at least 0 and below 1")
    _expression("mixout.parameters", mixout.parameters)


def _not_negative(regulariser: Regulariser, *fields: str) -> None:
    for field in fields:
        value = getattr(regulariser, field)
        if not 0 <= value < math.inf:
            raise UserError(f"{FIELD}: {field} of {regulariser.name} is {value}; it must be finite and not negative")


def _expressions(regulariser: Regulariser, *fields: str) -> None:
    for field in fields:
        _expression(f"{FIELD}: {field} of {regulariser.name}", getattr(regulariser, field))


def _expression(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except NOT_A_PATTERN as error:
        raise UserError(f"{where} is no regular expression: {shown(pattern)!r} ({error})") from error
