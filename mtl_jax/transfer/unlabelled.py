"""Learning from rows without labels: the model's own labels in rounds, and the same answer for a changed text.

Both are regularisers: losses beside those of the tasks, with a weight, on rows of a source that no task needs to label. Such a
source is read as training rows only.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mtl_jax.core.errors import UserError
from mtl_jax.transfer.freezing import ParamRule
from mtl_jax.transfer.phases import Phase
from mtl_jax.transfer.pseudo_labels import CHOICES
from mtl_jax.transfer.regularisers import FIELD, Regulariser

KINDS = ("softmax", "sigmoid")  # Task.compared_as of tasks that can label rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfTraining(Regulariser):
    """The tasks learn the labels that the model itself gave to unlabelled rows (Yarowsky, 1995; Lee, 2013).

    At the start of `phase`, and of every later phase, the best checkpoint so far labels the rows of `source` anew: a round. Of
    these, only rows with a chosen label are read until the next round. The labels are a file in the workdir, reference/. The
    loss is the sum over tasks of the mean cross-entropy over their chosen rows.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: The phase of the first round; not the first phase, unless init_from gives a trained model.
        source: The source of the unlabelled rows. Those that repeat rows of dev or test are left out.
        tasks: The tasks that label them; empty: all whose outputs are probabilities of a text's labels.
        choose: confidence: every row with enough of it. balanced: as many of each label, the most confident ones. uncertainty:
            as many of each label, those on which several passes with dropout agree most (Mukherjee and Awadallah, 2020). Or one
            of the script's (mtl_jax.transfer.register_choice).
        threshold: The least probability of a label that is chosen.
        per_class: The most rows of a label in a round; 0: for balanced and uncertainty as many as the rarest label has.
        soft: Whether the target is the probability of each label; else the predicted label.
        passes: For uncertainty: the number of passes with dropout.

    Examples:
        >>> mtl_jax.SelfTraining(source="texts", threshold=0.95).threshold
        0.95
    """

    name: str = "self_training"
    source: str = ""
    tasks: tuple[str, ...] = ()
    choose: str = "confidence"
    threshold: float = 0.9
    per_class: int = 0
    soft: bool = False
    passes: int = 10

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def level(self) -> str:
        return "outputs"

    def check(self) -> None:
        if not self.source:
            raise UserError(f"{FIELD}: {self.name} needs a source: that of the unlabelled rows")
        CHOICES.find(self.choose, f"choose of {self.name}:")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"{FIELD}: threshold of {self.name} is {self.threshold}; it must be a probability")
        if self.passes < 2:
            raise UserError(f"{FIELD}: passes of {self.name} is {self.passes}; it must be at least 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(Regulariser):
    """A text and a copy of it with hidden words get the same answer (Xie et al., 2020, UDA).

    Every row goes through the model twice, the second time with some tokens replaced by the mask token. The loss is the sum
    over tasks of the mean divergence of the copy's answer from the row's own, which gets no gradient.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        source: The source of the rows; a source without labels, or one of the tasks'. Empty: those of the tasks.
        tasks: These tasks; empty: all whose outputs can be compared, of whole texts.
        drop: The share of a copy's tokens that are replaced.
        temperature: The row's own answer is sharpened by it: below 1, more certain.
        threshold: Rows count only where the probability of the answer is at least this.

    Examples:
        >>> mtl_jax.Consistency(source="texts").source
        'texts'
    """

    name: str = "consistency"
    source: str = ""
    tasks: tuple[str, ...] = ()
    drop: float = 0.15
    temperature: float = 0.4
    threshold: float = 0.8

    doubles_rows: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if self.source else ()

    @property
    def changes_inputs(self) -> bool:
        return True

    @property
    def level(self) -> str:
        return "outputs"

    def check(self) -> None:
        if not 0 < self.drop < 1:
            raise UserError(f"{FIELD}: drop of {self.name} is {self.drop}; it must be above 0 and below 1")
        if not 0 < self.temperature <= 1:
            raise UserError(f"{FIELD}: temperature of {self.name} is {self.temperature}; it must be above 0 and at most 1")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"{FIELD}: threshold of {self.name} is {self.threshold}; it must be a probability")


def self_training(
    labelled: str,
    unlabelled: str,
    steps: int,
    round_steps: int,
    *,
    rounds: int = 1,
    share: float = 0.5,
    rate: float | None = None,
    rules: tuple[ParamRule, ...] = (ParamRule(".*"),),
) -> tuple[Phase, ...]:
    """The phases of self-training: one on the labelled rows, then rounds that read the unlabelled ones, too.

    Give the experiment SelfTraining(source=unlabelled, phase="round_1") as well.

    Args:
        labelled: The source with labels.
        unlabelled: The source without.
        steps: Steps of the first phase.
        round_steps: Steps of each round.
        rounds: The number of rounds.
        share: The share of a batch's rows that are unlabelled ones, in rounds.
        rate: The learning rate of each phase; None: the optimizer's.
        rules: The parameter rules of each phase.

    Returns:
        The phases "teach", "round_1", "round_2" ...

    Raises:
        UserError: A number is out of range.
    """
    if rounds < 1:
        raise UserError(f"self_training: rounds is {rounds}; it must be at least 1")
    if not 0 < share < 1:
        raise UserError(f"self_training: share is {share}; it must be above 0 and below 1")
    lengths = {"teach": steps} | {f"round_{number}": round_steps for number in range(1, rounds + 1)}
    shares = {name: 0.0 if name == "teach" else share for name in lengths}
    return tuple(
        Phase(name, length, rules, rate, mixture="fixed", shares={labelled: 1 - shares[name], unlabelled: shares[name]})
        for name, length in lengths.items()
    )
