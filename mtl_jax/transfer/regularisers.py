"""The regularisers of an experiment: losses beside those of the tasks, each with its own weight.

The objective is the weighting rule's combination of the tasks' losses, plus the sum of weight times loss over the regularisers,
which the rule does not see.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from mtl_jax.core.errors import NOT_A_PATTERN, UserError, unknown
from mtl_jax.core.files import shown
from mtl_jax.core.parts import Part
from mtl_jax.core.trees import matching
from mtl_jax.transfer.penalties import ewc, l2sp

FIELD = "regularisers"


def start_of(phase: str) -> str:
    """The reference's name: the parameters at the start of a phase."""
    return f"start-{phase}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regulariser(Part):
    """The fields of all regularisers.

    Attributes:
        name: Its name in logs and metrics, beside those of tasks.
        weight: A number, or a schedule of the run's step as text, as in Experiment.weights. A phase in which it is 0 throughout
            is the same, bit by bit, as without the regulariser.
        phase: The phase from which the regulariser is used; its reference values are those at the start of that phase. Empty:
            the first phase.
    """

    name: str
    weight: float | str = 1.0
    phase: str = ""

    door: ClassVar[str] = "regulariser"
    # Whether penalty() reads the values of the parameters at the start of its phase, which are then kept in the workdir.
    reads_start: ClassVar[bool] = True
    # Whether every row goes through the model twice, for the outputs to be compared.
    doubles_rows: ClassVar[bool] = False
    # The fields with a regular expression that must match a parameter of the run.
    must_match: ClassVar[tuple[str, ...]] = ()

    @property
    def level(self) -> str:
        """What the loss is of: "parameters" for a class with penalty(), "outputs" for one with output_loss()."""
        return "parameters" if type(self).penalty is not Regulariser.penalty else "outputs"

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources whose rows it reads, also where no task has labels for them; such a source has training rows only."""
        return ()

    def earlier_runs(self) -> dict[str, str]:
        """{field: path} of the finished runs, or checkpoints, that the model learns from by it; "" for none."""
        return {}

    @property
    def reads_rows(self) -> bool:
        """Whether it learns from rows of the data, so that private training refuses it."""
        return self.level == "outputs"

    @property
    def reads_tokens(self) -> bool:
        """Whether its loss reads the trunk's token vectors, those of all rows."""
        return False

    @property
    def reads_vectors(self) -> bool:
        """Whether its loss reads vectors of texts or tokens, which must then be the same for all tasks of a source."""
        return self.reads_tokens

    @property
    def own_pass(self) -> bool:
        """Whether its loss is of a pass through the trunk of its own, not of the outputs of the tasks' pass."""
        return False

    @property
    def changes_inputs(self) -> bool:
        """Whether it changes, in every pass, what the trunk or a layer of it reads: features of texts cannot be kept."""
        return False

    def check(self) -> None:
        """Raises UserError if a field is refused."""

    def start_paths(self, trained: Mapping[str, Any]) -> list[str]:
        """The paths whose values at the start of its phase penalty() reads; by default all.

        Args:
            trained: {path: anything} of the parameters that train.
        """
        return list(trained)

    def references(self, phase: str) -> dict[str, str]:
        """{what penalty() or the loss calls it: the name of a reference}: values that the run keeps in its workdir.

        Args:
            phase: The phase that the regulariser begins with.
        """
        return {"start": start_of(phase)} if self.level == "parameters" and self.reads_start else {}

    def penalty(self, trained: Mapping[str, jax.Array], references: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        """The loss, f32[], of a regulariser of parameters.

        Args:
            trained: {path: the parameter}, those that train, such as "trunk/layer_0/attention/query/kernel".
            references: By the keys of references(): {"start": {path: its value at the start of the regulariser's phase}}; {}
                unless reads_start.
        """
        raise NotImplementedError(f"{type(self).__name__} has no penalty()")

    def output_loss(self, outputs: jax.Array, task: Any) -> jax.Array:
        """The losses of a regulariser of outputs, f32 by example or token; the loss is the sum over tasks of their means.

        A class with this method may have a field tasks: the names of the tasks that it is about; empty: all whose outputs can
        be compared (Task.compared_as) and that have a weight. The mean is over all examples of the task's source, labelled or
        not; for taggers over labelled words.

        Args:
            outputs: f32[R, S, O] or f32[R, T, O], by the task's level.
            task: The Task that they are of.
        """
        raise NotImplementedError(f"{type(self).__name__} has no output_loss()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2SP(Regulariser):
    """Trainable parameters are pulled to their initial values, new ones to 0 (Li et al., 2018): transfer.l2sp.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        alpha: Strength of the pull towards initial values.
        beta: Strength of the pull towards 0, for new parameters, whose initial values are random.
        shared: A regular expression: the parameters with initial values that are worth keeping.
        new: A regular expression: the new parameters.

    Examples:
        >>> mtl_jax.L2SP(weight=0.01).weight
        0.01
    """

    name: str = "l2sp"
    alpha: float = 0.1
    beta: float = 0.01
    shared: str = "trunk/.*"
    new: str = "heads/.*"

    must_match: ClassVar[tuple[str, ...]] = ("shared",)

    def check(self) -> None:
        _not_negative(self, "alpha", "beta")
        _expressions(self, "shared", "new")

    def start_paths(self, trained: Mapping[str, Any]) -> list[str]:
        return matching(self.shared, trained)

    def penalty(self, trained: Mapping[str, jax.Array], references: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        shared = matching(self.shared, trained)
        new = [path for path in matching(self.new, trained) if path not in shared]
        return l2sp(
            {path: trained[path] for path in shared},
            {path: references["start"][path] for path in shared},
            {path: trained[path] for path in new},
            alpha=self.alpha,
            beta=self.beta,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EWC(Regulariser):
    """Trainable parameters that matter for a source's tasks keep near their values (Kirkpatrick et al., 2017): transfer.ewc.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers; the paper's lambda.
        phase: As in all regularisers: choose one after the phases that train the source, unless init_from or `run` gives
            parameters that are trained on it.
        source: The source whose tasks must not be forgotten, of this run or of `run`.
        run: The workdir of a finished run with that source: its best checkpoint is the anchor, and its heads and training rows
            give the Fisher information. Empty: the source is one of this run.
        batches: Number of batches of training rows, batch.rows rows with one example each, for the Fisher information.
        labels: model: labels drawn from the model's predictions, as in the definition of the Fisher information. data: the
            labels of the rows (the empirical Fisher information), which spans, masked LM and seq2seq tasks need.
        parameters: A regular expression: the parameters that are kept near their values.

    Examples:
        >>> mtl_jax.EWC(weight=100.0).weight
        100.0
    """

    name: str = "ewc"
    source: str = ""
    run: str = ""
    batches: int = 32
    labels: str = "model"
    parameters: str = "trunk/.*"

    must_match: ClassVar[tuple[str, ...]] = ("parameters",)

    def earlier_runs(self) -> dict[str, str]:
        return {"run": self.run}

    @property
    def reads_rows(self) -> bool:
        return True

    def references(self, phase: str) -> dict[str, str]:
        return {"anchor": f"{self.name}-anchor" if self.run else start_of(phase), "fisher": f"{self.name}-fisher"}

    def check(self) -> None:
        _expressions(self, "parameters")
        if not self.source:
            raise UserError(f"{FIELD}: {self.name} needs a source: the one whose tasks must not be forgotten")
        if self.batches < 1:
            raise UserError(f"{FIELD}: batches of {self.name} is {self.batches}; it must be at least 1")
        if self.labels not in ("model", "data"):
            raise unknown(f"labels of {self.name}:", self.labels, ("model", "data"))

    def start_paths(self, trained: Mapping[str, Any]) -> list[str]:
        return [] if self.run else matching(self.parameters, trained)

    def penalty(self, trained: Mapping[str, jax.Array], references: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        """As in all regularisers; "anchor" are the parameters after the source was learned."""
        trees = (trained, references["anchor"], references["fisher"])
        return ewc(*({path: tree[path] for path in matching(self.parameters, trained)} for tree in trees))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Regulariser):
    """The model imitates a teacher: transfer.distill of the outputs of tasks, or transfer.distill_hidden of token vectors.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        teacher: The workdir of a finished run, whose best checkpoint is used; for hidden also a checkpoint's directory or hub
            id, and for one tagging task the directory of a token classifier with the task's labels in order. Its vocabulary
            must be that of this run's trunk.
        of: logits: the outputs of tasks that both runs have under the same name; the loss is the sum over tasks of the mean
            over the task's examples (labelled or not; for taggers, labelled words). hidden: the last vectors of all tokens; the
            loss is the mean over tokens.
        tasks: For logits: these tasks; empty: all that both runs have.
        temperature: For logits: T.
        distance: For hidden: mse or cosine. If the widths differ, a projection to the teacher's width is learned,
            heads/NAME/projection.

    Examples:
        >>> mtl_jax.Distillation(teacher="runs/tiny", temperature=2.0).temperature
        2.0
    """

    name: str = "distillation"
    teacher: str = ""
    of: str = "logits"
    tasks: tuple[str, ...] = ()
    temperature: float = 1.0
    distance: str = "mse"

    def earlier_runs(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    @property
    def reads_tokens(self) -> bool:
        return self.of == "hidden"

    def references(self, phase: str) -> dict[str, str]:
        return {"teacher": f"{self.name}-teacher"}

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
    """Every row goes through the model twice, with different dropout; the outputs are pulled together (Liang et al., 2021).

    The tasks' losses are then means over both passes. (The paper adds them up, so its alpha is twice this weight.) The loss is
    the sum over tasks of the mean of transfer.r_drop over the task's examples; for taggers, labelled words.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        tasks: These tasks; empty: all whose outputs can be compared and whose own weight is not 0 throughout.

    Examples:
        >>> experiment = dataclasses.replace(EXPERIMENT, regularisers=(mtl_jax.RDrop(weight=1.0),))
    """

    name: str = "r_drop"
    tasks: tuple[str, ...] = ()

    doubles_rows: ClassVar[bool] = True


def _not_negative(regulariser: Regulariser, *fields: str) -> None:
    for field in fields:
        value = getattr(regulariser, field)
        if not 0 <= value < math.inf:
            raise UserError(f"{FIELD}: {field} of {regulariser.name} is {value}; it must be finite and not negative")


def _expressions(regulariser: Regulariser, *fields: str) -> None:
    for field in fields:
        check_expression(f"{FIELD}: {field} of {regulariser.name}", getattr(regulariser, field))


def check_expression(where: str, pattern: str) -> None:
    """Raises UserError where a pattern is not a regular expression."""
    try:
        re.compile(pattern)
    except NOT_A_PATTERN as error:
        raise UserError(f"{where} is not a regular expression: {shown(pattern)!r} ({error})") from error
