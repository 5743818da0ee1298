"""The head of tasks over whole texts: linear layers of mtl_jax, or the text classifier of the checkpoint's family.

A family's classifier reads the vector that its class in transformers reads, such as that of the first token, and has the layers
and the dropout of that class. It begins as the checkpoint's where that has one; of a bare BERT it is the pooler. mtl-jax
convert then writes a directory for pipeline("text-classification").
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import flax.linen as nn

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.parts import FILLED_IN, ONLY_IF_SET
from mtl_jax.models.trunk_output import TrunkFacts
from mtl_jax.pretrained import text_classifier
from mtl_jax.pretrained.text_classifier import FamilyClassifier
from mtl_jax.tasks.base import Task

FAMILY = "family"
HEADS = ("", FAMILY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask(Task, abc.ABC):
    """Base of the kinds with a label for each text, or pair of texts, whose head may be that of the checkpoint's family.

    Attributes:
        head: family: the text classifier of the checkpoint's family, as transformers has it, so that an exported run opens in
            its pipelines; it has the dropout rates of the trunk, and hidden and dropout stay 0. Empty: the layers that hidden
            and dropout describe, on the mean of a text's token vectors.
        classifier: That classifier; filled in from the trunk.
    """

    head: str = dataclasses.field(default="", metadata=ONLY_IF_SET)
    classifier: FamilyClassifier | None = dataclasses.field(default=None, metadata=FILLED_IN)

    @property
    def text_vector(self) -> str:
        return "first" if self.classifier is not None and self.classifier.reads == "first" else "pooled"

    @property
    def begins_as_classifier(self) -> bool:
        return self.head == FAMILY

    @property
    def problem_type(self) -> str:
        """What config.json of transformers calls the kind of labels."""
        return {"softmax": "single_label_classification", "sigmoid": "multi_label_classification"}.get(
            self.compared_as, "regression"
        )

    @property
    def output_scale(self) -> float:
        """Units of a label for each unit of the head's output."""
        return 1.0

    def check(self) -> None:
        super().check()
        if self.head not in HEADS:
            raise unknown(f"head of task {self.name!r}:", self.head, (FAMILY,))
        if self.head == FAMILY and (self.hidden or self.dropout):
            field = "hidden" if self.hidden else "dropout"
            instead = "its layers are those of transformers" if self.hidden else "its rates are the trunk's (trunk.dropout)"
            raise UserError(f"task {self.name!r}: {field} is {getattr(self, field)}, but head is {FAMILY!r}, and {instead}")

    def on(self, trunk: TrunkFacts) -> Self:
        """The task with the classifier of the trunk's family, where head says so.

        Raises:
            UserError: The trunk's family has none, or the trunk gives another vector of a text than the one it reads.
        """
        if self.head != FAMILY:
            return self
        where = f"task {self.name!r}: head is {FAMILY!r}, but"
        try:
            classifier = text_classifier.declared(trunk.raw, trunk.dropout)
        except UserError as error:
            raise UserError(f"{where} {error}; leave head out, for layers on the mean of the token vectors") from error
        if classifier.reads not in ("first", trunk.pooling):
            kind = classifier.family.model_types[0]
            raise UserError(
                f"{where} the classifier of {kind} checkpoints reads the {classifier.reads} token, and trunk.pooling is "
                f"{trunk.pooling!r}; leave trunk.pooling out"
            )
        return dataclasses.replace(self, classifier=classifier)

    def head_module(self) -> nn.Module:
        return super().head_module() if self.classifier is None else self.classifier.module(self.outputs)

    def from_classifier(self, classifier: Mapping[str, Any], fresh: Any) -> Any:
        if self.classifier is None:
            return fresh
        return text_classifier.begin(fresh, classifier, self.columns_of(classifier), self.output_scale)

    def beginning(self, classifier: Mapping[str, Any], params: Any) -> str:
        """A line for the log: which layers of the head begin as the checkpoint's, and which are fresh.

        Args:
            classifier: As for from_classifier().
            params: The head's parameters.
        """
        assert self.classifier is not None
        known = {path.rpartition("/")[0] for path in trees.flat(classifier)}
        if self.columns_of(classifier) is None:
            known -= {f"head/{name}" for name in text_classifier.OUTPUT_LAYERS}
        layers = sorted({path.rpartition("/")[0] for path in trees.flat(params)})
        parts = [("from the checkpoint", [layer for layer in layers if layer in known])]
        parts.append(("fresh", [layer for layer in layers if layer not in known]))
        kind = self.classifier.family.model_types[0]
        shown = "; ".join(f"{listed(names)} {what}" for what, names in parts if names)
        return f"task {self.name}: its head is the classifier of {kind} checkpoints: {shown}"

    def columns_of(self, classifier: Mapping[str, Any]) -> Sequence[int] | None:
        """The output of the checkpoint's classifier for each of this task's, by the names of the labels.

        Names such as LABEL_0 are none: outputs then stay in order if there are as many.

        Returns:
            None where the checkpoint has no such outputs, so that the output layer is fresh.
        """
        assert self.classifier is not None
        size = text_classifier.outputs(classifier)
        names = self.classifier.labels
        if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
            return range(size) if size == self.outputs else None
        for labels in (self.shown_labels, self.labels):
            if labels and set(labels) <= set(names[:size]):
                return [names.index(label) for label in labels]
        return None
