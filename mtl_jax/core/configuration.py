"""The base of configuration dataclasses, and the limits of their numbers: a wrong field is one line, not a traceback.

Names of fields are checked when a script builds a configuration, numbers by check(), classes of parts by check_kinds().
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.files import shown

EXIT_BAD_INPUT = 2
MOST = 2**31 - 1
LARGEST = 3.4028234e38
MOST_SEED = 2**32 - 1  # jax.random.key takes the lower 32 bits, so 2**32 would be seed 0

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


class WrongField(UserError, TypeError):
    """A configuration was given a field that it does not have, or lacks one that it needs.

    It is also the TypeError that Python raises for such a call.
    """


class Configuration:
    """Base of the dataclasses that a script builds; checks the names of their fields before Python does.

    Python itself reports other mistakes in a call, such as too many positional arguments.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if args or kwargs:  # there are no arguments where it is unpickled or copied
            _check(cls, args, kwargs)
        return super().__new__(cls)


def _check(cls: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    fields = [field for field in dataclasses.fields(cls) if field.init]
    names = [field.name for field in fields]
    ordered = [field.name for field in fields if not field.kw_only]
    given = dict(zip(ordered, args, strict=False)) | kwargs
    title = f"{cls.__name__} {shown(given['name'])!r}" if isinstance(given.get("name"), str) else cls.__name__
    for name in kwargs:
        if name not in names:
            remaining = [other for other in names if other not in given]
            raise WrongField(str(unknown(f"field of {title}:", name, remaining or names)))
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and field.name not in given
    ]
    if missing and len(args) <= len(ordered):
        raise WrongField(f"{title} needs {'the field' if len(missing) == 1 else 'the fields'} {listed(missing)}")


def show_in_one_line() -> None:
    """Makes an uncaught UserError end a script with one line and exit code 2.

    A script builds its configuration before it calls main(), which does the same for later errors. Other exceptions go to
    the previous hook; debuggers, pytest and IPython do not use these hooks.
    """
    sys.excepthook = _hook(sys.excepthook)


def _hook(previous: _Hook) -> _Hook:
    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, UserError):
            previous(kind, error, traceback)
            return
        print(f"error: {error}", file=sys.stderr)
        if not hasattr(sys, "ps1") and not sys.flags.interactive:  # Python's prompt stays open
            raise SystemExit(EXIT_BAD_INPUT)

    return show


def check_kinds(configuration: Any, path: str = "") -> None:
    """Checks that the parts of a configuration are of the classes of their fields, and that several of them are in a tuple.

    Args:
        configuration: An Experiment, or any dataclass in one.
        path: What stands before its fields in an error line, such as "phases.0.".

    Raises:
        UserError: A part is of another class, or one part or text stands where a tuple belongs.
    """
    for name, hint in _hints(cast(Hashable, type(configuration))).items():
        value, where = getattr(configuration, name), f"{path}{name}"
        kind, *rest = typing.get_args(hint) or (hint,)
        if typing.get_origin(hint) is tuple and rest == [Ellipsis]:
            if not isinstance(value, (tuple, list)):
                single = repr(value) if isinstance(value, str) else f"{type(value).__name__}(...)"
                of_one = "" if value is None else f", and a tuple of one has a comma: ({shown(single)},)"
                raise UserError(f"{where} is of the type {type(value).__name__}; it must be a tuple{of_one}")
            for place, element in enumerate(value):
                _check_kind(element, kind, f"{where}.{place}")
        else:
            _check_kind(value, hint, where)


def _check_kind(value: Any, kind: Any, path: str) -> None:
    if not isinstance(kind, type) or not issubclass(kind, Configuration):
        return
    if not isinstance(value, kind):
        raise UserError(f"{path} is of the type {type(value).__name__}; it must be of the class {kind.__name__}")
    check_kinds(value, f"{path}.")


class Limits(NamedTuple):
    """The range of a number.

    Attributes:
        low: The least value.
        high: The greatest value.
        above: Whether the least value itself is refused.
        below: Whether the greatest value itself is refused.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def allow(self, value: float) -> bool:
        """Whether a number is in the range; NaN never is."""
        above_low = value > self.low if self.above else value >= self.low
        return above_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.low in (-math.inf, -LARGEST, -MOST):
            return {math.inf: "a number", MOST: "a whole number"}.get(self.high, "a number that is finite in float32")
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        high = "finite in float32" if self.high == LARGEST else f"{'below' if self.below else 'at most'} {self.high:.10g}"
        return f"{low} and {high}"


WHOLE, FLOAT = Limits(0, MOST), Limits(0, LARGEST)
COUNT, POSITIVE = Limits(1, MOST), Limits(0, LARGEST, above=True)
SEED, SHARE = Limits(0, MOST_SEED), Limits(0, 1)
RATE = Limits(0, 1, below=True)
ANY_WHOLE, ANY, UNBOUNDED = Limits(-MOST, MOST), Limits(-LARGEST, LARGEST), Limits(-math.inf, math.inf)

# Class and field -> limits, where they are not WHOLE or FLOAT; they also hold for the class's subclasses.
LIMITS: dict[str, Limits] = {
    **dict.fromkeys(("Experiment.seed", "Experiment.data_seed"), SEED),
    "Source.cut_seed": ANY_WHOLE,  # it is hashed as text
    **dict.fromkeys(("Embedding.vocabulary", "Embedding.dimension"), COUNT),
    **{f"Transformer.{name}": COUNT for name in ("vocabulary", "layers", "width", "heads", "feed_forward", "max_length")},
    **{f"Batching.{name}": COUNT for name in ("rows", "row_length", "examples_per_row", "accumulate", "recompute", "buckets")},
    **dict.fromkeys(("Evaluation.every", "Checkpoints.every", "Checkpoints.keep", "Phase.steps", "EWC.batches"), COUNT),
    **dict.fromkeys(("Lora.rank", "Vera.rank", "Bottleneck.width", "Prefix.length"), COUNT),
    **dict.fromkeys(("PromptTuning.length", "PromptTuning.examples"), COUNT),
    "Vera.projection_seed": SEED,
    **dict.fromkeys(("Seq2Seq.target_length", "Seq2Seq.beams", "Seq2Seq.dev_beams", "Span.max_answer"), COUNT),
    **{f"{kind}.dropout": RATE for kind in ("Pretrained", "Transformer", "Lora")},
    **{f"Transformer.{name}": RATE for name in ("attention_dropout", "activation_dropout")},
    **dict.fromkeys(("Task.dropout", "Classification.label_smoothing", "Seq2Seq.label_smoothing", "Mixout.p"), RATE),
    **dict.fromkeys(("Source.cut_dev", "Source.cut_test"), RATE),
    **dict.fromkeys(("Classification.threshold", "Optimizer.warmup"), SHARE),
    **dict.fromkeys(("MaskedLM.rate", "Source.near"), Limits(0, 1, above=True)),
    **dict.fromkeys(("Optimizer.b1", "Optimizer.b2"), RATE),
    **dict.fromkeys(("Optimizer.eps", "ParamRule.rate", "Distillation.temperature", "Regression.scale"), POSITIVE),
    **dict.fromkeys(("Contrastive.minimum", "Contrastive.maximum"), ANY),
    "Contrastive.scale": POSITIVE,
    **dict.fromkeys(("Ranking.together", "SelfTraining.passes"), Limits(2, MOST)),
    **dict.fromkeys(("SelfTraining.threshold", "Consistency.threshold"), SHARE),
    "Consistency.drop": Limits(0, 1, above=True, below=True),
    "Consistency.temperature": Limits(0, 1, above=True),
    "Contrastive.widths": COUNT,
    "Optimizer.ratio": Limits(1, LARGEST),
    "Private.delta": Limits(0, 1, above=True, below=True),
    **dict.fromkeys(("Augmentation.share", "Generate.confidence"), SHARE),
    **{f"{kind}.similarity": Limits(-1, 1) for kind in ("MaskedNeighbours", "Rewriting", "Generate")},  # cosines
    **dict.fromkeys(("Private.micro_batch", "Canaries.repeats", "Canaries.words"), COUNT),
    **dict.fromkeys(("Regression.minimum", "Regression.maximum"), UNBOUNDED),
    **dict.fromkeys(("Lora.alpha", "Seq2Seq.length_penalty", "Span.no_answer_threshold"), ANY),
    **dict.fromkeys(("Experiment.weighting_options", "Experiment.weights", "Phase.weights"), ANY),  # checked by the rules
    # Set from the data; -1 before that.
    **dict.fromkeys(("MaskedLM.mask", "Seq2Seq.start", "Seq2Seq.end", "CausalLM.end"), Limits(-1, MOST)),
    **dict.fromkeys(("CausalLM.target_length", "CausalLM.beams", "CausalLM.dev_beams"), COUNT),
    **{"CausalLM.label_smoothing": RATE, "CausalLM.length_penalty": ANY, "CausalLM.cap": POSITIVE},
}
USER_FIELD = "user:"  # before class and field, where a user's class declares it: any number, its check() knows better
SEEDS = ("Experiment.seed", "Experiment.data_seed")


def check(configuration: Any, leave_out: Collection[str] = (), *, coarse: bool = False) -> None:
    """Checks the numbers of a configuration against their limits.

    Args:
        configuration: An Experiment, or any dataclass in one.
        leave_out: Names in LIMITS that are not checked.
        coarse: Whether only values are refused that are not numbers, not finite where they must be, or too large for any use.

    Raises:
        UserError: A number is outside its limits; names the first such field by its path.
    """
    for path, name, kind, value in numeric(configuration):
        limits = _limits(name, kind)
        if name in leave_out:
            continue
        is_number = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        if not is_number:
            raise UserError(f"{path} is {str(value)[:100]!r}; it must be a {'whole ' if kind is int else ''}number")
        most = MOST if kind is int else LARGEST
        if not (Limits(min(limits.low, -most), max(limits.high, most)) if coarse else limits).allow(value):
            raise UserError(f"{path} is {str(value)[:100]}; it must be {limits}")


def _limits(name: str, kind: type) -> Limits:
    if name in LIMITS:
        return LIMITS[name]
    if name.startswith(USER_FIELD):
        return ANY_WHOLE if kind is int else UNBOUNDED
    return WHOLE if kind is int else FLOAT


def numeric(value: Any, path: str = "") -> Iterator[tuple[str, str, type, Any]]:
    """(path, class and field, int or float, value) of each number in a configuration, in the order of its fields."""
    for name, kinds in _fields(cast(Hashable, type(value))).items():
        field_path, field = f"{path}.{name}" if path else name, _declared(type(value), name)
        for element_path, element in _elements(field_path, getattr(value, name)):
            if dataclasses.is_dataclass(element):
                if not type(element).__module__.startswith("mtl_jax.models"):  # sizes from a checkpoint, not from a script
                    yield from numeric(element, element_path)
            elif kinds and not (element is None and type(None) in kinds) and not (isinstance(element, str) and str in kinds):
                yield element_path, field, int if int in kinds else float, element


def _declared(kind: type, field: str) -> str:
    """Class and field as in LIMITS: of the first class that has limits for it, or that declares it."""
    for base in kind.__mro__:
        if f"{base.__name__}.{field}" in LIMITS:
            return f"{base.__name__}.{field}"
        if field in vars(base).get("__annotations__", {}):
            ours = base.__module__.partition(".")[0] == __name__.partition(".")[0]
            return f"{base.__name__}.{field}" if ours else f"{USER_FIELD}{base.__name__}.{field}"
    return f"{kind.__name__}.{field}"


def _elements(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"{path}.{name}", element) for name, element in value.items())
    elif isinstance(value, (tuple, list)):
        yield from ((f"{path}.{index}", element) for index, element in enumerate(value))
    else:
        yield path, value


@functools.cache
def _fields(kind: Any) -> dict[str, frozenset[type]]:
    """Field -> the types that it or its elements may have, if a number is among them; else the empty set."""
    return {name: _kinds(hint) for name, hint in _hints(kind).items()}


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Field -> its type."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _kinds(hint: Any) -> frozenset[type]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return _kinds(arguments[1])
    if origin is tuple:
        return _kinds(arguments[0]) if len(set(arguments) - {Ellipsis}) == 1 else frozenset()
    kinds = frozenset(arguments) if origin in (typing.Union, types.UnionType) else frozenset([hint])
    return kinds if kinds & {int, float} else frozenset()
