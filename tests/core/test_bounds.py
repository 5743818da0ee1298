"""Every number of a configuration: what it may be, and that nothing else passes."""

import dataclasses
import math
from typing import Any

import pytest

from mtl_jax import experiment_checks
from mtl_jax.augment import (
    Aeda,
    BackTranslation,
    CharacterNoise,
    Concatenate,
    Cutoff,
    Eda,
    Generate,
    MaskedNeighbours,
    MentionReplacement,
    Mix,
    NeighbourSmoothing,
    Paraphrase,
    Written,
)
from mtl_jax.core import configuration
from mtl_jax.core.errors import UserError
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.source import Canaries, Source
from mtl_jax.experiment import Checkpoints, Evaluation, Experiment
from mtl_jax.tasks import (
    CausalLM,
    Classification,
    Contrastive,
    MaskedLM,
    Multilabel,
    MultipleChoice,
    Ordinal,
    Ranking,
    Regression,
    Seq2Seq,
    Span,
    Tagging,
)
from mtl_jax.transfer import Consistency, SelfTraining
from mtl_jax.transfer.adapters import IA3, Bottleneck, Dora, Lora, Pissa, Prefix, PromptTuning, RsLora, Vera
from mtl_jax.transfer.freezing import ParamRule
from mtl_jax.transfer.optimizer import Optimizer
from mtl_jax.transfer.penalties import Mixout
from mtl_jax.transfer.phases import Phase
from mtl_jax.transfer.private import Private
from mtl_jax.transfer.regularisers import EWC, L2SP, Distillation, RDrop
from mtl_jax.trunks import Embedding, Pretrained, Transformer

NAMED = {"name": "a", "source": "a", "column": "a"}
# One of every kind, each number set, so that every numeric field is there.
PARTS: tuple[Any, ...] = (
    *(Pretrained("x", dropout=0.1), Embedding(), Transformer(), Source(name="a", path="x"), Mixout(p=0.1)),
    *(Classification(**NAMED, threshold=0.5, class_weights={"x": 1.0}), Multilabel(**NAMED), Regression(**NAMED)),
    *(
        MaskedLM(name="a", source="a"),
        Seq2Seq(**NAMED, length_penalty=1.0),
        CausalLM(**NAMED, length_penalty=1.0, cap=30.0),
        Span(name="a", source="a"),
        Tagging(**NAMED, class_weights={"x": 1.0}),
    ),
    *(Contrastive(name="a", source="a", widths=(8,)), MultipleChoice(name="a", source="a", choices=("x", "y"))),
    *(Ranking(name="a", source="a", group="g"), Ordinal(**NAMED), SelfTraining(source="a"), Consistency(source="a")),
    *(Mix(), NeighbourSmoothing(), Eda(), Aeda(), CharacterNoise(), Cutoff(), Concatenate(), MentionReplacement()),
    *(MaskedNeighbours(model="x"), BackTranslation(), Paraphrase(), Generate(), Written(path="x")),
    *(Lora(name="a"), Bottleneck(name="a"), IA3(name="a"), Prefix(name="a")),
    *(RsLora(name="a"), Dora(name="a"), Pissa(name="a"), Vera(name="a"), PromptTuning(name="a")),
    *(L2SP(), EWC(source="a"), Distillation(teacher="x"), RDrop()),
    *(Private(), Canaries(), Optimizer(), Batching(buckets=(16, 32), shares={"a": 1.0}), Evaluation(), Checkpoints()),
    Phase("a", 1, rules=(ParamRule(".*", weight_decay=0.0),), learning_rate=0.1, weights={"a": 1.0}, shares={"a": 1.0}),
    Experiment("a", Embedding(), (), (), (), weights={"a": 1.0}, weighting_options={"c": 0.5}, data_seed=0),
)
FIELDS = [
    (part, path, name, kind)
    for part in PARTS
    for path, name, kind, _ in configuration.numeric(part)
    if name.partition(".")[0] in {base.__name__ for base in type(part).__mro__}
]
UNBOUNDED = ("Regression.minimum", "Regression.maximum", "Contrastive.minimum", "Contrastive.maximum")
# What zero and negative numbers mean somewhere; everywhere else they are refused.
ZERO = {name for name, limits in configuration.LIMITS.items() if limits.allow(0)}
NEGATIVE = {
    *(*UNBOUNDED, "Lora.alpha", "Seq2Seq.length_penalty", "CausalLM.length_penalty", "Span.no_answer_threshold"),
    *("MaskedNeighbours.similarity", "Rewriting.similarity", "Generate.similarity"),
    *("Experiment.weights", "Experiment.weighting_options", "Phase.weights", "Source.cut_seed"),
    *("MaskedLM.mask", "Seq2Seq.start", "Seq2Seq.end", "CausalLM.end"),
}


def with_value(part: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    before = getattr(part, name)
    if isinstance(before, dict):
        return dataclasses.replace(part, **{name: {**before, rest: value}})
    if isinstance(before, tuple) and not rest.partition(".")[2]:
        return dataclasses.replace(part, **{name: (*before[: int(rest)], value, *before[int(rest) + 1 :])})
    return dataclasses.replace(part, **{name: value})


def refused(part: Any) -> str:
    try:
        configuration.check(part)
    except UserError as error:
        return str(error)
    return ""


def test_the_numbers_that_an_experiment_has_are_all_looked_at():
    named = {name for _, _, name, _ in FIELDS}
    assert {"Optimizer.learning_rate", "Embedding.dimension", "Experiment.seed", "ParamRule.rate"} <= named | {"ParamRule.rate"}
    assert len(named) > 70
    assert set(configuration.LIMITS) - named <= {"ParamRule.rate", "EWC.weight"}, "a name in LIMITS is not that of a field"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 10**400, 2**64, "high", True, [], {}])
def test_no_field_takes_what_is_not_a_number_of_use(value):
    for part, path, name, kind in FIELDS:
        assert not refused(part), path
        if (name in UNBOUNDED and isinstance(value, float) and not math.isnan(value)) or (value == 2**64 and kind is float):
            continue
        if name in UNBOUNDED and isinstance(value, int) and not isinstance(value, bool):
            continue
        if value == "high" and name.endswith((".weight", ".weights", ".weighting_options")):
            continue  # a schedule, which the rule looks at
        if isinstance(value, (list, dict)) and isinstance(getattr(part, path.partition(".")[0]), (tuple, dict)):
            continue
        message = refused(with_value(part, path, value))
        assert "\n" not in message
        assert message.startswith(f"{path} is ") or isinstance(value, (list, dict)), (path, value, message)


def test_zero_and_negative_numbers_pass_where_they_mean_something():
    for part, path, name, kind in FIELDS:
        default = name not in configuration.LIMITS
        assert bool(refused(with_value(part, path, 0))) == (not default and name not in ZERO), path
        assert bool(refused(with_value(part, path, -1))) == (name not in NEGATIVE), path
        if kind is int:
            assert refused(with_value(part, path, 1.5)), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**64}, "^seed is 18446744073709551616; it must be at least 0 and at most 4294967295$"),
        ({"seed": 2**32}, "^seed is 4294967296; "),
        ({"trunk": Embedding(dimension=0)}, "^trunk.dimension is 0; it must be at least 1 and at most"),
        ({"optimizer": Optimizer(learning_rate=math.inf)}, "^optimizer.learning_rate is inf; it must be at least 0 and finite"),
        ({"optimizer": Optimizer(b2=1.0)}, "^optimizer.b2 is 1.0; it must be at least 0 and below 1$"),
        ({"phases": (Phase("a", 2**70),)}, r"^phases\.0\.steps is "),
    ],
)
def test_an_experiment_with_such_a_number_is_refused_before_anything_is_read(changes, message):
    source, task = Source(name="s", path="nowhere.csv", format="csv"), Classification(**{**NAMED, "source": "s"})
    fields = {"name": "a", "trunk": Embedding(), "sources": (source,), "tasks": (task,), "phases": (Phase("a", 1),)}
    with pytest.raises(UserError, match=message):
        experiment_checks.check(Experiment(**(fields | changes)))
